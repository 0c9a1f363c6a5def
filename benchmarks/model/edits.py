"""Edits of drawn scenes, and their instructions: the training data of the editing model.

An edit changes one thing of a scene: the colour, texture, shape or place of an object, whether it
is there, or the background's colour. Everything about it follows from one integer seed. All that is
not asked for is drawn alike before and after, to the pixel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import numpy as np

from . import scenes
from .scenes import Scene, SceneObject

KINDS = ("colour", "texture", "shape", "place", "presence", "background")
SHARE = 1 / 8  # of edits of the background
VERBS = ("make", "the", "background", "replace", "by", "remove", "add", "move", "to")


@dataclass(frozen=True)
class Edit:
    """A scene before and after; the other way round it is an edit, too."""

    before: Scene
    after: Scene
    seed: int

    def instruction(self) -> str:
        """What to do, in words; the colour of an object is left out half of the time."""
        rng = np.random.default_rng((self.seed, 4))
        old, new = self.before.objects, self.after.objects
        if self.before.colour != self.after.colour:
            return f"make the background {self.after.colour}"
        if len(new) > len(old):
            return f"add {_described(new[-1])}, {new[-1].place}"

        def name(thing: SceneObject) -> str:
            alike = sum(other.shape == thing.shape for other in old)
            colour = f"{thing.colour} " if alike > 1 or rng.random() < 0.5 else ""
            return f"the {colour}{thing.shape}"

        if len(new) < len(old):
            return f"remove {name(old[-1])}"
        was, now = next(pair for pair in zip(old, new, strict=True) if pair[0] != pair[1])
        if was.shape != now.shape:
            return f"replace {name(was)} by {_with_article(now.shape)}"
        if was.place != now.place:
            return f"move {name(was)} to the {now.place}"
        return f"make {name(was)} {now.colour if was.colour != now.colour else now.texture}"

    @property
    def kind(self) -> str:
        """What is changed, one of `KINDS`."""
        if self.before.colour != self.after.colour:
            return "background"
        if len(self.before.objects) != len(self.after.objects):
            return "presence"
        pairs = zip(self.before.objects, self.after.objects, strict=True)
        was, now = next(pair for pair in pairs if pair[0] != pair[1])
        names = (field.name for field in fields(SceneObject))
        return next(name for name in names if getattr(was, name) != getattr(now, name))

    def reversed(self) -> Edit:
        """The edit that undoes this one."""
        return Edit(self.after, self.before, self.seed)


def sample(seed: int) -> Edit:
    """The edit of a seed, of the scene of that seed or into it."""
    rng = np.random.default_rng((seed, 3))
    scene = scenes.sample(seed)
    kind = "background" if rng.random() < SHARE else KINDS[rng.integers(len(KINDS) - 1)]
    edit = Edit(scene, _changed(scene, kind, rng), seed)
    return edit.reversed() if rng.random() < 0.5 else edit


def words() -> list[str]:
    """Every word and mark that an instruction can hold, sorted."""
    return sorted({*scenes.words(), *VERBS})


def _changed(scene: Scene, kind: str, rng: np.random.Generator) -> Scene:
    """The scene with one thing changed; the colours of its parts stay different."""
    colours = {scene.colour, *(thing.colour for thing in scene.objects)}
    if kind == "background":
        return replace(scene, colour=_other(rng, scenes.COLOURS, colours))
    if kind == "presence":  # of the last object, since jitter is drawn object by object
        return replace(scene, objects=scene.objects[:-1])
    at = int(rng.integers(len(scene.objects)))
    thing = scene.objects[at]
    if kind == "place":
        others = [other for i, other in enumerate(scene.objects) if i != at]
        free = [
            place
            for place in scenes.PLACES
            if place != thing.place
            and all(
                scenes.are_apart([place, other.place], [thing.size, other.size]) for other in others
            )
        ]
        value = free[rng.integers(len(free))]
    else:
        options: dict[str, Iterable[str]] = {
            "colour": scenes.COLOURS,
            "texture": scenes.TEXTURES,
            "shape": scenes.SHAPES,
        }
        taken = colours if kind == "colour" else {getattr(thing, kind)}
        value = _other(rng, options[kind], taken)
    changed = replace(thing, **{kind: value})
    return replace(scene, objects=(*scene.objects[:at], changed, *scene.objects[at + 1 :]))


def _other(rng: np.random.Generator, options: Iterable[str], taken: set[str]) -> str:
    free = [option for option in options if option not in taken]
    return free[rng.integers(len(free))]


def _described(thing: SceneObject) -> str:
    texture = "" if thing.texture == "plain" else f"{thing.texture} "
    return _with_article(f"{thing.size} {texture}{thing.colour} {thing.shape}")


def _with_article(text: str) -> str:
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"
