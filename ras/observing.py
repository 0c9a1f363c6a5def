"""What a step of the scheduler shows of a run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .beginning import surroundings
from .follow import follow
from .policy.selection import Selection
from .run import Run
from .warned import Warned


def observe(
    run: Run,
    noise: Tensor,
    sample: Any,
    sigma: float,
    scheduler: Any,
    warn: Warned,
    *,
    first: bool,
) -> Tensor | None:
    """Note what the first stage of a step shows: how noise changes, and what an edit does.

    Args:
        run: Which has gone on to the next stage.
        noise: Guided, as the scheduler got it, of the noise level `sigma`.
        sample: What it was predicted of.
        scheduler, warn: The run's.
        first: Whether it was the first stage of its step.

    Returns:
        The noise as a row for each token, `(S, N, C)`, or None where nothing is chosen by it.
    """
    packed, leader, config = _packed(run, noise, warn), run.leader, run.planned.config
    dense = leader is None or (not leader.skips and leader.rows is None)
    if run.carry is not None and first and leader is not None and not run.planned.dense:
        run.carry.observe(noise, sigma, dense=dense)
    if packed is not None and first and leader is not None and not leader.skips:
        if run.selection is None:
            run.selection = Selection(config, packed[1], run.masked)
        run.selection.observe(packed[0], None if leader.rows is None else run.active, sigma)
    if run.edit is not None and first:
        here = surroundings(config, run.planned.layout, scheduler)
        follow(run, run.edit, config, here, noise, sample if dense else None, sigma)
    return None if packed is None else packed[0]


def _packed(run: Run, noise: Tensor, warn: Warned) -> tuple[Tensor, int] | None:
    """The noise by tokens, and the pixels of one."""
    if not run.regions or run.family is None:
        return None
    packed = run.family.pack(noise, run.planned.layout.grid)
    if packed is None:
        warn(
            "noise",
            f"the scheduler's noise, {tuple(noise.shape)}, is not that of all "
            f"{run.planned.layout.tokens} tokens, so that partial steps are dense",
        )
    return packed
