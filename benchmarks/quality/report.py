"""What the ruler has measured, as a table, as a comparison at equal time and as a plot.

Quality is given with normal 95 % intervals of its mean over the images; a speed-up is the median
over the batches, with an interval that holds it with at least 95 % confidence (order statistics;
the whole range if there are fewer than 6 batches).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from ..speed.timing import median_interval
from ..tables import COLOURS, grid, save
from .judge import ATTRIBUTES

TARGETS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0)  # speed-ups at which methods are compared
AS_NEAR = (24, 20, 17, 14, 12, 10)  # steps of the plain scheduler whose distance is matched
PLAIN = "fewer steps"  # the method that everything has to beat
MARKERS = "os^vDPX<"
CEILING = 65.0  # dB, the top of the plot: above, no difference can be seen

Row = dict[str, Any]
Cost = Callable[[Row], float]


def write(results: Row, out: Path) -> str:
    """Write table.md and plot.png into the folder `out`, and return the table."""
    rows = results["rows"]
    parts = [heading(results), table(results)]
    parts += [comparison(rows, cost) for cost in costs(results)]
    if rows[0]["limit"]:
        parts += [comparison(rows, compute, "limit"), at_equal_distance(rows)]
    if results["options"]["half"] is None and len(results["rows"][0]["psnr"]) > 2:
        parts.append(on_half_b(results["rows"]))
    text = "\n\n".join(parts) + "\n"
    (out / "table.md").write_text(text, encoding="utf-8")
    plot(results["rows"], out / "plot.png")
    return text


def heading(results: Row) -> str:
    """Where and on what it was measured, and how steady the machine was."""
    machine, options = results["machine"], results["options"]
    images = len(results["rows"][0]["ssim"])
    spread = statistics.median(max(runs) / min(runs) - 1 for runs in results["dense"])
    lines = [
        f"{images} of {len(results['prompts'])} prompts in {len(results['dense'])} batches"
        + (f" (half {options['half']})" if options["half"] else "")
        + f"; {machine['device']}, {machine['threads']} threads, {options['dtype']}, "
        f"torch {machine['torch']}, diffusers {machine['diffusers']}, "
        f"cache-dit {machine['cache-dit']}, ras {machine['ras']}.",
        "Not timed: cost is compute."
        if options["untimed"]
        else f"The three dense runs of a batch differ by {spread:.1%} (median over the batches).",
        *(f"{note}." for note in results["notes"]),
    ]
    return "\n".join(lines)


def table(results: Row) -> str:
    """A row per setting, the dense one first."""
    objects = np.array(results["objects"][: len(results["rows"][0]["ssim"])])
    untimed = results["options"]["untimed"]
    each = "T multiply-adds / image" if untimed else "s / image"
    titles = ["method", "setting", "speed-up (95 %)", "compute", each, "PSNR, dB"]
    titles += ["to the limit, dB", "SSIM"]
    if len(objects):
        titles += [*(f"{name} right, %" for name in ATTRIBUTES), "Fréchet"]
    lines = []
    for row in results["rows"]:
        low, high = median_interval(row["speedup"])
        entries = [
            f"**{row['method']}**" if row["ours"] else row["method"],
            row["label"],
            f"{speed(row):.2f} ({low:.2f} to {high:.2f})",
            f"{row['compute']:.2f}",
            f"{statistics.median(row['seconds']):.3f}",
            "" if row["method"] == "dense" else with_interval(row["psnr"], 2),
            with_interval(row["limit"], 2) if row["limit"] else "",
            "" if row["method"] == "dense" else with_interval(row["ssim"], 4),
        ]
        if len(objects):
            entries += [share(right, objects) for right in np.array(row["right"]).T]
            entries.append("" if row["frechet"] is None else f"{row['frechet']:.3f}")
        lines.append(entries)
    return grid(" | ".join(titles), lines)


def costs(results: Row) -> list[Cost]:
    """What methods are compared at equal values of."""
    return [compute] if results["options"]["untimed"] else [speed, compute]


def comparison(rows: list[Row], cost: Cost | None = None, quality: str = "psnr") -> str:
    """Each method's PSNR at equal cost, and what ours gains on the others.

    A method's line is linear between its settings, in the logarithm of the cost, without those
    that another of its own beats in both; beyond the line's ends the cell is blank. Intervals of
    gains are those of the differences image by image.
    """
    cost = cost or speed
    lines: list[list[str]] = []
    found = {
        name: [at_speed(line, target, cost, quality) for target in TARGETS]
        for name, line in by_method(rows, cost)
    }
    own = {row["method"] for row in rows if row["ours"]}
    for name, values in found.items():
        title = f"**{name}**" if name in own else name
        lines.append([title, *("" if v is None else f"{v.mean():.2f}" for v in values)])
    others = {name: values for name, values in found.items() if name not in own}
    for name in found:
        if name in own:
            plain = others.get(PLAIN, [None] * len(TARGETS))
            gains = [gain(mine, other) for mine, other in zip(found[name], plain)]
            lines.append([f"**{name}** over {PLAIN}", *gains])
            gains = [
                gain_on_best(mine, {other: values[i] for other, values in others.items()})
                for i, mine in enumerate(found[name])
            ]
            lines.append([f"**{name}** over the best other", *gains])
    titles = " | ".join(["method", *(f"{target:g}×" for target in TARGETS)])
    what = "PSNR, dB" if quality == "psnr" else "PSNR to the limit, dB"
    return f"{what}, at equal {'wall time' if cost is speed else 'compute'}:\n\n" + grid(
        titles, lines
    )


def at_equal_distance(rows: list[Row]) -> str:
    """How many times cheaper, by compute, each method is as near to the limit as plain steps."""
    plain = {row["steps"]: row for row in rows if row["method"] == PLAIN}
    wanted = [steps for steps in AS_NEAR if steps in plain]
    lines = []
    for name, line in by_method(rows, compute):
        entries = []
        for steps in wanted:
            cheapest = at_quality(line, float(np.mean(plain[steps]["limit"])))
            entries.append("" if cheapest is None else f"{cheapest / compute(plain[steps]):.2f}×")
        lines.append([f"**{name}**" if line[0]["ours"] else name, *entries])
    titles = " | ".join(["method", *(f"{steps} steps" for steps in wanted)])
    return "Cheaper at an equal distance from the limit than so many plain steps:\n\n" + grid(
        titles, lines
    )


def at_quality(line: list[Row], target: float) -> float | None:
    """The greatest saving of compute at which a method's line is as near to the limit, in dB."""
    kept = front(line, "limit")
    ends = [(compute(row), float(np.mean(row["limit"]))) for row in kept]
    if not ends or target > ends[0][1]:
        return None
    for (slow, high), (fast, low) in pairwise(ends):
        if low <= target <= high:
            weight = (high - target) / (high - low)
            return math.exp((1 - weight) * math.log(slow) + weight * math.log(fast))
    return None


