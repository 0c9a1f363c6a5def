"""Plans as strips: a bar for each step, as high as the share of the tokens that it computes."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..plan import Plan, RunPlan, as_plan
from .maps import colours
from .panels import GREY, INK, PAPER

BAR, WIDEST = 14, 1024  # pixels, of a step and of a strip
HEIGHT = 48


def plan_strip(plan: Plan | RunPlan) -> Image.Image:
    """Draw a plan as a strip, from the first step on the left to the last.

    A dense step is a light bar of full height, a partial one is as high as its share of the tokens
    and the darker the smaller that is, and a skipped one is a grey line at the foot.

    Args:
        plan: A plan: `ras.plan(pipe, 28)`, `ras.stats(pipe).plan`, a plan's file or a list of
            shares.

    Returns:
        An RGB image, 48 pixels high.

    Raises:
        TypeError: Something else.
        ValueError: A plan that is not valid, see `ras.Plan`.
        OSError: A file that cannot be read.
    """
    shares = (plan.plan if isinstance(plan, RunPlan) else as_plan(plan)).shares
    return bars(shares, max(min(BAR * len(shares), WIDEST), len(shares)), HEIGHT)


def bars(shares: Sequence[float], width: int, height: int, at: int | None = None) -> Image.Image:
    """A bar for each share in so many pixels; that of the step `at` is marked from above."""
    strip = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(strip)
    top, floor = 4, height - 3
    for step, share in enumerate(shares):
        left, right = (round(width * each / len(shares)) for each in (step, step + 1))
        right = max(left, right - (3 if right - left > 6 else 1))
        draw.rectangle((left, floor + 1, right, height - 2), GREY)
        if share:
            colour = tuple(map(int, colours(share)))
            rise = round((floor - top) * share)
            draw.rectangle((left, floor - rise, right, height - 2), colour)
        if step == at:
            draw.rectangle((left, 0, right, 2), INK)
    return strip
