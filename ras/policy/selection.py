"""Which regions a partial step computes, chosen on the guided noise of the steps before.

*Drift* is the predicted error of reuse. With `v1` and `v0` a region's last two guided noises, at
positions `t1` and `t0` (see `ras.clock`), its score at step t is

    rms(v1 - v0) * |t - t1| / |t1 - t0|

over the pixels and channels of its patch: how much it changed last, carried on at that pace for
the time since. The regions with the highest scores are computed. Waiting raises a score, so that
age needs no weight of its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import ras_kernels

from ..clock import position
from ..config import RASConfig
from ..tokens import normal_empty


class Selection:
    """The state of choosing, for S samples of N regions."""

    def __init__(self, config: RASConfig, pixels: int) -> None:
        self._config, self._pixels = config, pixels
        self._ages: Tensor | None = None  # (S, N) steps that each region has waited
        # Drift: the guided noise of each region when it was last computed, `(S, N, C)`,
        # its rms change per unit of position, and that position, both (S, N) float32.
        self._noise: Tensor | None = None
        self._pace: Tensor | None = None
        self._since: Tensor | None = None

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
        now = position(sigma)
        if self._noise is None or self._noise.shape != noise.shape:
            if rows is not None:
                return
            self._noise = normal_empty(noise.shape, noise.dtype, noise.device).copy_(noise)
            self._pace = normal_empty(noise.shape[:2], torch.float32, noise.device).fill_(0)
            self._since = normal_empty(noise.shape[:2], torch.float32, noise.device).fill_(now)
            return
        assert self._pace is not None and self._since is not None
        noise = noise.to(self._noise.dtype)  # loops by hand may mix them
        ras_kernels.update_drift_(self._noise, self._pace, self._since, rows, noise, position=now)

    def choose(
        self, noise: Tensor, count: int, sigma: float, masked: Tensor | None = None
    ) -> Tensor:
        """The `count` regions per sample to compute at noise level `sigma`, `(S, count)` ascending.

        Args:
            noise: `(S, N, C)`, the guided noise of the step before.
            count: From 1 to N.
            sigma: The noise level of the step to come.
            masked: `(S, k)` regions to compute in any case, or of fewer samples, that repeat; k
                is at most `count`.
        """
        if masked is not None:
            if len(noise) % len(masked):
                raise ValueError(f"the mask is of {len(masked)} samples, the run of {len(noise)}")
            masked = masked.repeat(len(noise) // len(masked), 1)
            if masked.shape[1] == count:
                return masked
        if self._config.metric == "drift":
            assert self._pace is not None and self._since is not None
            scores = ras_kernels.drift_scores(self._pace, self._since, position=position(sigma))
            if masked is not None:
                scores = scores.scatter(1, masked.long(), math.inf)
            ages = torch.zeros_like(scores, dtype=torch.int32)
            # With nothing to drop from the top, the highest scores are kept.
            return ras_kernels.select_regions(
                scores, ages, count, high_ratio=0, starvation_scale=0
            )[0]
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

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        kept = (self._ages, self._noise, self._pace, self._since)
        return [tensor for tensor in kept if tensor is not None]
