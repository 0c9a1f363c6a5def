"""Our settings for the ruler, and what they are made of: plans, and each part of the policy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ras

from .setting import STEPS, Setting

SPEEDUPS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)
CALIBRATED = (1.5, 1.75, 2.0, 2.5, 3.0)
ABLATED = 2.5  # the speed-up at which the parts are taken out one by one
DENSE = 0, 1, 5, 9, 14, 19, 23, 26  # with the next, of as many tokens as that
QUARTERS = 3, 7, 11, 12, 16, 17, 21, 22, 24, 25
LESSONS = 6  # images to learn from
WHOLE = "whole steps, searched", "whole steps, regular"  # what regions have to beat
WHOLE_STEPS = Path(__file__).parent / "plans"  # where they are not the bundled ones


def settings(model: Path, calibrate: Callable[..., None]) -> list[Setting]:
    """Plans for speed-ups, learnt ones, calibrated ones, and whole steps alone.

    Args:
        model: The pipeline's folder, which may hold calibrated plans of its own.
        calibrate: Makes a run of as many prompts that are not among those to be judged.
    """
    found = [_ours("RAS", f"{speedup:g}x", speedup=speedup) for speedup in SPEEDUPS]
    lessons: dict[float, ras.RASConfig] = {}  # by speed-up, once they are needed

    def learnt(pipe: Any, speedup: float) -> Any:
        if speedup not in lessons:
            with ras.enabled(pipe, speedup=speedup):
                calibrate(pipe, LESSONS, call=partial(ras.learn, pipe))
                lessons[speedup] = ras.stats(pipe).config
        return ras.enabled(pipe, lessons[speedup])

    found += [
        Setting("RAS, learnt", f"{speedup:g}x", STEPS, partial(learnt, speedup=speedup))
        for speedup in SPEEDUPS
    ]
    searched, regular = WHOLE
    plans = [model / "plans" / f"{speedup:g}x.json" for speedup in CALIBRATED]
    plans = [plan for plan in plans if plan.exists()]
    found += [_ours("RAS, calibrated", plan.stem, plan=plan) for plan in plans]
    if model == ras.bundled_model():
        found += [_ours(searched, plan.stem, plan=of_whole_steps(plan)) for plan in plans]
    for every in (2, 3):
        shares = [float(step < 2 or step % every == 1) for step in range(STEPS)]
        found.append(_ours(regular, f"1 in {every}", plan=shares, extrapolation=0.0))
    return found


def of_whole_steps(plan: Path) -> Path:
    """What the search finds without partial steps: a bundled plan, or another if that has some."""
    other = WHOLE_STEPS / plan.name
    return other if has_partial_steps(ras.Plan.load(plan)) and other.exists() else plan


def has_partial_steps(plan: ras.Plan) -> bool:
    return any(0 < share < 1 for share in plan.shares)


def ablations() -> list[Setting]:
    """The policy without each of its parts, and partial steps in the place of dense ones."""
    quarters = dict(plan=[1.0 if i in DENSE else 0.25 * (i in QUARTERS) for i in range(STEPS)])
    return [
        _ours("ablation", label, **change)
        for label, change in {
            "RAS": dict(speedup=ABLATED),
            "noise held": dict(speedup=ABLATED, extrapolation=0.0),
            "quarter steps": quarters,
            "quarter steps, std": {**quarters, "metric": "std"},
            "quarter steps, l2norm": {**quarters, "metric": "l2norm"},
            "quarter steps, noise held": {**quarters, "extrapolation": 0.0},
            "quarter steps, K/V held": {**quarters, "kv_correction": False},
            "quarter steps, text reused": {**quarters, "reuse_text": True},
        }.items()
    ]


def _ours(method: str, label: str, **config: Any) -> Setting:
    settings = ras.RASConfig(**config)
    return Setting(method, label, STEPS, lambda pipe: ras.enabled(pipe, settings))
