"""Inpainting, where activity is local: how near to the dense result each method comes, and when.

    python -m benchmarks.quality.inpainting
    python -m benchmarks.quality.inpainting --model kontext

An object of a drawn scene is to become another one under a square mask of 5, 20 or 50 % of the
image, as `StableDiffusion3InpaintPipeline` and `FluxKontextInpaintPipeline` do it (which take
models of 16 latent channels, and ours have 8): from a strength of 0.8 on, and after each step the
latents beside the mask are those of the scene at that noise level. The editing model is told what
to change of the object, and sees the scene. Every method runs on the same scenes, masks and noise,
after a dense run; the difference is the PSNR to the dense result under the mask. Times are those of
the denoising loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..commands import COUNT, as_command
from ..model import kontext, scenes
from ..model.sd3 import LATENT, SIDE
from ..tables import grid
from .drawing import Item, encode, model, packed, timed
from .measures import psnr

AREAS = (0.05, 0.2, 0.5)
SPEEDUPS = (1.5, 2.0, 2.5, 3.0, 4.0)
STEPS, STRENGTH = 28, 0.8
PEAK = 120.0  # dB: equal images have no finite PSNR
SCENES = 20_000_000  # seeds from here on, which training never saw


def methods() -> dict[str, tuple[int, dict[str, Any] | None]]:
    """Name -> steps of the scheduler, and settings of RAS if it is on."""
    few = {f"fewer steps, {steps}": (steps, None) for steps in (20, 14, 11, 9, 7)}
    whole = {f"whole steps, {x:g}x": (STEPS, dict(speedup=x, mask=False)) for x in SPEEDUPS}
    regions = {f"mask, {x:g}x": (STEPS, dict(speedup=x)) for x in SPEEDUPS}
    regions["mask, 2x, K/V held"] = (STEPS, dict(speedup=2.0, kv_correction=False))
    regions["mask, 2x, text reused"] = (STEPS, dict(speedup=2.0, reuse_text=True))
    return few | whole | regions


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark on the command line `argv` (default: the process's own)."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality.inpainting", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="bundled", help='a folder, or "kontext"')
    parser.add_argument("--count", type=COUNT, default=16, help="scenes")
    parser.add_argument("--first", type=COUNT, default=1, help="the number of the first of them")
    parser.add_argument("--batch", type=COUNT, default=8)
    parser.add_argument("--steps", type=COUNT, default=STEPS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    pipe = model(options.model)
    rows = [row for area in AREAS for row in measure(pipe, area, options)]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    titles = "mask | method | speed-up | compute | PSNR under the mask, dB"
    line = "{area:.0%} | {method} | {speedup:.2f} | {compute:.2f} | {psnr:.1f} ± {interval:.1f}"
    print(grid(titles, ([line.format_map(row)] for row in rows)))


def measure(pipe: Any, area: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per method, for masks of one size."""
    times: dict[str, list[float]] = {}
    psnrs: dict[str, list[float]] = {}
    compute: dict[str, float] = {}
    begin = options.first - 1
    end = begin + options.count
    for first in range(begin, end, options.batch):
        seeds = range(first, min(first + options.batch, end))
        work = Work.of(pipe, seeds, area)
        dense, seconds, _ = run(pipe, work, options.steps, None)
        for name, (steps, settings) in methods().items():
            steps = max(2, round(steps * options.steps / STEPS))
            image, taken, ceiling = run(pipe, work, steps, settings)
            values = psnr(image, dense, work.mask).clamp(max=PEAK)
            psnrs.setdefault(name, []).extend(values.tolist())
            times.setdefault(name, []).append(seconds / taken)
            compute[name] = ceiling or options.steps / steps
            print(f"{area:.0%} {name}: {statistics.mean(psnrs[name]):.1f} dB", file=sys.stderr)
    return [
        {
            "area": area,
            "method": name,
            "speedup": statistics.median(times[name]),
            "compute": compute[name],
            "psnr": statistics.mean(values),
            "interval": 1.96 * statistics.pstdev(values) / len(values) ** 0.5,
        }
        for name, values in psnrs.items()
    ]


