"""What `benchmarks.gpu` has measured, as tables of the documentation and as plots.

    python -m benchmarks.gpu.table

Writes the tables anew into `docs/results.md` and `ras_kernels/README.md`, from the JSON of all
folders of `benchmarks/results` that have some. Where none has, a sentence says so in the table's
place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ..commands import as_command
from ..speed.attention import BY_CUDNN
from ..speed.families import PUBLISHED, Family
from ..tables import COLOURS, NOT_MEASURED, RESULTS, ROOT, UNMEASURED, grid, save
from . import goals

READMES = ROOT / "docs" / "results.md", ROOT / "ras_kernels" / "README.md"
RATIOS = (0.75, 0.5, 0.25, 0.125)
PLANNED = 2.0  # the speed-up of the library's own plan
DTYPES = {"float16": "fp16", "bfloat16": "bf16"}
MODES = ("eager", "compiled")
TITLES = (
    "model | dtype | setting | eager | compiled blocks | ceiling | peak memory, dense / RAS | "
    "paper, A100"
)
LEGEND = (
    "*Ratio* is the paper's schedule, `ras.enable(pipe)` the default; speed-ups are medians with\n"
    "95 % intervals, the ceiling is arithmetic, memory that without text encoders and\n"
    "autoencoder, the last column the paper's:"
)
COUNTS = ("passed", "failed", "skipped")
WIDEST = 60  # letters of an error in a cell

Row = dict[str, Any]
Parts = dict[str, Row]  # records by the names of the parts


def main() -> None:
    """Renew the tables, and all plots."""
    for folder in measured(RESULTS):
        plots(folder)
    for readme in READMES:
        update(readme, RESULTS)


def update(readme: Path, folders: Path) -> None:
    """Put tables in the place of those between a page's comments, `<!-- name -->` around each."""
    text = readme.read_text(encoding="utf-8")
    places = [name for name in TABLES if mark(name) in text]
    if not places:
        raise ValueError(f"{readme} has no place for a table: {mark('gpu table')} twice")
    for name in places:
        before, _, after = text.split(mark(name))
        text = mark(name).join([before, f"\n\n{TABLES[name](folders)}\n\n", after])
    readme.write_text(text, encoding="utf-8")


def mark(name: str) -> str:
    return f"<!-- {name} -->"


def block(folders: Path) -> str:
    """A table per GPU that has a folder there; if none has, how to make one."""
    tables = [f"{heading(folder)}\n\n{table(read(folder))}" for folder in measured(folders)]
    return "\n\n".join([LEGEND, *tables]) if tables else UNMEASURED.format("tables of speed")


TABLES = {"gpu table": block, "kernel goals": goals.table}


def measured(folders: Path) -> list[Path]:
    return sorted(path.parents[1] for path in folders.glob("*/parts/environment.json"))


def read(folder: Path) -> Parts:
    """The records of all parts that were run."""
    paths = sorted((folder / "parts").glob("*.json"))
    records = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    return {record["part"]: record for record in records if "part" in record}


def results(record: Row) -> Row:
    """What a part has found, if it was run and got that far."""
    return record.get("results") or {}


def row_of(record: Row, setting: str) -> Row | None:
    """What `benchmarks.speed.end_to_end` has of a setting."""
    rows = results(record).get("rows", [])
    return next((row for row in rows if row["setting"] == setting), None)


def part_name(family: str, dtype: str, mode: str) -> str:
    return f"{family}-{dtype}-{mode}"


# --- the table ------------------------------------------------------------------------------------


def heading(folder: Path) -> str:
    """Where it was measured, with what, and how the tests went there."""
    path = folder / "parts" / "environment.json"
    machine, parts = json.loads(path.read_text(encoding="utf-8")), read(folder)
    rounds = max((results(record).get("rounds", 0) for record in parts.values()), default=0)
    said = (
        f"**{machine['device']}**, driver {machine.get('driver')}, CUDA or ROCm "
        f"{machine['CUDA or ROCm']}, torch {machine['torch']}, triton {machine['triton']}, "
        f"diffusers {machine['diffusers']}: `python -m {machine['command']}`, {rounds} rounds at "
        f"most. Tests there: {tests(parts.get('tests', {}))}."
    )
    return f"{said} At toy sizes: the figures say nothing." if machine["tiny"] else said


