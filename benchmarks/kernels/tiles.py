"""The time that attention and projections take with each of some tiles, and their registers.

    python -m benchmarks.kernels.tiles
    python -m benchmarks.kernels.tiles --tiny --out /tmp/rehearsal

Each tile's results are held against those of the rule's own, the first of each table, before it is
timed in a CUDA graph. SD3-medium and Lumina-Next at 1024 x 1024 px, ratios of 0.5 and 0.125, fp16.
Writes tiles.json into a folder of the device's name in `--out`. `--seconds` begins no other tile
after so many. `--tiny` tries the program out on the CPU, where definitions run that have no tiles.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ras_kernels import _library, _project, flash, linear

from ..commands import DURATION, as_command
from ..gpu.goals import Row
from ..speed.timing import Timer, device_name
from ..tables import RESULTS, folder_name, grid
from .jobs import LUMINA, SD3, TINY_SHAPES, Shape, prepare
from .measure import difference, outcome, said

SHAPES = [model(1024, ratio) for model in (SD3, LUMINA) for ratio in (0.5, 0.125)]
SECONDS, TINY = 0.1, 0.001  # of each measurement
# By `flash.Tile` and `_project.Tile`. Those that a chip has no room for say so.
ATTENTION = [(m, n, w, s) for m in (64, 128) for n in (64, 128) for w in (4, 8) for s in (2, 3)]
PROJECTION = [
    (128, 128, 32, 8, 4),
    (128, 128, 64, 4, 3),
    (64, 128, 64, 4, 3),
    (128, 128, 64, 8, 3),
    (256, 128, 64, 8, 3),
]
OPS: dict[str, tuple[ModuleType, list[tuple[int, ...]]]] = {
    "sparse_attention": (flash, ATTENTION),
    "linear_scatter_": (linear, PROJECTION),
    "qkv_scatter_": (linear, PROJECTION),
}
TITLES = "op | shape | rows, columns, (depth,) warps, stages | registers | spills, B | µs | TFLOP/s"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the sweep on the command line `argv` (default: the process's own)."""
    parser = argparse.ArgumentParser(prog="benchmarks.kernels.tiles", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=DURATION, default=math.inf, help="for all, about")
    parser.add_argument("--tiny", action="store_true", help="try the program out on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    if not (options.tiny or torch.cuda.is_available()):
        raise ValueError("there is no GPU here to time tiles on; try the program out with --tiny")
    timer = Timer("cpu" if options.tiny else "cuda", TINY if options.tiny else SECONDS)
    shapes = TINY_SHAPES[:1] if options.tiny else SHAPES
    rows = sweep(timer, shapes, time.perf_counter() + options.seconds)
    device = device_name(str(timer.device))
    folder = options.out / folder_name(device)
    folder.mkdir(parents=True, exist_ok=True)
    results = {"device": device, "tiny": options.tiny, "rows": rows}
    (folder / "tiles.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(grid(TITLES, map(entries, rows)))


def sweep(timer: Timer, shapes: Sequence[Shape], last: float) -> list[Row]:
    """A row for each tile of each op at each shape, begun before `last`."""
    rows = []
    for shape in shapes:
        for op, (module, tiles) in OPS.items():
            job, expected = prepare(op, shape, str(timer.device)), None
            for tile in [None, *tiles]:
                if time.perf_counter() > last:
                    return rows
                row: Row = {"op": op, "shape": shape.label, "tile": tile, "flops": job.flops}
                rows.append(row)
                try:
                    with cut(op, module, tile, row):
                        found = outcome(job.ours)
                        expected = expected or found
                        apart = difference(found, expected)
                        if apart > job.tolerance:
                            raise ValueError(f"differs by {apart:.2g} of the norm")
                        times = timer.graph(job.ours.run)
                        row["us"] = (times or timer.events(job.ours.run, 5))[0]
                except Exception as error:  # such as no room for a tile: others are to be seen, too
                    row["error"] = said(error)
    return rows


@contextmanager
def cut(op: str, module: ModuleType, tile: tuple[int, ...] | None, row: Row) -> Iterator[None]:
    """Have the plans of a `with` block cut the kernel so, and note what the code takes up."""
    launch: Callable[..., Any] = module.launch
    kind = {flash: flash.Tile, linear: _project.Tile}[module]

    def noting(
        kernel: Any, grid: Any, tensors: Sequence[Tensor], *numbers: Any, **named: Any
    ) -> Any:
        run = launch(kernel, grid, tensors, *numbers, **named)
        compiled = kernel.warmup(*tensors, *numbers, grid=grid, **named)  # known by now
        row["registers"], row["spills"] = compiled.n_regs, compiled.n_spills
        return run

    _library.KNOWN[op].clear()
    rule = module.tile if tile is None else lambda *_, **__: kind(*tile)
    try:
        with patch.object(module, "launch", noting), patch.object(module, "tile", rule):
            yield
    finally:
        _library.KNOWN[op].clear()  # for who comes next, by the rule


def entries(row: Row) -> list[str]:
    tile = "by the rule" if row["tile"] is None else ", ".join(map(str, row["tile"]))
    if "us" not in row:
        return [row["op"], row["shape"], tile, row["error"], "", "", ""]
    used = (str(row.get(name, "")) for name in ("registers", "spills"))
    speed = f"{row['flops'] / row['us'] / 1e6:.3g}"
    return [row["op"], row["shape"], tile, *used, f"{row['us']:.1f}", speed]


if __name__ == "__main__":
    as_command(main)
