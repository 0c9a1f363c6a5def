"""The default plan, and one that is learnt, on a model that no plan's constant was chosen on.

    python -m benchmarks.quality.photos
    python -m benchmarks.quality.photos --guidance 1 --count 16

The model is that of `benchmarks.model.photos`: natural images, 1,024 tokens, class-conditional.
RAS is compared with as many fewer steps of the same scheduler as cost the same tokens, by PSNR to
the dense image of 28 steps. What is learnt is so from one dense run of another class and seed.
Times are not measured: on a CPU they go with the tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ras

from ..commands import COUNT, SPEEDUP, STEP, as_command
from ..model import photos
from ..tables import grid
from .measures import psnr
from .report import mean_and_error
from .setting import STEPS

WEIGHTS = Path(photos.__file__).parent / "weights" / "photos"
SPEEDUPS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
PEAK = 100.0  # dB: equal images have no finite PSNR


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark on the command line `argv` (default: the process's own)."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality.photos", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="the transformer's folder")
    parser.add_argument("--count", type=COUNT, default=8, help="images, of one class each")
    parser.add_argument("--steps", type=COUNT, default=STEPS)
    parser.add_argument("--guidance", type=STEP, nargs="+", default=[4, 1])
    parser.add_argument("--speedups", type=SPEEDUP, nargs="+", default=SPEEDUPS)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(argv)
    pipe = photos.load(options.model)
    rows = [row for guidance in options.guidance for row in measure(pipe, guidance, options)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    titles = "guidance | speed-up asked | method | PSNR, dB"
    line = "{guidance} | {asked:g} | {method} | {psnr:.1f} ± {interval:.1f}"
    print(grid(titles, ([line.format_map(row)] for row in rows)))


def measure(pipe: Any, guidance: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each speed-up and method."""
    every = len(photos.NAMES) / options.count
    classes = [int(i * every) % len(photos.NAMES) for i in range(options.count)]

    def run(steps: int, labels: list[int], seed: int, settings: dict[str, Any] | None) -> Tensor:
        with nullcontext() if settings is None else ras.enabled(pipe, **settings):
            return draw(pipe, labels, seed, steps, guidance)

    reference = run(options.steps, classes, 0, None)
    with ras.enabled(pipe):
        ras.learn(pipe)
        draw(pipe, [(classes[0] + 1) % len(photos.NAMES)], 1000, options.steps, guidance)
        learned = ras.stats(pipe).config.learned
    rows = []
    for asked in options.speedups:
        fewer = max(2, round(options.steps / asked))
        for method, steps, settings in (
            (f"fewer steps, {fewer}", fewer, None),
            ("RAS", options.steps, {"speedup": asked}),
            ("RAS, learnt", options.steps, {"speedup": asked, "learned": learned}),
        ):
            found = psnr(run(steps, classes, 0, settings), reference).clamp(max=PEAK)
            mean, error = mean_and_error(found.double().numpy())
            row = {"guidance": guidance, "asked": asked, "method": method, "psnr": mean}
            rows.append(row | {"interval": error})
            print(f"guidance {guidance}, {asked:g}x, {method}: {mean:.1f} dB", file=sys.stderr)
    return rows


@torch.no_grad()
def draw(pipe: Any, classes: list[int], seed: int, steps: int, guidance: int) -> Tensor:
    """Images of these classes, one from each seed on: (B, 3, 64, 64) float32 in [0, 1]."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(classes))]
    images = pipe(
        classes,
        guidance_scale=float(guidance),
        generator=generators if len(generators) > 1 else generators[0],
        num_inference_steps=steps,
        output_type="np",
    ).images
    return torch.from_numpy(images).movedim(-1, 1)


if __name__ == "__main__":
    as_command(main)
