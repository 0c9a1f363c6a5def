"""The noise that is reused: what a token last predicted, and how that was changing.

With `v1` and `v0` a token's last two predictions, at positions `t1` and `t0`, step t reuses
`v1 + g * (v1 - v0)`, where `g` is the share that `ras.planner.carried` gives for the distances
`|t - t1|` and `|t1 - t0|`: 0 at first, `RASConfig.extrapolation` when the time since equals the
time before, and slower than linear beyond, so that a long gap cannot run away.
"""

from __future__ import annotations

import torch
from torch import Tensor

import ras_kernels

from .attention import normal_empty, read, write
from .planner import carried, position


class HeldNoise:
    """One branch's noise, `(B, N, C)`, and how each token's was changing."""

    def __init__(self, noise: Tensor, *, extrapolates: bool) -> None:
        """Room for noise of this shape and dtype; what it holds is written by `merge`."""
        self.noise = normal_empty(noise, noise.shape)
        self._change: Tensor | None = None  # (B, N, C), v1 - v0
        self._since: Tensor | None = None  # (B, N) float32, t1
        self._gap: Tensor | None = None  # (B, N) float32, t1 - t0, or 0 if there is no v0
        self._extrapolates = extrapolates

    def fits(self, noise: Tensor) -> bool:
        """Whether noise of some tokens, `(B, k, C)`, belongs here."""
        mine = self.noise
        return (len(noise), noise.shape[2], noise.dtype) == (len(mine), mine.shape[2], mine.dtype)

    def merge(
        self, fresh: Tensor, rows: Tensor | None, sigma: float, extrapolation: float
    ) -> Tensor:
        """Take in fresh noise and return that of all tokens, `(B, N, C)`.

        Args:
            fresh: `(B, k, C)`, of the tokens `rows`, or `(B, N, C)` of all.
            rows: `(B, k)`, or None for all.
            sigma: The noise level that it was predicted at.
            extrapolation: See `predict`.
        """
        if not self._extrapolates and rows is not None:
            return ras_kernels.merge_noise_(self.noise, rows, fresh)
        if self._extrapolates and self._change is not None:
            self._remember(rows, position(sigma))
            ras_kernels.update_tokens_(self.noise, self._change, rows, fresh)
        else:
            write(self.noise, rows, fresh)
            if self._extrapolates:
                self._begin(position(sigma))
        return fresh if rows is None else self.predict(sigma, extrapolation)

    def _begin(self, place: float) -> None:
        """There is a first prediction of each token, and no change yet."""
        column = self.noise[..., 0].float()
        self._change = normal_empty(self.noise, self.noise.shape).zero_()
        self._since = normal_empty(column, column.shape).fill_(place)
        self._gap = normal_empty(column, column.shape).zero_()

    def _remember(self, rows: Tensor | None, place: float) -> None:
        """Note when the tokens `rows` are predicted anew."""
        assert self._since is not None and self._gap is not None
        since = read(self._since, rows)
        write(self._gap, rows, place - since)
        write(self._since, rows, torch.full_like(since, place))

    def predict(self, sigma: float, extrapolation: float) -> Tensor:
        """The noise of all tokens at noise level `sigma`, `(B, N, C)`; fresh tokens keep theirs."""
        gain = self.gain(sigma, extrapolation)
        if gain is None or self._change is None:
            return self.noise.clone()
        return ras_kernels.carry_tokens(self.noise, self._change, gain)

    def gain(self, sigma: float, extrapolation: float) -> Tensor | None:
        """g of each token at noise level `sigma`, `(B, N)` float32, or None if all are 0."""
        if not extrapolation or self._since is None or self._gap is None:
            return None
        ahead, behind = (position(sigma) - self._since).abs(), self._gap.abs()
        gain = carried(ahead, behind, extrapolation)
        # After two predictions at one noise level, as Heun's makes, there is no pace to carry on.
        return torch.where((behind > 0) & (ahead > 0), gain, 0.0)

    @property
    def nbytes(self) -> int:
        kept = (self.noise, self._change, self._since, self._gap)
        return sum(tensor.nbytes for tensor in kept if tensor is not None)
