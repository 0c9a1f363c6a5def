"""What the kernels are to reach on an H100, and what they reached, by `benchmarks.kernels`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..kernels.jobs.layers import ALONE
from ..tables import NOT_MEASURED, UNMEASURED, grid

OURS = "ras_kernels"
SD3, LUMINA = "SD3-medium, 1024²", "Lumina-Next, 1024²"

Row = dict[str, Any]
Results = dict[str, Any]


def best(row: Row) -> float:
    """The median in the graph, in µs, or where there is none between events."""
    return (row.get("graph_us") or row["events_us"])[0]


def of_copy(results: Results) -> Iterable[float]:
    """The share of the copy's bandwidth at which rows are gathered and scattered."""
    for op in ("gather_tokens", "scatter_tokens_"):
        for row in rows(results, op, SD3):
            if row["way"] == OURS:
                yield row["bytes"] / best(row) / 1e3 / results["copy_gb_s"]


def beside(op: str, model: str, ways: str) -> Callable[[Results], Iterable[float]]:
    """How many times as fast as the best of some other ways an op is, at each shape."""

    def ratios(results: Results) -> Iterable[float]:
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
    Goal("gather and scatter, share of the measured copy's bandwidth", 0.85, of_copy),
    Goal(
        "projections of keys and values with the scatter, times as fast as cuBLAS without it",
        1,
        beside("linear_scatter_", SD3, ALONE),
    ),
    Goal(
        "attention, head size 64, times as fast as the best SDPA with the concatenation it needs",
        1,
        beside("sparse_attention", SD3, "cat, SDPA"),
    ),
    Goal(
        "attention, head size 72 with grouped queries, times as fast as the best SDPA",
        1.2,
        beside("sparse_attention", LUMINA, "SDPA"),
    ),
    Goal(
        "selection of 4,096 regions, times as fast as `topk` and `sort`",
        4,
        beside("select_lowest", SD3, "topk, sort"),
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
