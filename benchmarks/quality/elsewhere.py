"""The default plan away from where its constants were chosen: other schedules and settings.

    python -m benchmarks.quality.elsewhere

The constants of `ras.clock` were chosen on the even prompts of the ruler with 28 steps of Euler,
shift 3 and guidance 4. Here each of these is another, one at a time, on the odd prompts; RAS is
compared with as many fewer steps of the same scheduler as cost the same tokens, by PSNR to the
dense image of that setting. Times are of the denoising loop, each run after a dense one.

`--model` takes another model, such as `benchmarks.model.lumina` makes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
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

from ..commands import COUNT, as_command
from ..model.sd3 import load
from ..tables import grid
from .drawing import items, timed
from .measures import psnr
from .report import mean_and_error

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
    Place("6 steps", steps=6),
    Place("8 steps", steps=8),
    Place("20 steps", steps=20),
    Place("50 steps", steps=50),
    Place("shift 1", shift=1.0),
    Place("guidance 1", guidance=1.0),
    Place("guidance 7", guidance=7.0),
    Place("Heun, 14 steps", steps=14, scheduler=FlowMatchHeunDiscreteScheduler),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark on the command line `argv` (default: the process's own)."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality.elsewhere", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, default=ras.bundled_model())
    parser.add_argument("--count", type=COUNT, default=32, help="prompts, both halves together")
    parser.add_argument("--half", choices=("a", "b"), default="b")
    parser.add_argument("--places", nargs="+", help="only those whose names hold one of these")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(argv)
    pipe = load(options.model)
    asked = items(pipe, options)
    captions, seeds = [item.text for item in asked], [item.seed for item in asked]
    names = options.places or [""]
    places = [place for place in PLACES if any(name in place.name for name in names)]
    rows = [row for place in places for row in measure(pipe, place, captions, seeds)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    titles = "setting | speed-up asked | method | speed-up | PSNR, dB"
    line = "{place} | {asked:g} | {method} | {speedup:.2f} | {psnr:.1f} ± {interval:.1f}"
    print(grid(titles, ([line.format_map(row)] for row in rows)))


@torch.no_grad()
def measure(
    pipe: DiffusionPipeline, place: Place, captions: list[str], seeds: list[int]
) -> list[dict[str, Any]]:
    """A row for each speed-up and method."""
    pipe.scheduler = place.scheduler(shift=place.shift)

    def run(steps: int, settings: dict[str, Any] | None) -> tuple[Tensor, float]:
        """The images, and the seconds of the loop and the encoding."""
        images, seconds, _ = timed(
            pipe,
            settings,
            prompt=captions,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=steps,
            guidance_scale=place.guidance,
        )
        return images, seconds

    rows = []
    for asked in SPEEDUPS:
        fewer = max(2, round(place.steps / asked))
        reference, dense = run(place.steps, None)
        for method, steps, settings in (
            (f"fewer steps, {fewer}", fewer, None),
            ("RAS", place.steps, {"speedup": asked}),
        ):
            images, seconds = run(steps, settings)
            mean, error = mean_and_error(psnr(images, reference).double().numpy())
            rows.append(
                {
                    "place": place.name,
                    "asked": asked,
                    "method": method,
                    "speedup": dense / seconds,
                    "psnr": mean,
                    "interval": error,
                }
            )
            print(f"{place.name} {asked:g} {method}: {rows[-1]['psnr']:.1f} dB", file=sys.stderr)
    return rows


if __name__ == "__main__":
    as_command(main)
