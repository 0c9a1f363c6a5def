"""What is remembered of one kind of call, and how a call under way goes.

Guidance takes one call of the transformer in a step, or two, or three; it may stop in mid-run, or
change the batch; there may be two transformers. A *branch* is a transformer, the form of its call
(the shapes of its inputs) and the ordinal among the calls of that form since the last step: calls
of one branch differ in nothing but what walks along the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .output import HeldOutput, HeldTokens, Times
from .plan import Reuse
from .site import KVCache, Walk


@dataclass
class Branch:
    """What a branch reuses, and how the step under way goes for it.

    Attributes:
        tokens: Its noise, token by token, where some may stay behind; with `caches`.
        output: Its output, where steps are whole.
        caches: Each layer's keys and values.
        spec: The form of the output that the tokens are part of.
        step: The last solver step in which it was called.
        rows: The rows that the step under way computes, `(B, k)`, or None for all.
        skips: Whether that step computes nothing.
        references: `(B, r)` those that walk with the rows, or None for all, or none.
        reference_times: When each of them was last computed, in noise levels.
    """

    tokens: HeldTokens = field(default_factory=HeldTokens)
    output: HeldOutput = field(default_factory=HeldOutput)
    caches: list[KVCache] = field(default_factory=list)
    spec: Any = None
    step: int = -1
    rows: Tensor | None = None
    skips: bool = False
    references: Tensor | None = None
    reference_times: Times = field(default_factory=Times)

    @property
    def begun(self) -> bool:
        """Whether there is anything to reuse."""
        return self.tokens.begun or self.output.begun

    def carry_by(self, share: Tensor) -> None:
        """Carry noise on by another share of each sample, see `ras.policy.carry`."""
        self.tokens.carry_by(share)
        self.output.carry_by(share)

    def forget(self) -> None:
        """Reuse nothing of what was, and keep the memory for what comes."""
        self.tokens.begun = self.output.begun = False
        self.step, self.rows, self.references, self.skips = -1, None, None, False
        for cache in self.caches:
            cache.mask = None

    @property
    def held(self) -> list[Tensor]:
        """All that is kept."""
        found = [tensor for cache in self.caches for tensor in cache.tensors]
        return found + self.tokens.tensors + self.output.tensors + self.reference_times.tensors


@dataclass(frozen=True)
class Call:
    """A call of a transformer under way.

    Attributes:
        branch: Whose it is.
        sigma: The noise level.
        extrapolation: How what is reused is carried on.
        reuse: What the run makes of it.
        walk: How its tokens go, where some may stay behind; None for whole outputs.
        unpack: What makes the transformer's output of all tokens.
    """

    branch: Branch
    sigma: float
    extrapolation: float
    reuse: Reuse
    walk: Walk | None = None
    unpack: Callable[[Tensor], list[Tensor]] | None = None

    @property
    def skip(self) -> bool:
        """Whether nothing is computed."""
        return self.branch.skips

    def predictor(self) -> Callable[[], list[Tensor]]:
        """What makes the tensors of a skipped call's output."""
        if self.walk is None:
            return self.branch.output.predictor(self.sigma, self.extrapolation)
        assert self.unpack is not None
        return partial(_of_tokens, self.walk, self.unpack)

    @torch.compiler.disable
    def finish(self, tensors: list[Tensor]) -> Any:
        """The output that these tensors are."""
        if self.walk is None:
            return self.branch.output.finish(tensors)
        return pytree.tree_unflatten(tensors, self.branch.spec)

    def end(self, output: Any) -> None:
        """Note the output of a call that has computed something."""
        if self.skip:
            return
        if self.walk is None:
            self.branch.output.take(output, self.sigma, self.extrapolation, reuse=self.reuse)
        else:
            self.branch.spec = pytree.tree_structure(output)


def _of_tokens(walk: Walk, unpack: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
    return unpack(walk.held.predict(walk.gain))


def form_of(value: Any) -> Any:
    """What two calls have in common if the one's output may stand for the other's, hashable.

    Of tensors that is the shape, of lists and dictionaries what is in them, of texts and switches
    the value. A number by itself may be the time, and does not count; nor does the dtype, which
    autocast changes after the first step.
    """
    if isinstance(value, Tensor):
        return value.shape, value.device
    if isinstance(value, Mapping):
        return tuple((name, form_of(inner)) for name, inner in value.items())
    if isinstance(value, list | tuple):
        return tuple(inner if isinstance(inner, int) else form_of(inner) for inner in value)
    if value is None or isinstance(value, bool | str):
        return value
    return type(value)
