"""Which regions a partial step computes, chosen on the guided noise of the steps before.

*Drift* is the predicted error of reuse. With `v1` and `v0` a region's last two guided noises, at
positions `t1` and `t0` (see `ras.planner`), its score at step t is

    rms(v1 - v0) * |t - t1| / |t1 - t0|

over the pixels and channels of its patch: how much it changed last, carried on at that pace for
the time since. The regions with the highest scores are computed. Waiting raises a score, so that
age needs no weight of its own.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

import ras_kernels

from .attention import normal_empty, read, write
from .config import RASConfig
from .planner import position


class Selection:
    """The state of choosing, for S samples of N regions."""

    def __init__(self, config: RASConfig, patch_size: int) -> None:
        self._config, self._patch = config, patch_size
        self._ages: Tensor | None = None  # (S, N) steps that each region has waited
        self._noise: Tensor | None = None  # (S, N, C) guided noise when it was last computed
        self._pace: Tensor | None = None  # (S, N, 1) float32, rms change per unit of position
        self._since: Tensor | None = None  # (S, N, 1) float32, position when last computed

    def observe(self, noise: Tensor, rows: Tensor | None, sigma: float) -> None:
        """See the guided noise of a step that computed `rows`, `(S, k)`, or all tokens (None).

        Args:
            noise: `(S, C, height, width)`.
            rows: See above.
            sigma: The step's noise level.
        """
        if self._config.metric != "drift":
            if rows is None:
                self._ages = None
            return
        tokens = rearrange(
            noise.float(), "s c (h p) (w q) -> s (h w) (p q c)", p=self._patch, q=self._patch
        )
        place = position(sigma)
        if self._noise is None or self._noise.shape != tokens.shape:
            if rows is not None:
                return
            self._noise = normal_empty(tokens, tokens.shape).copy_(tokens)
            column = (*tokens.shape[:2], 1)
            self._pace = normal_empty(tokens, column).fill_(0)
            self._since = normal_empty(tokens, column).fill_(place)
            return
        assert self._pace is not None and self._since is not None
        change = (tokens - self._noise).square().mean(dim=2, keepdim=True).sqrt()
        pace = change / (place - self._since).abs().clamp_min(1e-6)
        since = torch.full_like(self._since, place)
        for kept, new in ((self._noise, tokens), (self._pace, pace), (self._since, since)):
            write(kept, rows, read(new, rows))

    def choose(
        self, noise: Tensor, count: int, sigma: float, masked: Tensor | None = None
    ) -> Tensor:
        """The `count` regions per sample to compute at noise level `sigma`, `(S, count)` ascending.

        Args:
            noise: `(S, C, height, width)`, the guided noise of the step before.
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
            scores = (self._pace * (position(sigma) - self._since).abs()).squeeze(2)
            if masked is not None:
                scores = scores.scatter(1, masked.long(), math.inf)
            ages = torch.zeros_like(scores, dtype=torch.int32)
            # With nothing to drop from the top, the highest scores are kept.
            return ras_kernels.select_regions(
                scores, ages, count, high_ratio=0, starvation_scale=0
            )[0]
        scores = ras_kernels.region_scores(noise, self._patch, self._config.metric)
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
