"""Plans to try on a model: those of least modelled error, and what is near a plan."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np

from ..clock import carried, position
from ..config import RASConfig
from ..layout import Layout
from ..plan import DENSE, SKIP, Plan, dense_steps
from .error_model import ErrorModel
from .planner import plan_speedup, plan_whole

FACTORS = -0.5, 3.0  # the least and the greatest extrapolation of a step


def first_plans(
    model: ErrorModel,
    usual: Plan,
    speedup: float,
    sigmas: Sequence[float],
    layout: Layout,
    config: RASConfig,
) -> tuple[Plan, ...]:
    """The usual plan and the model's, without factors of their own and with the model's."""
    if layout.grid:
        best = plan_speedup(model, speedup, layout, reuse_text=config.reuse_text)
    else:
        best = plan_whole(model, speedup)
    fitted = (Plan(plan.shares, factors(model, sigmas, plan.shares)) for plan in (usual, best))
    return tuple(dict.fromkeys([usual, Plan(best.shares), *fitted]))


def factors(
    model: ErrorModel, sigmas: Sequence[float], shares: Sequence[float]
) -> tuple[float, ...]:
    """The extrapolation of each step that amounts to the model's gain there (see `ras.output`)."""
    found = [0.0] * len(shares)
    dense = dense_steps(shares)
    for before, last, end in zip(dense, dense[1:], [*dense[2:], len(shares)], strict=False):
        steps = np.arange(last + 1, end)
        behind = abs(position(sigmas[last]) - position(sigmas[before]))
        gains = model.gains(before, last, steps)
        for step, gain in zip(steps.tolist(), gains, strict=True):
            ratio = abs(position(sigmas[step]) - position(sigmas[last])) / max(behind, 1e-9)
            found[step] = _factor(float(gain), ratio)
    return tuple(found)


def _factor(gain: float, ratio: float) -> float:
    """The extrapolation whose gain after `ratio` times the last gap is `gain`: by bisection."""
    low, high = FACTORS
    for _ in range(30):
        middle = (low + high) / 2
        if carried(ratio, 1.0, middle) < gain:
            low = middle
        else:
            high = middle
    return round(middle, 4)


def neighbours(
    model: ErrorModel,
    shares: tuple[float, ...],
    sizes: Sequence[float],
    layout: Layout,
    *,
    reuse_text: bool,
) -> list[tuple[float, ...]]:
    """Plans one move away at the same cost, those of least modelled error first.

    A move takes a dense or partial step to a skipped one nearby, or makes partial steps of a
    dense one; two of the first kind come for one of the second.
    """
    n = len(shares)
    moved: set[tuple[float, ...]] = set()
    split: set[tuple[float, ...]] = set()
    for step in range(1, n):
        if shares[step] == SKIP:
            continue
        for other in range(max(1, step - 3), min(n, step + 4)):
            if shares[other] == SKIP:
                plan = list(shares)
                plan[step], plan[other] = SKIP, shares[step]
                moved.add(tuple(plan))
        if shares[step] < DENSE:
            continue
        for size in sizes:
            text = 0 if reuse_text else layout.text
            walking = size * (layout.tokens + layout.under(layout.tokens))
            count = round(layout.sequence / (walking + text))
            plan = list(shares)
            plan[step] = size
            free = sorted(
                (s for s in range(1, n) if shares[s] == SKIP), key=lambda s: abs(s - step)
            )
            for other in free[: count - 1]:
                plan[other] = size
            split.add(tuple(plan))

    def error(plan: tuple[float, ...]) -> float:
        return model.error(dense_steps(plan))

    moves, splits = sorted(moved, key=error), sorted(split, key=error)
    triples = zip_longest(moves[::2], moves[1::2], splits)
    return [plan for triple in triples for plan in triple if plan is not None]
