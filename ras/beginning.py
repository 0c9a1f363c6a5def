"""How a run begins, or goes on otherwise: its tokens' layout, what is masked, and its plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .callers import calling_pipeline
from .clock import Clock, read_clock
from .config import EDITED, RASConfig
from .fingerprint import of_model, of_run
from .follow import can_follow, may_follow
from .layout import Layout
from .masks import masked_regions
from .mount import Mount
from .others import cache_on
from .plan import Reuse, RunPlan
from .policy.carry import Carry
from .policy.planner import FEW, plan_run, without_partial_steps
from .run import Run
from .scope import Settings, asks_for_partial_steps
from .stats import Tally
from .warned import Warned


def layout_of(
    mount: Mount, inputs: Mapping[str, Any], settings: Settings, *, by_picture: bool, warn: Warned
) -> Layout:
    """The layout of a call's tokens; without a grid, one of whole steps.

    Some families' are told by tensors alone, which have to be read.
    """
    family = mount.family
    if not family.regions:
        return Layout()
    spread = mount.obstacle_of_ranks(by_picture=by_picture)
    obstacle = spread or family.obstacle(mount.transformer, inputs)
    layout = Layout() if obstacle else family.layout(mount.transformer, inputs)
    if not layout.grid and (spread or asks_for_partial_steps(settings)):
        told = obstacle or "its tokens are not a grid"
        warn("layout", f"there are no partial steps in this run: {told}")
    return layout


def masked(settings: Settings, own: Tensor | None, layout: Layout) -> Tensor | None:
    """The regions under the mask, `(S, k)`, or None without one.

    `own` is an inpainting pipeline's, which counts where none is given.
    """
    config, mask = settings
    if mask is None:
        mask = own
    if mask is None or mask is False or not layout.grid:
        return None
    return masked_regions(mask, layout.grid, config.mask_margin)


def surroundings(config: RASConfig, layout: Layout, scheduler: Any) -> tuple[tuple[str, Any], ...]:
    """What plans may have been made for."""
    if not (config.plan and config.plan.made_for):
        return ()
    guidance = getattr(calling_pipeline(), "guidance_scale", None)
    return tuple({**of_model({}, scheduler), **of_run(layout.grid, guidance)}.items())


def plan(
    config: RASConfig, clock: Clock, layout: Layout, regions: Tensor | None, scheduler: Any
) -> RunPlan:
    """The plan of a run, `regions` of which, `(S, k)`, are under a mask."""
    count = None if regions is None else regions.shape[1]
    return plan_run(config, clock, layout, count, surroundings(config, layout, scheduler))


def begin_run(
    settings: Settings,
    mounts: Sequence[Mount],
    scheduler: Any,
    layout: Layout,
    batch: int,
    timestep: Tensor | None,
    regions: Tensor | None,
    warn: Warned,
) -> Run:
    """A run of a scheduler that has new timesteps.

    Args:
        settings: Of it.
        mounts: Of the transformers that it may call.
        scheduler, layout, batch, timestep: As the first call has them.
        regions: `(S, k)`, those under a mask, or None.
        warn: Of what does not go as it is asked for.
    """
    config, given = settings
    clock = read_clock(scheduler, timestep)
    if regions is not None and batch % len(regions):
        raise ValueError(
            f"mask is of {len(regions)} samples and the run of {batch}, guidance's copies "
            "included; give one mask, or one for each sample"
        )
    planned = plan(config, clock, layout, regions, scheduler)
    regions = None if regions is None else regions.to(scheduler.timesteps.device)
    run = Run(scheduler.timesteps, clock, planned, regions, Tally(layout, batch))
    looks = given is None and regions is None
    run.follows_edit = looks and may_follow(planned, clock)
    if looks and config.sample_ratio == EDITED and not can_follow(planned, clock):
        warn(
            "edit",
            "there is no picture of the image's shape among the model's inputs, or nothing to "
            "tell what is edited by, so that steps are whole",
        )
    run.regions = planned.partial or run.follows_edit
    if planned.reuse is Reuse.MEASURED:
        run.carry = Carry(1.0 if clock.steps >= FEW else 0.0)
    _look_around(run, mounts, warn)
    return run


def _look_around(run: Run, mounts: Sequence[Mount], warn: Warned) -> None:
    """Have a run be as dense as what others have put on the transformers since asks for."""
    caches = list(filter(None, (cache_on(mount.transformer) for mount in mounts)))
    if caches and not run.planned.dense:
        run.observed = False
        warn(
            "cache",
            f"{caches[0]} decides by itself what is computed, so that the run is dense; take "
            "it off, or ras.disable",
        )
    if run.regions:
        changes = filter(None, (mount.change_of_rows() for mount in mounts))
        run.obstacle = next(changes, None)


def begin_late(run: Run, scheduler: Any) -> None:
    """Plan anew a run that has left out the first timesteps, as its first step tells.

    Nobody has told the scheduler before.
    """
    run.clock = read_clock(scheduler, begin=run.first_index)
    config, layout = run.planned.config, run.planned.layout
    run.planned = plan(config, run.clock, layout, run.masked, scheduler)
    run.regions = run.regions or run.planned.partial


def by_whole_steps(run: Run, scheduler: Any, warn: Warned) -> None:
    """Plan a run anew that cannot keep its keys and values."""
    config = run.planned.config
    here = surroundings(config, run.planned.layout, scheduler)
    run.planned = without_partial_steps(run.planned, run.clock, here)
    run.regions, run.edit = False, None
    warn(
        "memory",
        f"keys and values take more than max_cache_bytes={config.max_cache_bytes}, so that steps "
        "are whole",
    )


def may_be_partial(run: Run, mount: Mount, warn: Warned) -> bool:
    """Whether nothing on a transformer stands against partial steps."""
    if not mount.family.regions:
        return False
    obstacle = mount.obstacle()
    if obstacle is not None:
        warn(
            "processor",
            f"partial steps are dense while a layer's attention processor is {obstacle}, which RAS "
            "cannot stand in for",
        )
    elif run.obstacle is not None:
        warn(
            "rows",
            f"partial steps are dense with {run.obstacle}, as it may want the rows of all tokens",
        )
    return obstacle is None and run.obstacle is None
