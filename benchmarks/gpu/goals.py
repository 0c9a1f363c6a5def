"""What the kernels are to reach on an H100, and what they reached, by `benchmarks.kernels`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..kernels.jobs.job import COPY
from ..kernels.jobs.layers import ALONE
from ..tables import NOT_MEASURED, UNMEASURED, grid

OURS = "ras_kernels"
SD3, LUMINA = "SD3-medium, 1024²", "Lumina-Next, 1024²"

Row = dict[str, Any]
Results = dict[str, Any]


def best(row: Row) -> float:
    """The median in the graph, in µs, or where there is none between events."""
    return (row.get("graph_us") or row["events_us"])[0]


def beside(model: str, ways: str, *ops: str) -> Callable[[Results], Iterable[float]]:
    """How many times as fast as the best of some other ways each op is, at each shape."""

    def ratios(results: Results) -> Iterable[float]:
        for op in ops:
            found = rows(results, op, model)
            for row in found:
                others = [r for r in found if r["shape"] == row["shape"] and ways in r["way"]]
                if row["way"] == OURS and others:
                    yield min(map(best, others)) / best(row)

    return ratios


def rows(results: Results, op: str, model: str) -> list[Row]:
    """The ways that were timed."""
    return [
        row
        for row in results["rows"]
        if row["op"] == op and row["shape"].startswith(model) and "events_us" in row
    ]


class Goal(NamedTuple):
    """At each shape of a model at 1024 x 1024 px, at least so much."""

    text: str
    least: float
    figures: Callable[[Results], Iterable[float]]


GOALS = (
    Goal(
        "gather and scatter, times as fast as a `copy_` of as many rows",
        0.95,
        beside(SD3, COPY, "gather_tokens", "scatter_tokens_"),
    ),
    Goal(
        "projections of keys and values with the scatter, times as fast as cuBLAS without it",
        1,
        beside(SD3, ALONE, "linear_scatter_"),
    ),
    Goal(
        "attention, head size 64, times as fast as the best SDPA with the concatenation it needs",
        1,
        beside(SD3, "cat, SDPA", "sparse_attention"),
    ),
    Goal(
        "attention, head size 72 with grouped queries, times as fast as the best SDPA",
        1.2,
        beside(LUMINA, "SDPA", "sparse_attention"),
    ),
    Goal(
        "selection of 4,096 regions, times as fast as `topk` and `sort`",
        4,
        beside(SD3, "topk, sort", "select_lowest"),
    ),
)


def table(folders: Path) -> str:
    """A row per goal and a column per GPU that has results there: the least and the most found."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(folders.glob("*/kernels.json"))]
    if not found:
        return UNMEASURED.format("what the kernels reach")
    rows = (
        [goal.text, f"{goal.least:g}", *(span([*goal.figures(results)]) for results in found)]
        for goal in GOALS
    )
    devices = (results["device"] for results in found)
    return grid(" | ".join(["goal on an H100", "at least", *devices]), rows)


def span(figures: list[float]) -> str:
    return f"{min(figures):.2f} to {max(figures):.2f}" if figures else NOT_MEASURED
