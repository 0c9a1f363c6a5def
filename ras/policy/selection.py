"""Which regions a partial step computes, chosen on the guided noise of the steps before.

*Drift* is the predicted error of reuse. With `v1` and `v0` a region's last two guided noises, at
positions `t1` and `t0` (see `ras.clock`), its score at step t is

    rms(v1 - v0) * |t - t1| / |t1 - t0|

over the pixels and channels of its patch: how much it changed last, carried on at that pace for
the time since. The regions with the highest scores are computed.

A score can stay at 0: where nothing changes, where positions stand still (`ras.clock.SIGMAS`), and
where there is no `v0`. So a region also has a *wait*: how many tokens partial steps have computed
since they last computed it, those under a mask not counted. Of N regions one is overdue whose wait
is `PATIENCE * N` or more, or that has no `v0`; overdue ones are computed before all others, those
with the longest wait first. No region starves then: between two computations of it partial steps
compute fewer than `(PATIENCE + 1) * N + k` tokens beside the mask's, at most k in a step. For it
is overdue after fewer than `PATIENCE * N + k`, and before it go only regions that have waited as
long, N - 1 at most and each of them once, since whatever is computed begins to wait anew.

Partial steps that compute the mask alone leave all other regions to dense steps. For the paper's
metrics `ras_kernels.select_regions` states the bound.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

import ras_kernels

from ..clock import position
from ..config import RASConfig
from ..tokens import normal_empty

PATIENCE = 3  # plans for a speed-up never try it, and by their scores few regions wait as long
FIRST = 2.0**100  # scores are below 2**41 for all noise that float16 holds; multiples stay finite


class _Drift(NamedTuple):
    """What drift is told by; all but the noise is `(S, N)` float32.

    Attributes:
        noise: `(S, N, C)`, the guided noise of each region when it was last computed.
        pace: Its rms change per unit of position.
        since: That position.
        late: How many tokens a region is overdue by: 1 or more if it is.
    """

    noise: Tensor
    pace: Tensor
    since: Tensor
    late: Tensor

    @classmethod
    def begin(cls, noise: Tensor, now: float) -> _Drift:
        """Of the first step, which computes all tokens and tells no pace."""
        columns = [normal_empty(noise.shape[:2], torch.float32, noise.device) for _ in range(3)]
        for column, value in zip(columns, (0, now, 1)):
            column.fill_(value)
        return cls(normal_empty(noise.shape, noise.dtype, noise.device).copy_(noise), *columns)


class Selection:
    """The state of choosing, for S samples of N regions.

    Args:
        config: The settings.
        pixels: Of a region.
        masked: `(S, m)` regions that each partial step computes, or of fewer samples, that repeat.
    """

    def __init__(self, config: RASConfig, pixels: int, masked: Tensor | None = None) -> None:
        self._config, self._pixels, self.masked = config, pixels, masked
        self._ages: Tensor | None = None  # (S, N) steps that each region has waited
        self._drift: _Drift | None = None

    def observe(self, noise: Tensor, rows: Tensor | None, sigma: float) -> None:
        """See the guided noise of a step that computed `rows`, `(S, k)`, or all tokens (None).

        Args:
            noise: `(S, N, C)`, a row for each region, channels within pixels.
            rows: See above.
            sigma: The step's noise level.
        """
        if self._config.metric != "drift":
            if rows is None:
                self._ages = None
            return
        now, seen = position(sigma), self._drift
        if seen is None or seen.noise.shape != noise.shape:
            # Where the samples are others, some tokens' noise is nothing to begin with.
            self._drift = _Drift.begin(noise, now) if rows is None else None
            return
        noise = noise.to(seen.noise.dtype)  # loops by hand may mix them
        ras_kernels.update_drift_(seen.noise, seen.pace, seen.since, rows, noise, position=now)
        in_time = 1 - PATIENCE * noise.shape[1]
        if rows is None:
            seen.late.fill_(in_time)
        else:
            others = rows.shape[1] - (0 if self.masked is None else self.masked.shape[1])
            seen.late.add_(others).scatter_(1, rows.long(), in_time)

    def choose(self, noise: Tensor, count: int, sigma: float) -> Tensor | None:
        """The `count` regions per sample to compute at noise level `sigma`, `(S, count)` ascending.

        Args:
            noise: `(S, N, C)`, the guided noise of the step before.
            count: From 1, or the mask's, to N.
            sigma: The noise level of the step to come.

        Returns:
            None for all of them, where no step has computed all tokens of such noise.
        """
        masked = self.masked
        if masked is not None:
            if len(noise) % len(masked):
                raise ValueError(f"the mask is of {len(masked)} samples, the run of {len(noise)}")
            masked = masked.repeat(len(noise) // len(masked), 1)
            if masked.shape[1] == count:
                return masked
        if self._config.metric == "drift":
            return self._by_drift(noise, count, sigma, masked)
        scores = ras_kernels.region_scores(noise, self._pixels, self._config.metric)
        if self._ages is None or self._ages.shape != scores.shape:
            self._ages = torch.zeros_like(scores, dtype=torch.int32)
        active, self._ages = ras_kernels.select_regions(
            scores,
            self._ages,
            count,
            high_ratio=self._config.high_ratio,
            starvation_scale=self._config.starvation_scale,
        )
        return active

    def _by_drift(
        self, noise: Tensor, count: int, sigma: float, masked: Tensor | None
    ) -> Tensor | None:
        seen = self._drift
        if seen is None or seen.noise.shape != noise.shape:
            return None
        scores = ras_kernels.drift_scores(seen.pace, seen.since, position=position(sigma))
        scores = torch.maximum(scores, seen.late * FIRST)
        if masked is not None:
            scores = scores.scatter(1, masked.long(), math.inf)
        ages = torch.zeros_like(scores, dtype=torch.int32)
        # With nothing to drop from the top, the highest scores are kept.
        return ras_kernels.select_regions(scores, ages, count, high_ratio=0, starvation_scale=0)[0]

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return [*([] if self._ages is None else [self._ages]), *(self._drift or ())]
