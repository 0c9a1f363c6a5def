"""Time each op of `ras_kernels` beside what plain PyTorch does for the same job.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --quick
    python -m benchmarks.kernels --chip A100

Jobs and shapes are those of `benchmarks.kernels.jobs`: SD3-medium and Lumina-Next at 1024 x 1024
px with ratios of 0.5, 0.25 and 0.125, SD3 at 512 and 2048, fp16, a batch of two for guidance.
Results of all ways are compared before they are timed. Each run starts with a cold L2 cache; given
are the median and the quartiles between CUDA events, the time within a CUDA graph, and the host's
time for a call. GB/s and TFLOP/s count what a job has to move and to multiply at least, in the
graph's time, and are set against ceilings measured on the same device: PyTorch's copy of a large
tensor and its product of large matrices. What a way writes may stay in the cache, so that small
jobs can come out above the copy.

Writes kernels.json, table.md and a plot for each op into a folder of the device's name in `--out`.
`--quick` measures each for a shorter time, and `--seconds` begins no other job after so many: those
of SD3 at 1024 px come first. `--tiny` tries the program out on the CPU at toy sizes.

Without a GPU nothing is measured. Then the table gives the jobs' floors on `--chip`, which are
arithmetic with its data sheet, and what the compiled code of the kernels takes up there.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from ras_kernels import _triton

from ..commands import DURATION, as_command
from ..gpu.goals import OURS, Row, best
from ..speed.timing import Timer, Times
from ..tables import COLOURS, cells, folder_name, save
from .chips import CHIPS, floor_us
from .jobs import JOBS, SHAPES, TINY_SHAPES, prepare
from .measure import measure

SECONDS, QUICK, TINY = 0.3, 0.05, 0.001  # of each measurement


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark on the command line `argv` (default: the process's own)."""
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="finish in under four minutes")
    parser.add_argument("--seconds", type=DURATION, default=math.inf, help="for all jobs, about")
    parser.add_argument("--tiny", action="store_true", help="try the program out on the CPU")
    parser.add_argument("--chip", choices=CHIPS, default="H100", help="for floors without a GPU")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    options = parser.parse_args(argv)
    if options.tiny:
        timer = Timer("cpu", TINY)
    elif torch.cuda.is_available():
        timer = Timer("cuda", QUICK if options.quick else SECONDS)
    else:
        print(known(options.chip))
        return
    shapes = TINY_SHAPES if options.tiny else SHAPES
    results = measure(timer, shapes, tiny=options.tiny, seconds=options.seconds)
    folder = options.out / folder_name(results["device"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    (folder / "table.md").write_text(table(results), encoding="utf-8")
    for op in JOBS:
        plot(op, results, folder / f"{op.strip('_')}.png")
    print(table(results))


# --- what it says ---------------------------------------------------------------------------------

TITLES = (
    "shape",
    "way",
    "events, µs (quartiles)",
    "graph, µs",
    "host, µs",
    "GB/s (of the copy)",
    "TFLOP/s (of the product)",
    "floor, µs",
)


def table(results: dict[str, Any]) -> str:
    """All rows, op by op, in Markdown."""
    lines = [
        f"# Ops on {results['device']}",
        "",
        f"torch {results['torch']}, CUDA or ROCm {results['cuda']}, triton {results['triton']}, "
        f"{results['dtype']}. Ceilings, measured: a copy at {results['copy_gb_s']:.0f} GB/s, a "
        f"product of matrices at {results['matmul_tflop_s']:.3g} TFLOP/s. The floor is the time at "
        "these.",
    ]
    if results["tiny"]:
        lines += ["", "**A trial of the program at toy sizes: the figures say nothing.**"]
    if results["left_out"]:
        lines += ["", f"The time was up before {results['left_out']} jobs, which are not measured."]
    for op in JOBS:
        lines += ["", f"## {op}", "", headline(JOBS[op].__doc__), ""]
        lines += [cells([*TITLES]), cells(["---"] * len(TITLES))]
        lines += [line(row, results) for row in results["rows"] if row["op"] == op]
    return "\n".join(lines) + "\n"


def headline(text: str | None) -> str:
    return (text or "").partition("\n")[0]


def line(row: Row, results: dict[str, Any]) -> str:
    """One way; of what failed, why."""
    name = f"**{row['way']}**" if row["way"] == OURS else row["way"]
    if "events_us" not in row:
        return cells([row["shape"], name, row["error"], *[""] * (len(TITLES) - 3)])
    events, graph = Times(*row["events_us"]), row.get("graph_us")
    rate, speed = row["bytes"] / best(row) / 1e3, row["flops"] / best(row) / 1e6
    product = f"{speed:.3g} ({speed / results['matmul_tflop_s']:.0%})"
    return cells(
        [
            row["shape"],
            name,
            f"{events.median:.1f} ({events.low:.1f} to {events.high:.1f})",
            f"{graph[0]:.1f}" if graph else row.get("error", ""),
            f"{row['host_us']:.1f}" if "host_us" in row else "",
            f"{rate:.0f} ({rate / results['copy_gb_s']:.0%})",
            product if row["flops"] else "",
            f"{measured_floor(row, results):.1f}",
        ]
    )


def measured_floor(row: Row, results: dict[str, Any]) -> float:
    return floor_us(row["bytes"], row["flops"], results["copy_gb_s"], results["matmul_tflop_s"])


def plot(op: str, results: dict[str, Any], path: Path) -> None:
    """Bars of time, a colour for each way and a group for each shape, over the shapes' floors."""
    rows = [row for row in results["rows"] if row["op"] == op and "events_us" in row]
    if not rows:
        return
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    width = 0.8 / len(ways)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, (way, colour) in enumerate(zip(ways, ["black", *COLOURS])):
        own = [row for row in rows if row["way"] == way]
        places = [shapes.index(row["shape"]) - 0.4 + (i + 0.5) * width for row in own]
        axes.bar(places, [best(row) for row in own], width, label=way, color=colour)
    for i, shape in enumerate(shapes):
        floor = measured_floor(next(row for row in rows if row["shape"] == shape), results)
        label = "floor at the measured ceilings" if i == 0 else None
        axes.hlines(floor, i - 0.45, i + 0.45, color="#D55E00", linewidth=2, label=label)
    axes.set_xticks(range(len(shapes)), [shape.replace(", ", "\n", 1) for shape in shapes])
    axes.set(yscale="log", ylabel="µs", title=f"{op} on {results['device']}")
    axes.grid(axis="y", alpha=0.25)
    figure.legend(loc="outside right upper", frameon=False)
    save(figure, path)


# --- without one ----------------------------------------------------------------------------------


def known(name: str) -> str:
    """Floors and compiled code for the chip of this name, under headings that say what they are."""
    chip = CHIPS[name]
    lines = [
        "# Nothing on this page is measured: there is no GPU here",
        "",
        f"## Floors on {chip.name}, from its data sheet, not measured",
        "",
        f"The greater of the bytes over {chip.bandwidth:.0f} GB/s and the operations over "
        f"{chip.flops:.0f} TFLOP/s. No kernel is faster than that, and none need come near.",
        "",
        cells(["op", "shape", "MB", "GFLOP", "floor, µs (arithmetic)"]),
        cells(["---"] * 5),
        *floors(name),
        "",
        f"## Compiled code for {chip.target}, not run",
        "",
        "A sample; `python -m benchmarks.kernels.compiled` has all variants. Occupancy is "
        "arithmetic.",
        "",
        *code(name),
    ]
    return "\n".join(lines)


def floors(name: str) -> Iterator[str]:
    chip = CHIPS[name]
    for op in JOBS:
        for shape in SHAPES:
            job = prepare(op, shape, "meta")
            least = floor_us(job.bytes, job.flops, chip.bandwidth, chip.flops)
            products = f"{job.flops / 1e9:.1f}" if job.flops else ""
            yield cells([op, shape.label, f"{job.bytes / 1e6:.2f}", products, f"{least:.2f}"])


def code(name: str) -> list[str]:
    """Rows of `benchmarks.kernels.compiled` for a sample of the launches."""
    if _triton.triton is None or _triton.INTERPRETED:
        return ["Triton, which would compile it, is missing or set to interpret."]
    from . import compiled, variants

    chosen = variants.sample(variants.launches(CHIPS[name].architecture))
    return [*compiled.heading(), *(compiled.line(row) for row in compiled.check(chosen, name))]


if __name__ == "__main__":
    as_command(main)
