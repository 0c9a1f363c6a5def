"""The schedule of arXiv 2502.10389."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from ..config import PAPER_RESETS, PAPER_START, RASConfig
from ..plan import DENSE, Plan


def paper_plan(config: RASConfig, num_steps: int, num_tokens: int) -> tuple[Plan, str | None]:
    """Plan `sample_ratio` of the tokens for all but some steps, see `RASConfig`.

    The number of dropped tokens is truncated as in the published code, and moves around its mean
    as `skip_num_step` says.

    Returns:
        The plan, and what to warn of if it leaves nothing out.
    """
    ratio, first, last = config.sample_ratio, config.scheduler_start_step, num_steps - 1
    assert isinstance(ratio, float | int)
    first = PAPER_START if first is None else first
    end = last if config.scheduler_end_step is None else min(config.scheduler_end_step, last)
    given = config.error_reset_steps
    dense = resets(PAPER_RESETS if given is None else given, num_steps)

    def kept(step: int) -> int:
        if step == 0 or not first <= step <= end or step in dense:
            return num_tokens
        dropped = int((1 - ratio) * num_tokens)
        if config.skip_num_step:  # the middle of the sparse steps drops what sample_ratio says
            length = config.skip_num_step_length
            stage = (step - first) // length
            dropped += config.skip_num_step * (stage - (num_steps - first) // (2 * length))
        return num_tokens - min(max(dropped, 0), num_tokens - 1)

    plan = Plan(tuple(kept(step) / num_tokens for step in range(num_steps)))
    if min(plan.shares) < DENSE or ratio == 1:
        return plan, None
    return plan, (
        f"none of this run's {num_steps} steps can be sparse, so that all are dense: the first "
        f"that may be is scheduler_start_step={first}"
    )


def resets(error_reset_steps: Sequence[int | float], num_steps: int) -> set[int]:
    """The steps that whole numbers and fractions of the run name."""
    return {
        int(reset) if isinstance(reset, Integral) else int(reset * num_steps)
        for reset in error_reset_steps
    }
