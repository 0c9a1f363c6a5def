"""Tables and pictures, as all benchmarks give them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C", "#B8A900")

NOT_MEASURED = "not measured"  # in a cell
UNMEASURED = "`python -m benchmarks.gpu` puts {} here; it has not been run on a GPU yet."


def cells(entries: Sequence[str]) -> str:
    """A row of a table in Markdown."""
    return "| " + " | ".join(entries) + " |"


def grid(titles: str, rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; ` | ` is between the titles."""
    return "\n".join(map(cells, [[titles], ["---"] * len(titles.split(" | ")), *rows]))


def folder_name(device: str) -> str:
    """A device's name as that of a folder of results."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def save(figure: Figure, path: Path) -> None:
    """A small PNG."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)
