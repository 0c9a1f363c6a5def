"""What each step of a run computes, known before the run begins."""

from __future__ import annotations

from numbers import Integral

from .config import RASConfig


def plan_steps(config: RASConfig, num_steps: int, num_tokens: int) -> tuple[int, ...]:
    """The number of image tokens that each step computes.

    Args:
        config: The settings.
        num_steps: Solver steps that the run executes.
        num_tokens: Image tokens of one sample, N.

    Returns:
        One count in [1, N] per step; N is a dense step.
    """
    last = num_steps - 1
    end = last if config.scheduler_end_step is None else min(config.scheduler_end_step, last)
    resets = {
        int(reset) if isinstance(reset, Integral) else int(reset * num_steps)
        for reset in config.error_reset_steps
    }
    return tuple(
        num_tokens - _dropped(config, step, num_steps, num_tokens)
        if step > 0 and config.scheduler_start_step <= step <= end and step not in resets
        else num_tokens
        for step in range(num_steps)
    )


def _dropped(config: RASConfig, step: int, num_steps: int, num_tokens: int) -> int:
    """Tokens that a sparse step drops: a static number, or one that grows as the run goes on.

    The growth is that of the paper's published code, where the middle of the sparse steps drops
    what `sample_ratio` says.
    """
    dropped = int((1 - config.sample_ratio) * num_tokens)
    if config.skip_num_step:
        length, start = config.skip_num_step_length, config.scheduler_start_step
        stage = (step - start) // length - (num_steps - start) // (2 * length)
        dropped += config.skip_num_step * stage
    return min(max(dropped, 0), num_tokens - 1)
