"""Procedurally drawn, captioned scenes: the training data of the bundled model.

A scene is one or two coloured, textured shapes at named places on a coloured background.
Everything about a scene, its caption's wording and its pixels included, follows from one
integer seed. Lengths are fractions of the image's side, with x to the right and y down.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 230, 50),
    "green": (30, 150, 60),
    "cyan": (70, 220, 230),
    "blue": (35, 70, 215),
    "purple": (130, 40, 170),
    "white": (245, 245, 245),
}
"""Colour word -> sRGB, 0 to 255."""

SHAPES = ("circle", "square", "triangle", "ring", "star", "cross", "diamond", "crescent")
TEXTURES = ("plain", "striped", "dotted", "checked")
BACKGROUNDS = ("flat", "gradient", "cloudy", "grainy", "woven")
SIZES: dict[str, float] = {"small": 0.13, "large": 0.18}
"""Size word -> radius."""

PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.2, 0.2),
    "top": (0.5, 0.2),
    "top right": (0.8, 0.2),
    "left": (0.2, 0.5),
    "centre": (0.5, 0.5),
    "right": (0.8, 0.5),
    "bottom left": (0.2, 0.8),
    "bottom": (0.5, 0.8),
    "bottom right": (0.8, 0.8),
}
"""Place word -> centre (x, y)."""

JITTER = 0.012  # how far an object's centre strays from its place, along each axis
GAP = 0.02  # the least distance between two objects' circumscribed circles
SHADE = 0.35  # brightness of a texture's dark parts, relative to its colour

Array = np.ndarray


@dataclass(frozen=True)
class SceneObject:
    """One shape, described by the words its caption uses."""

    shape: str
    colour: str
    texture: str
    place: str
    size: str


@dataclass(frozen=True)
class Scene:
    """Objects on a background; `seed` settles the jitter, the noise and the wording."""

    objects: tuple[SceneObject, ...]
    colour: str
    texture: str
    seed: int

    def caption(self) -> str:
        """The scene in words; sizes, "plain" and "flat" are left out half of the time."""
        rng = np.random.default_rng((self.seed, 1))

        def phrase(*words: str) -> str:
            text = " ".join(
                word
                for word in words
                if not (word in SIZES or word in ("plain", "flat")) or rng.random() < 0.5
            )
            return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"

        objects = ", and ".join(
            f"{phrase(o.size, o.texture, o.colour, o.shape)}, {o.place}" for o in self.objects
        )
        return f"{objects}, on {phrase(self.texture, self.colour, 'background')}"

    def draw(self, size: int = 256) -> Array:
        """The scene's pixels: (size, size, 3) uint8, sRGB, anti-aliased."""
        rng = np.random.default_rng((self.seed, 0))
        axis = ((np.arange(size) + 0.5) / size).astype(np.float32)
        x, y = np.meshgrid(axis, axis)
        light = _background(self.texture, x, y, size, rng)
        image = light[..., None] * np.asarray(COLOURS[self.colour], np.float32)
        for thing in self.objects:
            cx, cy = np.asarray(PLACES[thing.place]) + rng.uniform(-JITTER, JITTER, 2)
            dx, dy, radius = x - np.float32(cx), y - np.float32(cy), SIZES[thing.size]
            cover = _cover(_distance(thing.shape, dx / radius, dy / radius) * radius, size)
            light = 1 - (1 - SHADE) * _texture(thing.texture, dx, dy, size)
            paint = light[..., None] * np.asarray(COLOURS[thing.colour], np.float32)
            image += cover[..., None] * (paint - image)
        return np.clip(image + 0.5, 0, 255).astype(np.uint8)


def sample(seed: int) -> Scene:
    """The scene of a seed: objects apart from each other, all colours different."""
    rng = np.random.default_rng((seed, 2))
    count = int(rng.integers(1, 3))
    colours = _pick(rng, tuple(COLOURS), count + 1)
    shapes = [_pick(rng, SHAPES, 1)[0] for _ in range(count)]
    textures = [_pick(rng, TEXTURES, 1)[0] for _ in range(count)]
    while True:
        places = _pick(rng, tuple(PLACES), count)
        sizes = [_pick(rng, tuple(SIZES), 1)[0] for _ in range(count)]
        if are_apart(places, sizes):
            break
    objects = tuple(map(SceneObject, shapes, colours, textures, places, sizes))
    return Scene(objects, colours[-1], _pick(rng, BACKGROUNDS, 1)[0], seed)


