"""What notebooks show of plans and runs: small pictures and a table."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

from ..plan import DENSE, SKIP, Plan
from ..stats import Stats
from .film import plane
from .maps import heat_map
from .strip import plan_strip

SIDE = 128  # pixels of a map's longer side


def of_plan(plan: Plan, *lines: str) -> str:
    """A plan's strip, its note and how many steps are of which kind, and further lines."""
    dense, skipped = plan.shares.count(DENSE), plan.shares.count(SKIP)
    steps = len(plan.shares)
    kinds = f"{steps} steps: {dense} dense, {steps - dense - skipped} partial, {skipped} skipped"
    told = "<br>".join(escape(line) for line in (plan.note, kinds, *lines) if line)
    return f"<div>{_image(plan_strip(plan), 'the plan, a bar for each step')}<p>{told}</p></div>"


def of_stats(stats: Stats) -> str:
    """The plan's strip, how often each region was computed, of the first sample, and a table."""
    pictures = "" if stats.plan is None else _image(plan_strip(stats.plan), "the plan")
    if stats.region_counts is not None:
        counts = plane(stats.region_counts[:1])[0]
        rows, columns = counts.shape
        scale = SIDE / max(rows, columns)
        size = max(round(columns * scale), 1), max(round(rows * scale), 1)
        pictures += " " + _image(heat_map(counts, size), "how often each region was computed")
    cells = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in stats._rows.items()
    )
    return f"<div>{pictures}<table>{cells}</table></div>"


def _image(image: Image.Image, title: str) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{title}" title="{title}">'
