"""What a user can ask for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ras_kernels import METRICS


@dataclass(frozen=True)
class RASConfig:
    """The settings of region-adaptive sampling, by the names of arXiv 2502.10389.

    Steps are solver steps, counted from 0 at the first one that a run executes. A step is sparse
    unless it comes before `scheduler_start_step` or after `scheduler_end_step`, or is in
    `error_reset_steps`; the first step is always dense.

    Attributes:
        sample_ratio: Share of the image tokens that a sparse step computes, in (0, 1].
            `int((1 - sample_ratio) * N)` of N tokens are dropped.
        error_reset_steps: Steps in which all tokens are computed, which ends the drift of what
            was reused. Whole numbers are steps; those beyond the end of a run are ignored.
            Fractions in (0, 1) are shares of the run: step `int(fraction * steps)`.
        metric: How regions are scored on the guided noise: `"std"` or `"l2norm"`, see
            `ras_kernels.region_scores`.
        high_ratio: Share of the dropped tokens that have the highest scores, in [0, 1]; the
            rest have the lowest.
        starvation_scale: How strongly the steps that a region has waited speak for it, at least
            0, see `ras_kernels.select_regions`.
        scheduler_start_step: The first step that may be sparse.
        scheduler_end_step: The last step that may be sparse; None is the run's last.
        skip_num_step: How many more tokens are dropped each time that `skip_num_step_length`
            steps have gone by, around the mean that `sample_ratio` gives; 0 drops the same number
            in every sparse step.
        skip_num_step_length: See `skip_num_step`; at least 1 if that is not 0.

    Raises:
        ValueError, TypeError: A value that is out of its range or of a wrong type.
    """

    sample_ratio: float = 0.5
    error_reset_steps: tuple[int | float, ...] = (12, 20)
    metric: str = "std"
    high_ratio: float = 0.3
    starvation_scale: float = 1.0
    scheduler_start_step: int = 4
    scheduler_end_step: int | None = None
    skip_num_step: int = 0
    skip_num_step_length: int = 0

    def __post_init__(self) -> None:
        _number("sample_ratio", self.sample_ratio)
        if not 0 < self.sample_ratio <= 1:
            raise ValueError(
                f"sample_ratio must be in (0, 1], got {self.sample_ratio!r}; 1 computes all tokens"
            )
        if isinstance(self.error_reset_steps, str) or not isinstance(
            self.error_reset_steps, Iterable
        ):
            raise TypeError(
                f"error_reset_steps must be a sequence of steps, got {self.error_reset_steps!r}; "
                "() means none"
            )
        resets = tuple(self.error_reset_steps)
        for reset in resets:
            _reset(reset)
        object.__setattr__(self, "error_reset_steps", resets)
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}")
        _number("high_ratio", self.high_ratio)
        if not 0 <= self.high_ratio <= 1:
            raise ValueError(f"high_ratio must be in [0, 1], got {self.high_ratio!r}")
        _number("starvation_scale", self.starvation_scale)
        if not 0 <= self.starvation_scale < math.inf:
            raise ValueError(
                f"starvation_scale must be at least 0 and finite, got {self.starvation_scale!r}"
            )
        _step("scheduler_start_step", self.scheduler_start_step)
        if self.scheduler_end_step is not None:
            _step("scheduler_end_step", self.scheduler_end_step)
        _whole("skip_num_step", self.skip_num_step)
        _step("skip_num_step_length", self.skip_num_step_length)
        if self.skip_num_step and not self.skip_num_step_length:
            raise ValueError(
                f"skip_num_step={self.skip_num_step} needs skip_num_step_length, the number of "
                "steps after which that many more tokens are dropped"
            )

    @classmethod
    def paper(cls, **overrides: Any) -> RASConfig:
        """The method of arXiv 2502.10389 with its settings for SD3, whatever the defaults become.

        Cached noise is held as it is, and the same number of tokens is dropped in every sparse
        step unless `skip_num_step` says otherwise.
        """
        settings: dict[str, Any] = dict(
            sample_ratio=0.5,
            error_reset_steps=(12, 20),
            metric="std",
            high_ratio=0.3,
            starvation_scale=1.0,
            scheduler_start_step=4,
            scheduler_end_step=None,
            skip_num_step=0,
            skip_num_step_length=0,
        )
        return cls(**(settings | overrides))


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def _whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")


def _step(name: str, value: int) -> None:
    _whole(name, value)
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}")


def _reset(value: int | float) -> None:
    _number("error_reset_steps", value)
    if isinstance(value, Integral):
        _step("error_reset_steps", int(value))
    elif not 0 < value < 1:
        raise ValueError(
            f"error_reset_steps holds {value!r}, which is neither a whole step nor a fraction of "
            "the run in (0, 1)"
        )
