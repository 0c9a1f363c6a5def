"""Caches of 8 bits: what partial steps over them lose, beside caches in the model's dtype.

    python -m benchmarks.quality.compressed
    python -m benchmarks.quality.compressed --model lumina

Each setting draws the same items three times, with keys, values and their changes kept in the
model's dtype, in int8 and in float8_e4m3fn, on the paper's schedule: 22 of 28 steps are partial.
PSNR in dB is to the run with caches in the model's dtype, and to the dense one; the regions may be
others, as each run chooses them by its own noise. Bytes are those of `ras.stats`, noise included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ras
from ras_kernels import CODES

from ..commands import COUNT, as_command
from ..tables import grid
from .drawing import MODELS, decode, draw, encode, items, model
from .measures import psnr
from .setting import STEPS

PEAK = 120.0  # dB: equal images have no finite PSNR
SETTINGS: dict[str, dict[str, Any]] = {
    "half of the tokens": dict(sample_ratio=0.5),
    "a quarter": dict(sample_ratio=0.25),
}
EDITS = {"what is edited": dict(sample_ratio="edited")}  # where there is a picture to edit


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark on the command line `argv` (default: the process's own)."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality.compressed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="bundled", help=f"a folder, or {', '.join(MODELS)}")
    parser.add_argument("--count", type=COUNT, default=6, help="items to draw")
    parser.add_argument("--steps", type=COUNT, default=STEPS)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(argv)
    options.half = None
    rows = measure(model(options.model), options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    titles = "a partial step computes | caches | bytes | PSNR to the model's dtype | PSNR to dense"
    line = "{setting} | {caches} | {bytes:,} | {nearness} | {psnr:.1f}"
    print(grid(titles, ([line.format_map(row)] for row in rows)))


@torch.no_grad()
def measure(pipe: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each setting and dtype of the caches."""
    asked = items(pipe, options)
    inputs = encode(pipe, asked)
    edits = type(pipe).__name__ == "FluxKontextPipeline"
    dense = decode(pipe, draw(pipe, inputs, options.steps))
    rows = []
    for name, settings in (SETTINGS | EDITS if edits else SETTINGS).items():
        own: Tensor | None = None
        for dtype in (None, *CODES):
            with ras.enabled(pipe, cache_dtype=dtype, **settings):
                images = decode(pipe, draw(pipe, inputs, options.steps))
                told = ras.stats(pipe)
            assert told.steps_sparse, f"{name}: no step is partial"
            near = None if own is None else mean(psnr(images, own))
            own = images if own is None else own
            rows.append(
                {
                    "setting": name,
                    "caches": str(pipe.transformer.dtype if dtype is None else dtype)[6:],
                    "bytes": told.cache_bytes,
                    "nearness": "" if near is None else f"{near:.1f}",
                    "psnr": mean(psnr(images, dense)),
                }
            )
            print(*rows[-1].values(), file=sys.stderr)
    return rows


def mean(values: Tensor) -> float:
    return statistics.mean(values.clamp(max=PEAK).tolist())


if __name__ == "__main__":
    as_command(main)
