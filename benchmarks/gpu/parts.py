"""What is run on a GPU, each part with its command, its time and how to read what it writes."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from ..speed.families import IMAGE_TOKENS, LAYERS, PUBLISHED
from ..tables import ROOT
from .table import DTYPES, MODES, PLANNED, RATIOS, part_name

WORKERS = 8  # processes of tests, where pytest-xdist is installed
# Seconds of a pipeline's part, and those after which it begins no other round.
LIMITS = {"eager": (540, 400), "compiled": (540, 400)}
QUICK_LIMITS = {"eager": (55, 28), "compiled": (110, 85)}

Row = dict[str, Any]


class Part(NamedTuple):
    """One process.

    Attributes:
        command: What follows the interpreter and decides what is measured.
        seconds: Its share of the time.
        target: An argument more, that says where to write.
        made: The file that it writes, of which
        read: makes results, and an error if they tell of one.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    target: str
    made: Path
    read: Callable[[Path], tuple[Row, str | None]]


def parts(options: argparse.Namespace, folder: Path) -> list[Part]:
    """All of them, those first that tell the most: what is right, then which tiles are best."""
    chosen = [(name, dtype) for name in PUBLISHED for dtype in DTYPES]
    if options.quick or options.tiny:
        chosen = [(name, family.dtype) for name, family in PUBLISHED.items()]
    eager, compiled = (
        [pipeline(options, folder, family, dtype, mode) for family, dtype in chosen]
        for mode in MODES
    )
    first = [tests(options, folder), tiles(options, folder), kernels(options, folder)]
    return [*first, *eager, *compiled]


def pipeline(options: argparse.Namespace, folder: Path, family: str, dtype: str, mode: str) -> Part:
    """A family's whole runs, dense and with RAS."""
    command = ["-m", "benchmarks.speed.end_to_end", f"--family={family}", f"--dtype={dtype}"]
    command += ["--guidance", f"--speedups={PLANNED:g}"]
    limit, last_round = (QUICK_LIMITS if options.quick else LIMITS)[mode]
    if options.tiny:
        command += ["--layers=2", "--heads=4", "--head-dim=8", "--image-tokens=16"]
        command += ["--text-tokens=8", "--steps=6", "--ratios=0.5", "--pairs=1", "--device=cpu"]
    else:
        command += [f"--layers={LAYERS}", f"--image-tokens={IMAGE_TOKENS}"]
        command += ["--ratios", *map(str, RATIOS), f"--seconds={last_round}"]
        command.append(f"--pairs={5 if options.quick else 9}")
    if mode == "compiled":
        command.append(f"--compile={'eager' if options.tiny else 'inductor'}")
    name = part_name(family, dtype, mode)
    made = folder / "parts" / f"{name}.made"
    return Part(name, tuple(command), limit, f"--out={made}", made, read_pipeline)


def tiles(options: argparse.Namespace, folder: Path) -> Part:
    """Attention and projections by other tiles than their rules'."""
    limit, last_tile = (60, 45) if options.quick else (240, 200)
    command = ["-m", "benchmarks.kernels.tiles", f"--seconds={last_tile}"]
    if options.tiny:
        command.append("--tiny")
    made = folder / "tiles.json"
    return Part("tiles", tuple(command), limit, f"--out={options.out}", made, read_tiles)


def kernels(options: argparse.Namespace, folder: Path) -> Part:
    command, limit = ["-m", "benchmarks.kernels"], 540
    if options.quick:
        command, limit = [*command, "--quick", "--seconds=80"], 110
    if options.tiny:
        command.append("--tiny")
    made = folder / "kernels.json"
    return Part("kernels", tuple(command), limit, f"--out={options.out}", made, read_kernels)


def tests(options: argparse.Namespace, folder: Path) -> Part:
    """Those tests that make their tensors on a GPU where there is one."""
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
        if "support.operands import" in path.read_text(encoding="utf-8")
    ]
    if options.tiny:
        files = [name for name in files if "rows" in name]
    command = ["-m", "pytest", "-q", "-rs", "-o", "addopts=", "-p", "no:cacheprovider", *files]
    if importlib.util.find_spec("xdist") and not options.tiny:
        command.append(f"--numprocesses={WORKERS}")
    made = folder / "parts" / "tests.xml"
    limit = 65 if options.quick else 540
    return Part("tests", tuple(command), limit, f"--junitxml={made}", made, read_tests)


# --- what parts write -----------------------------------------------------------------------------


def read_pipeline(made: Path) -> tuple[Row, str | None]:
    results = json.loads(made.read_text(encoding="utf-8"))
    made.unlink()  # the part's record has it
    return results, None


def read_kernels(made: Path) -> tuple[Row, str | None]:
    """How many ways were timed, and which op of ours was not."""
    results = json.loads(made.read_text(encoding="utf-8"))
    missed = [row for row in results["rows"] if "events_us" not in row]
    ours = [row for row in missed if row["way"] == "ras_kernels"]
    counts = {"ways timed": len(results["rows"]) - len(missed), "left out": results["left_out"]}
    if not ours:
        return counts, None
    first = f"{ours[0]['op']} at {ours[0]['shape']}: {ours[0]['error']}"
    return counts, first + (f", and {len(ours) - 1} more" if len(ours) > 1 else "")


def read_tiles(made: Path) -> tuple[Row, str | None]:
    """How many tiles were timed, and whether one by the rule was not."""
    rows = json.loads(made.read_text(encoding="utf-8"))["rows"]
    missed = [row for row in rows if row["tile"] is None and "us" not in row]
    counts = {"tiles timed": sum("us" in row for row in rows)}
    return counts, f"{missed[0]['op']}: {missed[0]['error']}" if missed else None


def read_tests(made: Path) -> tuple[Row, str | None]:
    """Counts, and the first test that failed. One that was interrupted has no name."""
    cases = [case for case in ElementTree.parse(made).iter("testcase") if case.get("name")]
    made.unlink()
    failed = [
        case for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    counts: Row = {"failed": len(failed), "skipped": skipped}
    counts["passed"] = len(cases) - len(failed) - skipped
    counts["names of failed"] = [f"{case.get('classname')}.{case.get('name')}" for case in failed]
    if failed:
        return counts, f"{len(failed)} of {len(cases)} tests, {counts['names of failed'][0]} first"
    return counts, None