def tests(record: Row) -> str:
    counts = results(record)
    told = ", ".join(f"{counts[name]} {name}" for name in COUNTS) if counts else NOT_MEASURED
    return f"{told} ({record['error']})" if record.get("error") else told


def table(parts: Parts) -> str:
    """A row per model, dtype and setting, in Markdown."""
    lines = (
        entries
        for name, family in PUBLISHED.items()
        for dtype in DTYPES
        for entries in (
            *(line(name, family, dtype, ratio, parts) for ratio in (*RATIOS, None)),
            by_cudnn(name, family, dtype, parts),
        )
    )
    return grid(TITLES, lines)


def by_cudnn(name: str, family: Family, dtype: str, parts: Parts) -> list[str]:
    """The cells of dense runs by cuDNN's attention, beside those by the one that PyTorch takes."""
    eager = parts.get(part_name(name, dtype, MODES[0]), {})
    taken = results(eager).get("attentions", {}).get("dense")
    setting = BY_CUDNN + (f", else by {' and '.join(taken)}" if taken else "")
    found = speedup(eager, BY_CUDNN), "", "", memory(eager, BY_CUDNN), ""
    return [family.title, DTYPES[dtype], setting, *found]


def line(name: str, family: Family, dtype: str, ratio: float | None, parts: Parts) -> list[str]:
    """The cells of the paper's schedule with this ratio, or if None of the library's own plan."""
    setting = f"speedup={PLANNED:g}" if ratio is None else f"{ratio:g}"
    eager, compiled = (parts.get(part_name(name, dtype, mode), {}) for mode in MODES)
    published = family.paper.get(ratio) if ratio and dtype == family.dtype else None
    return [
        family.title,
        DTYPES[dtype],
        "`ras.enable(pipe)`" if ratio is None else f"ratio {setting}",
        speedup(eager, setting),
        speedup(compiled, setting),
        f"{family.ceiling(ratio) if ratio else PLANNED:.2f}",
        memory(eager, setting),
        f"{published:.2f}" if published else "",
    ]


def speedup(record: Row, setting: str) -> str:
    if record.get("error"):
        return f"failed: {record['error'][:WIDEST]}".replace("|", "/")
    row = row_of(record, setting)
    if row is None:
        return NOT_MEASURED
    low, high = row["interval"]
    return f"{row['speedup']:.2f} ({low:.2f} to {high:.2f})"


def memory(record: Row, setting: str) -> str:
    row = row_of(record, setting)
    if row is None or row["peak_bytes"] is None:
        return NOT_MEASURED
    dense = results(record)["dense"]["peak_bytes"]
    return f"{dense / 1e9:.2f} / {row['peak_bytes'] / 1e9:.2f} GB"


# --- the plots ------------------------------------------------------------------------------------


def plots(folder: Path) -> None:
    """A plot of each family that has something to show."""
    parts = read(folder)
    for name in PUBLISHED:
        lines = {}
        for dtype in DTYPES:
            for mode in MODES:
                rows = [
                    row_of(parts.get(part_name(name, dtype, mode), {}), f"{r:g}") for r in RATIOS
                ]
                lines[dtype, mode] = [(r, row["speedup"]) for r, row in zip(RATIOS, rows) if row]
        if any(lines.values()):
            save(drawn(name, lines), folder / f"{name}.png")


def drawn(name: str, lines: dict[tuple[str, str], list[tuple[float, float]]]) -> Figure:
    """Speed-up against ratio: a line for each dtype and mode, the ceiling, the paper's points."""
    family = PUBLISHED[name]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(RATIOS, [family.ceiling(r) for r in RATIOS], "k--", label="ceiling by tokens")
    for (dtype, mode), points in lines.items():
        if points:
            colour, style = COLOURS[list(DTYPES).index(dtype)], {"eager": "o-", "compiled": "s:"}
            axes.plot(*zip(*points), style[mode], color=colour, label=f"{DTYPES[dtype]}, {mode}")
    axes.plot(*zip(*family.paper.items()), "k*", markersize=12, label="paper, A100")
    axes.set(xscale="log", xlabel="ratio", ylabel="speed-up", title=f"{family.title}, 1024²")
    axes.set_xticks(RATIOS, [f"{ratio:g}" for ratio in RATIOS])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


if __name__ == "__main__":
    as_command(main)