def words() -> list[str]:
    """Every word and mark that a caption can hold, sorted."""
    names = (*COLOURS, *SHAPES, *TEXTURES, *BACKGROUNDS, *SIZES, *PLACES)
    return sorted({*" ".join(names).split(), "a", "an", "and", "on", "background", ","})


def are_apart(places: list[str], sizes: list[str]) -> bool:
    """Whether objects of these sizes at these places leave a gap between any two."""
    return all(
        np.hypot(*np.subtract(PLACES[p], PLACES[q])) + 1e-6 >= SIZES[s] + SIZES[t] + GAP
        for (p, s), (q, t) in combinations(zip(places, sizes, strict=True), 2)
    )


def _pick(rng: np.random.Generator, options: tuple[str, ...], count: int) -> list[str]:
    return [options[i] for i in rng.choice(len(options), count, replace=False)]


def _cover(distance: Array, size: int) -> Array:
    """Signed distance to an edge (negative inside) -> the share of each pixel inside it."""
    return np.clip(0.5 - distance * size, 0, 1)


def _distance(shape: str, x: Array, y: Array) -> Array:
    """Signed distance to a shape of circumscribed radius about 1, in radii."""
    r = np.hypot(x, y)
    ax, ay = np.abs(x), np.abs(y)
    match shape:
        case "circle":
            return r - 0.95
        case "square":
            return np.maximum(ax, ay) - 0.82
        case "triangle":
            return np.maximum(y - 0.6, 0.866 * ax - 0.5 * y - 0.5)
        case "ring":
            return np.abs(r - 0.72) - 0.26
        case "star":
            # One of the ten half-points, mirrored round: the line from a tip to a notch.
            sector = 2 * np.pi / 5
            angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
            notch = 0.45 * np.array([np.cos(sector / 2), np.sin(sector / 2)])
            normal = np.array([notch[1], 1 - notch[0]]) / np.hypot(notch[1], 1 - notch[0])
            return (r * np.cos(angle) - 1) * normal[0] + r * np.sin(angle) * normal[1]
        case "cross":
            bar, arm = np.maximum(ax, ay), np.minimum(ax, ay)
            return np.maximum(bar - 0.95, arm - 0.33)
        case "diamond":
            return (1.4 * ax + ay - 1) / np.hypot(1.4, 1)
        case "crescent":
            return np.maximum(r - 0.95, 0.75 - np.hypot(x - 0.5, y))
    raise ValueError(f"no such shape: {shape!r}")


def _wave(t: Array, period: float, size: int) -> Array:
    """An anti-aliased square wave along `t`: 1 for half a period, then 0."""
    return _cover((np.abs((t / period) % 1 - 0.5) - 0.25) * period, size)


def _texture(texture: str, x: Array, y: Array, size: int) -> Array:
    """The share of each pixel that an object's texture darkens, 0 to 1."""
    match texture:
        case "plain":
            return np.zeros_like(x)
        case "striped":
            return _wave((x + y) / np.sqrt(2), 1 / 16, size)
        case "checked":
            a, b = _wave(x + 1 / 56, 1 / 14, size), _wave(y + 1 / 56, 1 / 14, size)
            return a + b - 2 * a * b
        case "dotted":
            pitch = 1 / 15
            u, v = (((t / pitch + 0.5) % 1 - 0.5) * pitch for t in (x, y))
            return _cover(np.hypot(u, v) - 0.3 * pitch, size)
    raise ValueError(f"no such texture: {texture!r}")


def _background(texture: str, x: Array, y: Array, size: int, rng: np.random.Generator) -> Array:
    """A background's brightness, about 0.6 to 1.1."""
    match texture:
        case "flat":
            return np.ones_like(x)
        case "gradient":
            angle = rng.uniform(0, 2 * np.pi)
            return 0.8 + 0.35 * ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle))
        case "cloudy":
            return 0.85 + 0.12 * _noise(8, size, Image.Resampling.BICUBIC, rng)
        case "grainy":
            return 0.9 + 0.1 * _noise(64, size, Image.Resampling.NEAREST, rng)
        case "woven":
            return 0.87 + 0.13 * np.sin(32 * np.pi * x) * np.sin(32 * np.pi * y)
    raise ValueError(f"no such background: {texture!r}")


def _noise(cells: int, size: int, resample: Image.Resampling, rng: np.random.Generator) -> Array:
    """Normal noise on a grid of `cells` by `cells`, enlarged to the image's size."""
    grid = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(grid.resize((size, size), resample))
