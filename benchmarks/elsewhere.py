"""The default plan away from where its constants were chosen: other schedules and settings.

    python -m benchmarks.elsewhere

The constants of `ras.planner` were chosen on the even prompts of the ruler with 28 steps of Euler,
shift 3 and guidance 4. Here each of these is another, one at a time, on the odd prompts; RAS is
compared with as many fewer steps of the same scheduler as cost the same tokens, by PSNR to the
dense image of that setting. Times are of the denoising loop, each run after a dense one.

`--model` takes another model, such as `benchmarks.train --family lumina` makes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from torch import Tensor

import ras

from .measures import psnr
from .model import load
from .pareto import decode, halved, unseen

SPEEDUPS = (1.5, 2.0, 2.5)


@dataclass(frozen=True)
class Place:
    """What a run is like."""

    name: str
    steps: int = 28
    shift: float = 3.0
    guidance: float = 4.0
    scheduler: Any = FlowMatchEulerDiscreteScheduler


PLACES = (
    Place("as chosen"),
    Place("20 steps", steps=20),
    Place("50 steps", steps=50),
    Place("shift 1", shift=1.0),
    Place("guidance 1", guidance=1.0),
    Place("guidance 7", guidance=7.0),
    Place("Heun, 14 steps", steps=14, scheduler=FlowMatchHeunDiscreteScheduler),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark on the command line `argv` (default: the process's own)."""
    parser = argparse.ArgumentParser(prog="benchmarks.elsewhere", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, default=ras.bundled_model())
    parser.add_argument("--count", type=int, default=32, help="prompts, both halves together")
    parser.add_argument("--half", choices=("a", "b"), default="b")
    parser.add_argument("--places", nargs="+", help="only those whose names hold one of these")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(argv)
    pipe = load(options.model)
    pipe.set_progress_bar_config(disable=True)
    captions = [scene.caption() for scene in unseen(options)]
    seeds = halved(list(range(options.count)), options.half)
    names = options.places or [""]
    places = [place for place in PLACES if any(name in place.name for name in names)]
    rows = [row for place in places for row in measure(pipe, place, captions, seeds)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    print("| setting | speed-up asked | method | speed-up | PSNR, dB |")
    print("| --- | --- | --- | --- | --- |")
    for row in rows:
        print(
            f"| {row['place']} | {row['asked']:g} | {row['method']} | {row['speedup']:.2f} | "
            f"{row['psnr']:.1f} ± {row['interval']:.1f} |"
        )


@torch.no_grad()
def measure(
    pipe: DiffusionPipeline, place: Place, captions: list[str], seeds: list[int]
) -> list[dict[str, Any]]:
    """A row for each speed-up and method."""
    pipe.scheduler = place.scheduler(shift=place.shift)
    rows = []
    for asked in SPEEDUPS:
        fewer = max(2, round(place.steps / asked))
        reference, dense = run(pipe, place, captions, seeds, place.steps, None)
        for method, steps, speedup in (
            (f"fewer steps, {fewer}", fewer, None),
            ("RAS", place.steps, asked),
        ):
            images, seconds = run(pipe, place, captions, seeds, steps, speedup)
            values = psnr(images, reference).tolist()
            rows.append(
                {
                    "place": place.name,
                    "asked": asked,
                    "method": method,
                    "speedup": dense / seconds,
                    "psnr": statistics.mean(values),
                    "interval": 1.96 * statistics.stdev(values) / len(values) ** 0.5,
                }
            )
            print(f"{place.name} {asked:g} {method}: {rows[-1]['psnr']:.1f} dB", file=sys.stderr)
    return rows


def run(
    pipe: DiffusionPipeline,
    place: Place,
    captions: list[str],
    seeds: list[int],
    steps: int,
    speedup: float | None,
) -> tuple[Tensor, float]:
    """The images (B, 3, H, W) in [0, 1], and the seconds of the loop and the encoding."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with nullcontext() if speedup is None else ras.enabled(pipe, speedup=speedup):
        start = time.perf_counter()
        latents = pipe(
            captions,
            generator=generators,
            num_inference_steps=steps,
            guidance_scale=place.guidance,
            max_sequence_length=0,
            output_type="latent",
        ).images
        seconds = time.perf_counter() - start
    return decode(pipe, latents), seconds


if __name__ == "__main__":
    main()