@dataclasses.dataclass(frozen=True)
class Work:
    """What is to be inpainted: the pipeline's inputs, latents and noise in the form that it steps,
    which of these change, and the masks (B, 1, 256, 256)."""

    call: dict[str, Any]
    latents: Tensor
    noise: Tensor
    change: Tensor
    mask: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, pipe: Any, seeds: range, area: float) -> Work:
        edits = type(pipe).__name__ == "FluxKontextPipeline"
        asked = changes(seeds) if edits else [another(seed) for seed in seeds]
        call = encode(pipe, asked)
        del call["seeds"]
        images = [torch.from_numpy(item.before.draw(SIDE)) for item in asked if item.before]
        latents = pipe.vae.encode(torch.stack(images).movedim(-1, 1) / 127.5 - 1).latent_dist.mean
        latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        noise = [torch.randn(LATENT, generator=torch.Generator().manual_seed(s)) for s in seeds]
        mask = torch.stack([square(place_of(item), area) for item in asked])
        change = torch.nn.functional.adaptive_max_pool2d(mask, LATENT[1:]).expand(-1, *LATENT)
        forms = (packed(pipe, each) for each in (latents, torch.stack(noise), change))
        return cls(call, *forms, mask)


def another(seed: int) -> Item:
    """A scene whose first object is to become another one, told as a caption."""
    scene, other = scenes.sample(SCENES + 2 * seed), scenes.sample(SCENES + 2 * seed + 1)
    old, new = scene.objects[0], other.objects[0]
    words = dict(shape=new.shape, colour=new.colour, texture=new.texture)
    after = dataclasses.replace(
        scene, objects=(dataclasses.replace(old, **words), *scene.objects[1:])
    )
    return Item(seed, after.caption(), after, scene)


def changes(seeds: range) -> list[Item]:
    """Unseen edits of an object that stays where it is, told as instructions."""
    kinds = "shape", "colour", "texture"
    found = (edit for edit in kontext.unseen() if edit.kind in kinds)
    chosen = zip(seeds, islice(found, seeds.start, seeds.stop), strict=True)
    return [Item(seed, edit.instruction(), edit.after, edit.before) for seed, edit in chosen]


def place_of(item: Item) -> tuple[float, float]:
    """Where the object is that is to change."""
    assert item.before is not None and item.scene is not None
    pairs = zip(item.before.objects, item.scene.objects, strict=True)
    changed = (old for old, new in pairs if old != new)
    return scenes.PLACES[next(changed, item.before.objects[0]).place]


def square(centre: tuple[float, float], area: float) -> Tensor:
    """A square mask (1, 256, 256) of that share of the image, moved inside it."""
    side = round(SIDE * area**0.5)
    x, y = (int(np.clip(c * SIDE - side / 2, 0, SIDE - side)) for c in centre)
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, y : y + side, x : x + side] = 1
    return mask


def run(
    pipe: Any, work: Work, steps: int, settings: dict[str, Any] | None
) -> tuple[Tensor, float, float | None]:
    """The images (B, 3, 256, 256) in [0, 1], the seconds, and the ceiling on the speed-up."""
    pipe.scheduler.set_timesteps(steps)
    begin = round((1 - STRENGTH) * steps)

    def at(sigma: Tensor) -> Tensor:
        return torch.lerp(work.latents, work.noise, sigma)

    def keep(pipe: Any, step: int, timestep: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        beside = at(pipe.scheduler.sigmas[step + 1])
        return {"latents": torch.lerp(beside, state["latents"], work.change)}

    if settings is not None:
        mask = work.mask if settings.get("mask", True) else None
        settings = {**settings, "mask": mask}
    return timed(
        pipe,
        settings,
        **{"height": SIDE, "width": SIDE, **work.call},
        latents=at(pipe.scheduler.sigmas[begin]),
        sigmas=torch.linspace(1, 1 / 1000, steps)[begin:].tolist(),
        callback_on_step_end=keep,
        guidance_scale=4.0,
    )


if __name__ == "__main__":
    as_command(main)
