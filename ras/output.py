"""What is reused of a transformer's output: what it last was, and how that was changing.

With `v1` and `v0` the last two predictions, at positions `t1` and `t0`, step t reuses
`v1 + s * g * (v1 - v0)`, where `g` is the share that `ras.clock.carried` gives for the distances
`|t - t1|` and `|t1 - t0|`: 0 at first, `RASConfig.extrapolation` when the time since equals the
time before, and slower than linear beyond, so that a long gap cannot run away.

`s` is 1 where an extrapolation is asked for; else `ras.policy.carry` measures it in the run.

`HeldTokens` does so token by token, `HeldOutput` with outputs of any form as a whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import ras_kernels

from .clock import carried, position
from .plan import Reuse
from .tokens import read, room, write

MOST = 3.0  # beyond which nothing is carried on in a straight line; chosen on the editing model


class Times:
    """When tokens were last computed, `(B, N)` of them, and how long before that the last time."""

    def __init__(self) -> None:
        self.since: Tensor | None = None  # (B, N) float32
        self.gap: Tensor | None = None  # (B, N) float32, 0 where there was no time before

    def allocate(self, shape: tuple[int, int], device: torch.device) -> None:
        """Make room, where it was if there is some; `note` of all tokens is what fills it."""
        self.since = room(self.since, shape, torch.float32, device)
        self.gap = room(self.gap, shape, torch.float32, device)

    def note(self, rows: Tensor | None, now: float, *, first: bool) -> None:
        """Note that tokens, `(B, k)` or all, are computed now; `first` if none ever was."""
        assert self.since is not None and self.gap is not None
        if first:
            self.since.fill_(now)
            return
        since = read(self.since, rows)  # of all rows itself, so that the gap comes first
        write(self.gap, rows, now - since)
        write(self.since, rows, torch.full_like(since, now))

    def line(self, now: float) -> Tensor:
        """How much of their last change is added in a straight line, `(B, N)`, up to `MOST`."""
        assert self.since is not None and self.gap is not None
        ahead = now - self.since
        return torch.where(self.gap != 0, (ahead / self.gap).clamp(0, MOST), 0.0)

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return [] if self.since is None or self.gap is None else [self.since, self.gap]


class HeldTokens:
    """The noise of tokens, `(B, N, C)`, and how each one's was changing.

    A step that predicts noise calls `expect` before, and `merge` with what came of it; all that
    `merge` does is on tensors, so that it may be part of a compiled transformer.
    """

    def __init__(self) -> None:
        self._noise: Tensor | None = None
        self._change: Tensor | None = None  # (B, N, C), v1 - v0; at first from nothing to something
        self._times: Times | None = None  # t1, and t1 - t0
        self._share: Tensor | None = None  # (B, 1) float32, s, where it is measured
        self.begun = False
        """Whether there is anything to reuse, or will be after the call under way."""

    def allocate(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        reuse: Reuse,
    ) -> None:
        """Make room, where it was if there is some; `merge` of all tokens is what fills it.

        Args:
            shape: `(B, N, C)`.
            dtype, device: Of the noise.
            reuse: Of the run.
        """
        self.begun = False
        self._noise = room(self._noise, shape, dtype, device)
        if reuse is Reuse.HELD:
            self._change = self._times = self._share = None
            return
        self._change = room(self._change, shape, dtype, device)
        self._times = self._times or Times()
        self._times.allocate(shape[:2], device)
        if reuse is Reuse.CARRIED:
            self._share = None
            return
        self._share = room(self._share, (shape[0], 1), torch.float32, device).fill_(1)

    def carry_by(self, share: Tensor) -> None:
        """Carry noise on by another share, `(S,)`, of samples that the batch has copies of."""
        if self._share is not None and len(self._share) % len(share) == 0:
            self._share.copy_(share.repeat(len(self._share) // len(share))[:, None])

    @property
    def noise(self) -> Tensor:
        """Each token's last noise, `(B, N, C)`."""
        assert self._noise is not None, "allocated before the first step"
        return self._noise

    def expect(self, rows: Tensor | None, sigma: float, extrapolation: float) -> Tensor | None:
        """Note that tokens are going to be predicted anew at noise level `sigma`.

        Args:
            rows: `(B, k)`, or None for all.
            sigma: See above.
            extrapolation: See `gain`.

        Returns:
            g of each token in that step, `(B, N)` float32, which is 0 for `rows`; None where no
            token is carried on.
        """
        begun, self.begun = self.begun, True
        if self._times is None:
            return None
        self._times.note(rows, position(sigma), first=not begun)
        return None if rows is None else self.gain(sigma, extrapolation)

    def merge(self, fresh: Tensor, rows: Tensor | None, gain: Tensor | None) -> Tensor:
        """Take in fresh noise and return that of all tokens, `(B, N, C)`.

        Args:
            fresh: `(B, k, C)`, of the tokens `rows`, or `(B, N, C)` of all.
            rows: `(B, k)`, or None for all.
            gain: What `expect` returned.
        """
        if self._change is not None:
            ras_kernels.update_tokens_(self.noise, self._change, rows, fresh)
            return fresh if rows is None else self.predict(gain)
        if rows is None:
            self.noise.copy_(fresh)
            return fresh
        return ras_kernels.scatter_tokens_(self.noise, rows, fresh).clone()

    def predict(self, gain: Tensor | None) -> Tensor:
        """The noise of all tokens, `(B, N, C)`, carried on by s times `gain`; as it is if None."""
        if gain is None or self._change is None:
            return self.noise.clone()
        if self._share is not None:
            gain = gain * self._share
        return ras_kernels.carry_tokens(self.noise, self._change, gain)

    def gain(self, sigma: float, extrapolation: float) -> Tensor | None:
        """g of each token at noise level `sigma`, `(B, N)` float32; None if no change is kept."""
        if self._times is None or self._times.since is None or self._times.gap is None:
            return None
        if not extrapolation:
            return torch.zeros_like(self._times.gap)
        ahead = (position(sigma) - self._times.since).abs()
        behind = self._times.gap.abs()
        gain = carried(ahead, behind, extrapolation)
        # After two predictions at one noise level, as Heun's makes, there is no pace to carry on.
        return torch.where((behind > 0) & (ahead > 0), gain, 0.0)

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        kept = (self._noise, self._change, self._share)
        times = [] if self._times is None else self._times.tensors
        return [tensor for tensor in kept if tensor is not None] + times


