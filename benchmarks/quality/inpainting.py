"""Inpainting, where activity is local: how near to the dense result each method comes, and when.

    python -m benchmarks.quality.inpainting

An object of a drawn scene is to become another one under a square mask of 5, 20 or 50 % of the
image, as `StableDiffusion3InpaintPipeline` does it (which takes models of 16 latent channels alone,
and the bundled one has 8): from a strength of 0.8 on, and after each step the latents beside the
mask are those of the scene at that noise level. Every method runs on the same scenes, masks and
noise, after a dense run; the difference is the PSNR to the dense result under the mask. Times are
those of the denoising loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

import ras

from ..commands import COUNT, as_command
from ..model import scenes
from ..model.sd3 import LATENT, SIDE, load
from ..tables import grid
from .drawing import timed
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
    parser.add_argument("--model", type=Path, default=ras.bundled_model())
    parser.add_argument("--count", type=COUNT, default=16, help="scenes")
    parser.add_argument("--batch", type=COUNT, default=8)
    parser.add_argument("--steps", type=COUNT, default=STEPS)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    pipe = load(options.model)
    rows = [row for area in AREAS for row in measure(pipe, area, options)]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    titles = "mask | method | speed-up | compute | PSNR under the mask, dB"
    line = "{area:.0%} | {method} | {speedup:.2f} | {compute:.2f} | {psnr:.1f} ± {interval:.1f}"
    print(grid(titles, ([line.format_map(row)] for row in rows)))


def measure(
    pipe: StableDiffusion3Pipeline, area: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row per method, for masks of one size."""
    times: dict[str, list[float]] = {}
    psnrs: dict[str, list[float]] = {}
    compute: dict[str, float] = {}
    for first in range(0, options.count, options.batch):
        seeds = range(first, min(first + options.batch, options.count))
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
    """What is to be inpainted: prompts, scenes' latents, noise, masks (B, 1, 256, 256)."""

    prompts: list[str]
    latents: Tensor
    noise: Tensor
    mask: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, pipe: StableDiffusion3Pipeline, seeds: Sequence[int], area: float) -> Work:
        images, masks, prompts = [], [], []
        for seed in seeds:
            scene, other = scenes.sample(SCENES + 2 * seed), scenes.sample(SCENES + 2 * seed + 1)
            old, new = scene.objects[0], other.objects[0]
            words = dict(shape=new.shape, colour=new.colour, texture=new.texture)
            objects = (dataclasses.replace(old, **words), *scene.objects[1:])
            prompts.append(dataclasses.replace(scene, objects=objects).caption())
            images.append(torch.from_numpy(scene.draw(SIDE)).movedim(-1, 0) / 127.5 - 1)
            masks.append(square(scenes.PLACES[old.place], area))
        latents = pipe.vae.encode(torch.stack(images)).latent_dist.mean
        latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        noise = [torch.randn(LATENT, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return cls(prompts, latents, torch.stack(noise), torch.stack(masks))


def square(centre: tuple[float, float], area: float) -> Tensor:
    """A square mask (1, 256, 256) of that share of the image, moved inside it."""
    side = round(SIDE * area**0.5)
    x, y = (int(np.clip(c * SIDE - side / 2, 0, SIDE - side)) for c in centre)
    mask = torch.zeros(1, SIDE, SIDE)
    mask[:, y : y + side, x : x + side] = 1
    return mask


def run(
    pipe: StableDiffusion3Pipeline, work: Work, steps: int, settings: dict[str, Any] | None
) -> tuple[Tensor, float, float | None]:
    """The images (B, 3, 256, 256) in [0, 1], the seconds, and the ceiling on the speed-up."""
    pipe.scheduler.set_timesteps(steps)
    begin = round((1 - STRENGTH) * steps)
    change = torch.nn.functional.adaptive_max_pool2d(work.mask, LATENT[1:])

    def at(sigma: Tensor) -> Tensor:
        return torch.lerp(work.latents, work.noise, sigma)

    def keep(pipe: Any, step: int, timestep: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
        beside = at(pipe.scheduler.sigmas[step + 1])
        return {"latents": torch.lerp(beside, state["latents"], change)}

    if settings is not None:
        mask = work.mask if settings.get("mask", True) else None
        settings = {**settings, "mask": mask}
    return timed(
        pipe,
        settings,
        prompt=work.prompts,
        latents=at(pipe.scheduler.sigmas[begin]),
        sigmas=torch.linspace(1, 1 / 1000, steps)[begin:].tolist(),
        callback_on_step_end=keep,
        guidance_scale=4.0,
        height=SIDE,
        width=SIDE,
    )


if __name__ == "__main__":
    as_command(main)