def on_half_b(rows: list[Row]) -> str:
    """What ours gains, on the odd prompts alone, which no constant was chosen on."""
    odd = [row | {"psnr": row["psnr"][1::2]} for row in rows]
    lines = comparison(odd).splitlines()[2:]
    gains = [line for line in lines if " over " in line]
    return "\n".join(["The gains on half b alone:", "", *lines[:2], *gains])


def by_method(rows: list[Row], cost: Cost | None = None) -> list[tuple[str, list[Row]]]:
    """The lines of the plot: rows of one method, from the slowest to the fastest."""
    cost = cost or speed
    names = dict.fromkeys(row["method"] for row in rows if row["method"] != "dense")
    return [
        (name, sorted((row for row in rows if row["method"] == name), key=cost)) for name in names
    ]


def speed(row: Row) -> float:
    return statistics.median(row["speedup"])


def compute(row: Row) -> float:
    return row["compute"]


def at_speed(
    line: list[Row], target: float, cost: Cost | None = None, quality: str = "psnr"
) -> np.ndarray | None:
    """The PSNR of each image, (N,), at a speed-up on a method's line; None beyond its ends."""
    cost = cost or speed
    for slow, fast in pairwise(front(line, quality)):
        if cost(slow) <= target <= cost(fast):
            width = math.log(cost(fast) / cost(slow))
            weight = math.log(target / cost(slow)) / width if width else 0.0
            return (1 - weight) * np.array(slow[quality]) + weight * np.array(fast[quality])
    return None


