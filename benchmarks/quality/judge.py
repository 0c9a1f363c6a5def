"""Judge images of captioned scenes: which of the objects are where and as they should be.

    python -m benchmarks.quality.judge
    python -m benchmarks.quality.judge --train

The first form prints how often the judge is right on scenes it has never seen, and how often
the pipeline is, dense and with RAS; the second trains the judge, a small convolutional network,
and writes `judge.safetensors` beside this file. Images are (B, 3, 256, 256) float32 in [0, 1].
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import ras

from ..commands import COUNT, STEP, as_command
from ..model import scenes, train
from ..model.sd3 import SIDE
from ..tables import cells, grid
from . import setting
from .drawing import MODELS, Item, decode, draw, encode, items, model
from .measures import fingerprint, gaussian

WEIGHTS = Path(__file__).with_suffix(".safetensors")
ATTRIBUTES = ("place", "shape", "colour", "texture")
WORDS = {"shape": scenes.SHAPES, "colour": tuple(scenes.COLOURS), "texture": scenes.TEXTURES}

TRAINING = range(30_000_000, 30_004_000)  # seeds of scenes
HELD_OUT = range(40_000_000, 40_001_000)
REAL = 50_000_000  # scenes from here on are for the statistics of real ones
DECODED = 800  # of the training scenes, those that are shown as the autoencoder renders them
LATENT_NOISE = 0.3  # the most noise there is in their latents, of standard deviation 1
STEPS, BATCH = 1200, 32


class Classifier(nn.Module):
    """Reads what is at each of the nine places; an output sees about 130 pixels' width."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        plan = ((16, 5, 2), (32, 3, 2), (64, 3, 2), (64, 3, 1), (64, 3, 1), (64, 3, 1))
        for out, kernel, stride in plan:
            conv = nn.Conv2d(width, out, kernel, stride, kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
            width = out
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 1 + sum(map(len, WORDS.values())))
        centres = torch.tensor(list(scenes.PLACES.values()))
        self.register_buffer("places", (2 * centres - 1)[None, None], persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits at each place: presence (B, 9), shape (B, 9, 8), colour (B, 9, 8) and
        texture (B, 9, 4)."""
        return self.read(F.avg_pool2d(images, 2))

    def features(self, images: Tensor) -> Tensor:
        """(B, 64): the mean over the image of the last layer before the head."""
        return self.grid(F.avg_pool2d(images, 2)).mean((2, 3))

    def read(self, halves: Tensor) -> tuple[Tensor, ...]:
        """The logits of images of half the side, (B, 3, 128, 128)."""
        grid = self.grid(halves)
        places = self.places.expand(len(grid), -1, -1, -1)
        here = F.grid_sample(grid, places, align_corners=False)[:, :, 0].mT
        presence, *words = self.head(here).split([1, *map(len, WORDS.values())], dim=-1)
        return presence[..., 0], *words

    def grid(self, halves: Tensor) -> Tensor:
        """The last layer before the head, (B, 64, 16, 16), of images of half the side."""
        return self.body(4 * halves - 2)


def load_classifier(path: Path = WEIGHTS) -> Classifier:
    classifier = Classifier().requires_grad_(False).eval()
    classifier.load_state_dict(safetensors.torch.load_file(path))
    return classifier


@torch.no_grad()
def attributes(classifier: Classifier, images: Tensor, captioned: Sequence[scenes.Scene]) -> Tensor:
    """What the images get right of their scenes' objects: (objects, 4) bool, as in ATTRIBUTES.

    Objects come in the order of the scenes. The place is right if something is seen there; the
    others are, if moreover the likeliest word there is the scene's.
    """
    places = list(scenes.PLACES)
    where = [(i, places.index(o.place)) for i, scene in enumerate(captioned) for o in scene.objects]
    rows, columns = map(list, zip(*where))
    presence, *logits = classifier(images)
    here = (presence > 0)[rows, columns, None]
    read = torch.stack([value.argmax(-1) for value in logits], dim=-1)
    right = (read == labels(captioned))[rows, columns]
    return torch.cat([here, here & right], dim=-1)


def labels(captioned: Sequence[scenes.Scene]) -> Tensor:
    """Indices into WORDS at each place, -1 where there is nothing: (B, 9, 3) int64."""
    places = list(scenes.PLACES)
    result = torch.full((len(captioned), len(places), len(WORDS)), -1)
    for i, scene in enumerate(captioned):
        for thing in scene.objects:
            words = [options.index(getattr(thing, name)) for name, options in WORDS.items()]
            result[i, places.index(thing.place)] = torch.tensor(words)
    return result


def real(seeds: Sequence[int]) -> Iterator[Tensor]:
    """Batches of up to 50 drawn scenes: (N, 3, 256, 256) float32 in [0, 1]."""
    for batch in train.images(seeds):
        yield (batch + 1) / 2


@torch.no_grad()
def real_statistics(classifier: Classifier, work: Path, count: int = 2000) -> tuple[Tensor, Tensor]:
    """The features' mean (64,) and covariance (64, 64) over real scenes, float64.

    Kept in the folder `work` under a name that follows from the scenes and the classifier.
    """
    drawn_by = Path(scenes.__file__).read_bytes()
    key = fingerprint(classifier.state_dict().values(), drawn_by)
    path = work / f"real-{count}-{key}.safetensors"
    if not path.exists():
        batches = tqdm(real(range(REAL, REAL + count)), "real scenes", -(-count // 50))
        mean, cov = gaussian(torch.cat([classifier.features(batch) for batch in batches]))
        work.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file({"mean": mean, "cov": cov}, path)
    kept = safetensors.torch.load_file(path)
    return kept["mean"], kept["cov"]


def generate(pipe: DiffusionPipeline, asked: Sequence[Item], batch: int) -> Iterator[Tensor]:
    """The pipeline's images of the items, (N, 3, 256, 256) float32 in [0, 1]."""
    for first in tqdm(range(0, len(asked), batch), "batches"):
        inputs = encode(pipe, list(asked[first : first + batch]))
        yield decode(pipe, draw(pipe, inputs, setting.STEPS))


@torch.no_grad()
def decoded(vae: AutoencoderKL, images: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """The images as the autoencoder renders them, with noise of up to `noise` in the latents."""
    with torch.autocast("cpu", torch.bfloat16):
        latent = vae.encode(2 * images - 1).latent_dist.mean.float()
        amount = noise * torch.rand(len(latent), 1, 1, 1, generator=generator)
        latent += (
            amount * torch.randn(latent.shape, generator=generator) / vae.config.scaling_factor
        )
        return (vae.decode(latent).sample.float() / 2 + 0.5).clamp(0, 1)


def augment(halves: Tensor, generator: torch.Generator) -> Tensor:
    """Images moved, scaled, bent, softened, tinted and made noisy, each a little."""
    count, _, side, _ = halves.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    scale = torch.eye(2) * uniform(0.96, 1.04, 1, 1)
    move = uniform(-4 / side, 4 / side, 2, 1)  # by up to 2 pixels, the width being 2
    field = F.affine_grid(torch.cat([scale, move], dim=2), list(halves.shape), align_corners=False)
    # Generated outlines waver, which should not turn one shape into another.
    waver = uniform(0, 3 / side, 1, 1, 1) * torch.randn(count, 2, 16, 16, generator=generator)
    field += F.interpolate(waver, size=(side, side), mode="bicubic").movedim(1, -1)
    halves = F.grid_sample(halves, field, padding_mode="reflection", align_corners=False)
    coarse = F.interpolate(F.avg_pool2d(halves, 2), scale_factor=2.0, mode="bilinear")
    halves = halves.lerp(coarse, uniform(0, 1, 1, 1, 1))
    halves = halves * uniform(0.93, 1.07, 3, 1, 1) + uniform(-0.04, 0.04, 1, 1, 1)
    noise = torch.randn(halves.shape, generator=generator)
    return (halves + uniform(0, 0.04, 1, 1, 1) * noise).clamp(0, 1)


def lesson(seed: int) -> scenes.Scene:
    """The scene of a seed or, for two seeds of three, one crowded with objects to learn from."""
    scene = scenes.sample(seed)
    if seed % 3 == 0:
        return scene
    rng = np.random.default_rng((seed, 3))

    def pick(options: Iterable[str]) -> str:
        return str(rng.choice(list(options)))

    colours = [colour for colour in scenes.COLOURS if colour != scene.colour]
    places = list(scenes.PLACES)[seed % 3 - 1 :: 2]  # the corners and the centre, or the others
    objects = tuple(
        scenes.SceneObject(
            pick(scenes.SHAPES), pick(colours), pick(scenes.TEXTURES), place, pick(scenes.SIZES)
        )
        for place in places
        if rng.random() < 0.8
    )
    return replace(scene, objects=objects)


def lessons(seeds: list[int]) -> tuple[Tensor, Tensor]:
    """The scenes to learn from, (N, 3, 256, 256) float32 in [0, 1], and their labels."""
    drawn = [lesson(seed) for seed in seeds]
    pixels = np.stack([scene.draw(SIDE) for scene in drawn])
    return torch.from_numpy(pixels).movedim(-1, 1) / 255, labels(drawn)


def loss(outputs: tuple[Tensor, ...], names: Tensor) -> Tensor:
    """Cross-entropies: of presence at every place, of the words where there is an object."""
    presence, *logits = outputs
    there = names[..., 0] >= 0
    words = sum(F.cross_entropy(value[there], names[there][:, i]) for i, value in enumerate(logits))
    return 3 * F.binary_cross_entropy_with_logits(presence, there.float()) + words


def fit(vae: AutoencoderKL, seed: int) -> Classifier:
    """Train a classifier; `seed` settles all but the scenes."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pool, names = [], []
    batches = DataLoader(TRAINING, batch_size=20, num_workers=2, collate_fn=lessons)
    for images, named in tqdm(batches, "scenes"):
        if 20 * len(pool) < DECODED:
            images = decoded(vae, images, LATENT_NOISE, generator)
        pool.append(F.avg_pool2d(images, 2))
        names.append(named)
    halves, named = torch.cat(pool), torch.cat(names)
    classifier = Classifier().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.05)
    for step, figures in train.steps_left("judge", 0, STEPS, BATCH):
        train.set_rate(optimizer, step, STEPS, 4e-3)
        chosen = torch.randint(len(halves), (BATCH,), generator=generator)
        batch = augment(halves[chosen], generator).to(memory_format=torch.channels_last)
        figures["loss"] = loss(classifier.read(batch), named[chosen])
        optimizer.zero_grad()
        figures["loss"].backward()
        optimizer.step()
    return classifier.eval().requires_grad_(False)


def row(
    name: str, classifier: Classifier, batches: Iterable[Tensor], captioned: Iterable[scenes.Scene]
) -> str:
    """A row of the table: the share of objects that have each attribute right."""
    left = iter(captioned)
    parts = [attributes(classifier, batch, list(islice(left, len(batch)))) for batch in batches]
    right = torch.cat(parts).float()
    return cells([name, str(len(right)), *(f"{share:.2%}" for share in right.mean(0))])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.quality.judge", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--train", action="store_true", help="train the judge, and stop")
    parser.add_argument("--seed", type=STEP, default=0, help="of the training")
    parser.add_argument("--model", default="bundled", help=f"{', '.join(MODELS)} or a folder")
    parser.add_argument("--count", type=COUNT, default=500, help="what the pipeline draws")
    parser.add_argument("--batch", type=COUNT, default=20, help="captions per call of the pipeline")
    parser.set_defaults(half=None)
    options = parser.parse_args(argv)
    pipe = model(options.model)
    if options.train:
        state = fit(pipe.vae, options.seed).state_dict()
        halves = {
            name: value.half().contiguous() if value.is_floating_point() else value
            for name, value in state.items()
        }
        safetensors.torch.save_file(halves, WEIGHTS)
        return
    classifier = load_classifier()
    print(grid(" | ".join(["images", "objects", *ATTRIBUTES]), []))
    held_out = [scenes.sample(i) for i in HELD_OUT]
    total = -(-len(HELD_OUT) // 50)
    print(row("real scenes", classifier, tqdm(real(HELD_OUT), "real scenes", total), held_out))
    few = range(HELD_OUT.start, HELD_OUT.start + min(options.count, len(HELD_OUT)))
    generator = torch.Generator().manual_seed(0)
    for noise in (0.0, LATENT_NOISE):
        batches = tqdm(real(few), "autoencoder", -(-len(few) // 50))
        coded = (
            decoded(pipe.vae, part, noise, generator)
            for batch in batches
            for part in batch.split(10)
        )
        print(row(f"real, latents' noise up to {noise}", classifier, coded, held_out))
    asked = items(pipe, options)
    captioned = [item.scene for item in asked if item.scene]
    drawn = generate(pipe, asked, options.batch)
    print(row("drawn, dense", classifier, drawn, captioned))
    with ras.enabled(pipe):
        drawn = generate(pipe, asked, options.batch)
        print(row("drawn, RAS", classifier, drawn, captioned))


if __name__ == "__main__":
    as_command(main)
