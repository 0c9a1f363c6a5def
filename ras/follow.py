"""A run that edits a picture: what it changes, seen step by step, and the plan by that."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor

from .clock import Clock
from .config import EDITED, RASConfig
from .family import Family
from .layout import Layout
from .masks import MaskWatch
from .plan import RunPlan
from .policy.edits import Edit
from .policy.planner import mask_pays, plan_run
from .references import original
from .run import Run
from .warned import Warned


def can_follow(planned: RunPlan, clock: Clock) -> bool:
    """Whether a run can tell what it changes of a picture."""
    return planned.layout.picture is not None and clock.prediction == "flow"


def may_follow(planned: RunPlan, clock: Clock) -> bool:
    """Whether a run is to compute what it changes of a picture, and leaves out anything."""
    config = planned.config
    asked = config.plan is None and config.sample_ratio == EDITED
    return asked and can_follow(planned, clock) and (config.speedup is None or not planned.dense)


def begin_edit(
    run: Run, family: Family, layout: Layout, latents: Any, masks: MaskWatch | None, warn: Warned
) -> None:
    """Have a run know the picture that it edits, if it is asked to, by its first call's latents.

    `masks` has the picture outside of a mask, which some models get in channels of the latents.
    """
    beside, config = None, run.planned.config
    if masks is not None:
        beside, masks.picture = masks.picture, None  # which nobody needs any more
    if not (run.follows_edit or config.preserve):
        return
    run.edit = _edit(run, family, layout, latents, beside)
    run.follows_edit = run.follows_edit and run.edit is not None
    if run.edit is None and config.preserve:
        warn(
            "preserve",
            "there is no picture of the image's shape among the model's inputs that could be "
            "preserved",
        )


def _edit(
    run: Run, family: Family, layout: Layout, latents: Any, beside: Tensor | None
) -> Edit | None:
    """What an edit is told by; None without a picture."""
    found = original(latents, layout)
    if found is None and run.masked is not None and beside is not None:
        wide = isinstance(latents, Tensor) and latents[0].numel() > beside[0].numel()
        found = beside if wide else None
    packed = None if found is None else family.pack(found, layout.grid)
    if packed is None:
        return None
    edit = Edit(packed[0], layout.grid, run.planned.config.mask_margin)
    if run.masked is not None and len(packed[0]) % len(run.masked) == 0:
        edit.fix(run.masked.repeat(len(packed[0]) // len(run.masked), 1))
    return edit


def follow(
    run: Run,
    edit: Edit,
    config: RASConfig,
    here: tuple[tuple[str, Any], ...],
    noise: Tensor,
    sample: Any,
    sigma: float,
) -> None:
    """See what a step changes of a picture, and plan the rest of the run by what was seen before.

    Args:
        run, edit: Under way.
        config, here: See `ras.policy.planner.plan_run`.
        noise: Guided, as the scheduler gets it.
        sample: What it was predicted of, if that was a step of all tokens, else None.
        sigma: The step's noise level.
    """
    layout = run.planned.layout
    if run.follows_edit and edit.learn_count() and not run.over:
        done = run.planned.plan.shares[: run.step + (run.stage % run.clock.order > 0)]
        count = edit.count if mask_pays(config, layout, edit.count) else None
        run.planned = plan_run(config, run.clock, layout, count, here, done)
    if run.masked is not None or run.family is None:
        return
    if isinstance(sample, Tensor):
        found = [run.family.pack(part, layout.grid) for part in (sample, noise)]
        tokens = [part[0] for part in found if part is not None]
        if len(tokens) == 2 and all(map(edit.fits, tokens)):
            edit.observe(tokens[0], tokens[1], sigma)
    if run.follows_edit and run.selection is not None and edit.count is not None:
        pays = mask_pays(config, layout, edit.count)
        run.selection.masked = edit.choose() if pays else None


def preserve(run: Run, edit: Edit, latents: Tensor) -> None:
    """Put the picture's latents in place where nothing is edited, as the run ends."""
    packed = None if run.family is None else run.family.pack(latents, run.planned.layout.grid)
    if packed is not None and edit.fits(packed[0]):
        kept = edit.preserve(packed[0])
        latents.copy_(rearrange(kept, "b n (p c) -> b n (c p)", p=packed[1]))