class HeldOutput:
    """An output of any form: a tensor, a tuple, a dataclass, lists of tensors.

    Floating-point tensors are carried on; all else is as it last was.
    """

    def __init__(self) -> None:
        self._leaves: list[Any] = []  # for each tensor a HeldTokens of its last dimension's rows
        self._form: Any = None  # of the output, and the shape of each leaf
        self._listed = False  # whether each tensor is of a sample
        self.begun = False
        """Whether there is anything to reuse."""

    def take(self, output: Any, sigma: float, extrapolation: float, *, reuse: Reuse) -> None:
        """Note the output of a call at noise level `sigma`, in memory of its own.

        Args:
            output: See above.
            sigma: See above.
            extrapolation: Of the step.
            reuse: Of the run.
        """
        leaves, spec = pytree.tree_flatten(output)
        form = spec, [_kind(leaf) for leaf in leaves]
        if form != self._form:
            self._leaves, self._form, self.begun = [HeldTokens() for _ in leaves], form, False
            self._listed = any(isinstance(part, list) for part in _parts(output))
        for index, leaf in enumerate(leaves):
            if not _is_float(leaf):
                self._leaves[index] = leaf.clone() if isinstance(leaf, Tensor) else leaf
                continue
            held = self._leaves[index]
            samples = len(leaf) if leaf.ndim > 2 and not self._listed else 1
            rows = leaf.reshape(samples, -1, leaf.shape[-1] if leaf.ndim else 1)
            if not self.begun:
                held.allocate(rows.shape, leaf.dtype, leaf.device, reuse=reuse)
            held.expect(None, sigma, extrapolation)
            held.merge(rows, None, None)
        self.begun = True

    def carry_by(self, share: Tensor) -> None:
        """Carry the tensors on by another share, `(S,)`, of samples that there are copies of."""
        held = [leaf for leaf in self._leaves if isinstance(leaf, HeldTokens)]
        shares = share[:, None] if self._listed and len(held) % len(share) == 0 else [share]
        for leaf, each in zip(held, itertools.cycle(shares)):
            leaf.carry_by(each)

    def predictor(self, sigma: float, extrapolation: float) -> Callable[[], list[Tensor]]:
        """What makes the tensors at noise level `sigma`, of which `finish` makes the output.

        All decisions are made before: what is returned may be compiled.
        """
        held = [leaf for leaf in self._leaves if isinstance(leaf, HeldTokens)]
        gains = [leaf.gain(sigma, extrapolation) for leaf in held]
        return partial(_predicted, held, gains)

    def finish(self, tensors: list[Tensor]) -> Any:
        """The output, of the form that it had, that these tensors are part of."""
        spec, kinds = self._form
        made = iter(tensors)
        leaves: list[Any] = []
        for leaf, kind in zip(self._leaves, kinds):
            if isinstance(leaf, HeldTokens):
                leaves.append(next(made).view(kind[0]))
            else:
                leaves.append(leaf.clone() if isinstance(leaf, Tensor) else leaf)
        return pytree.tree_unflatten(leaves, spec)

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        held = [leaf for leaf in self._leaves if isinstance(leaf, HeldTokens)]
        return [tensor for leaf in held for tensor in leaf.tensors]


def _predicted(held: list[HeldTokens], gains: list[Tensor | None]) -> list[Tensor]:
    return [tokens.predict(gain) for tokens, gain in zip(held, gains)]


def _parts(output: Any) -> tuple[Any, ...]:
    """An output, and what it is a tuple or a dictionary of."""
    inner = output.values() if isinstance(output, Mapping) else output
    return (output, *inner) if isinstance(output, Mapping | tuple) else (output,)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() > 0


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else type(leaf)