def front(line: list[Row], quality: str = "psnr") -> list[Row]:
    """The settings that no faster one of the method matches in its mean PSNR."""
    means = [np.mean(row[quality]) for row in line]
    return [row for i, row in enumerate(line) if all(means[i] > mean for mean in means[i + 1 :])]


def gain(mine: np.ndarray | None, other: np.ndarray | None) -> str:
    if mine is None or other is None:
        return ""
    mean, error = mean_and_error(mine - other)
    return f"{mean:+.2f} ± {error:.2f}"


def gain_on_best(mine: np.ndarray | None, others: dict[str, np.ndarray | None]) -> str:
    known = {name: values for name, values in others.items() if values is not None}
    if mine is None or not known:
        return ""
    best = max(known, key=lambda name: known[name].mean())
    return f"{gain(mine, known[best])} ({best})"


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean, and half of its normal 95 % interval."""
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), 1.96 * float(values.std(ddof=1)) / math.sqrt(len(values))


def with_interval(values: list[float], digits: int) -> str:
    mean, error = mean_and_error(np.array(values))
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def share(right: np.ndarray, objects: np.ndarray) -> str:
    """The share of all objects that are right, in per cent; a ratio of means over the images."""
    ratio = right.sum() / objects.sum()
    _, error = mean_and_error((right - ratio * objects) / objects.mean())
    return f"{100 * ratio:.1f} ± {100 * error:.1f}"


def plot(rows: list[Row], path: Path) -> None:
    """PSNR against the measured speed-up and against compute: a line a method, ours on top.

    Where the limit was drawn, PSNR to that against compute too; dense has one of its own there.
    """
    views = [
        (speed, "speed-up, measured", "psnr", "PSNR to the dense image, dB"),
        (compute, "dense compute over the method's", "psnr", "PSNR to the dense image, dB"),
    ]
    if rows[0]["limit"]:
        views.append((compute, views[1][1], "limit", "PSNR to the equation's limit, dB"))
    figure = Figure(figsize=(6.5 * len(views), 5.5), layout="constrained")
    panels = figure.subplots(1, len(views))
    top = max(np.mean(row["psnr"]) for row in rows if row["method"] != "dense")
    fastest = max(max(speed(row), row["compute"]) for row in rows)
    for axes, (measure, title, quality, unit) in zip(panels, views):
        for (name, line), look in zip(by_method(rows), looks(rows)):
            points = sorted((measure(row), np.mean(row[quality])) for row in line)
            axes.plot(*zip(*points), label=name, **look)
        axes.axvline(1, color="black", linewidth=1, linestyle=":")
        if quality == "limit":
            axes.plot(1, np.mean(rows[0]["limit"]), "k*", markersize=13)
        else:
            axes.plot(1, 0.985, "k*", markersize=13, transform=axes.get_xaxis_transform())
            axes.annotate("dense", (1, 0.97), (8, 0), axes.get_xaxis_transform(), "offset points")
            axes.set_ylim(top=min(top + 3, CEILING))
        axes.set(ylabel=unit, xlabel=title, xscale="log", xlim=(0.95, 1.04 * max(fastest, 1.5)))
        axes.xaxis.set_major_locator(FixedLocator([1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6]))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}×"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25)
    panels[1].sharey(panels[0])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    save(figure, path)


def looks(rows: list[Row]) -> Iterator[dict[str, Any]]:
    """How each method's line is drawn; no two others are alike, in grey or to the colour-blind."""
    own = other = 0
    for _, line in by_method(rows):
        if line[0]["ours"]:
            look = dict(color="black", linewidth=3.2, markersize=9, zorder=4)
            yield look | dict(marker="o*"[own % 2], linestyle="-" if own < 2 else "--")
            own += 1
        else:
            look = dict(color=COLOURS[other % len(COLOURS)], linewidth=1.5, markersize=5, zorder=3)
            style = "-" if other < len(COLOURS) else "--"
            yield look | dict(marker=MARKERS[other % len(MARKERS)], linestyle=style)
            other += 1
