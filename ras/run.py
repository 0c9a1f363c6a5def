"""The state of one run: its plan, what it reuses, and what it has done so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .attention import Walk
from .config import RASConfig
from .plan import Plan
from .report import Stats
from .selection import Selection
from .tokens import room


@dataclass
class Run:
    """One generation, from a scheduler's new timesteps to its last step.

    Shapes: B the transformer's batch, S samples (B without the guidance copies), N regions.
    """

    config: RASConfig
    timesteps: Tensor
    sigmas: tuple[float, ...]  # noise level of each stage, and that of the end
    grid: tuple[int, int]  # regions in height and width
    order: int  # calls of the transformer in a solver step
    plan: Plan
    counts: tuple[int, ...]  # regions computed in each solver step
    samples: int  # S as far as it is known; B before the first scheduler step
    masked: Tensor | None = None  # (S or 1, k) regions that every partial step computes

    stages: int = 0  # scheduler steps done; `order` of them make a solver step
    branches: set[tuple[int, ...]] = field(default_factory=set)  # called in this stage
    unseen: bool = False  # whether its steps are taken where nobody sees them

    # What is reused. `key` tells what it is good for, and is None while there is nothing.
    key: tuple[Any, ...] | None = None

    # The regions chosen for the current step, (S, k), and those that the step's calls really
    # compute, (B, k); None is all of them. A step that skips computes none.
    selection: Selection | None = None
    active: Tensor | None = None
    rows: Tensor | None = None
    skips: bool = False
    begun: int = -1  # the last solver step in which the transformer was called

    steps_sparse: int = 0
    steps_dense: int = 0
    steps_skipped: int = 0
    calls_dense: int = 0
    active_counts: Tensor | None = None  # (S, N): in how many sparse calls a region was active
    tokens_computed: int = 0
    tokens_total: int = 0
    text_tokens: int = 0
    text_tokens_total: int = 0
    cache_bytes: int = 0

    @property
    def regions(self) -> int:
        return math.prod(self.grid)

    @property
    def dense(self) -> bool:
        """Whether all steps compute all tokens."""
        return min(self.counts) == self.regions

    @property
    def partial(self) -> bool:
        """Whether a step computes some tokens, for which keys and values have to be kept."""
        return any(0 < count < self.regions for count in self.counts)

    @property
    def extrapolates(self) -> bool:
        return any(self.extrapolation(step) for step in range(len(self.counts)))

    def extrapolation(self, step: int) -> float:
        """How reused noise is carried on in a step."""
        factors = self.plan.extrapolation
        return self.config.extrapolation if factors is None else factors[step]

    @property
    def step(self) -> int:
        return self.stages // self.order

    @property
    def sigma(self) -> float:
        """The noise level of the stage to come, or of the one under way."""
        return self.sigmas[self.stages]

    @property
    def over(self) -> bool:
        return self.step >= len(self.counts)

    def count(self, walk: Walk | None, batch: int, text_tokens: int) -> None:
        """Note a call of the transformer with so many text tokens."""
        active = None if walk is None else walk.active
        skip = walk is not None and walk.skip
        stays = walk is not None and walk.text_stays
        computed = 0 if skip else self.regions if active is None else active.shape[1]
        self.tokens_total += batch * self.regions
        self.tokens_computed += batch * computed
        self.text_tokens_total += batch * text_tokens
        self.text_tokens += 0 if stays else batch * text_tokens
        if walk is not None and not walk.main:
            return
        if self.begun != self.step or self.unseen:
            self.begun = self.step
            self.steps_skipped += skip
            self.steps_dense += active is None and not skip
            self.steps_sparse += active is not None
        if skip:
            return
        if active is None:
            self.calls_dense += 1
            return
        assert self.active is not None
        if self.active_counts is None or len(self.active_counts) != len(self.active):
            shape = (len(self.active), self.regions)
            self.active_counts = room(None, shape, self.active.dtype, self.active.device)
        self.active_counts.scatter_add_(1, self.active.long(), torch.ones_like(self.active))

    def stats(self, runs: int, warnings: tuple[str, ...]) -> Stats:
        counts = self.active_counts
        if counts is None:
            counts = torch.zeros(self.samples, self.regions, dtype=torch.int64)
        return Stats(
            config=self.config,
            runs=runs,
            steps_dense=self.steps_dense,
            steps_sparse=self.steps_sparse,
            steps_skipped=self.steps_skipped,
            plan=self.plan,
            tokens_computed=self.tokens_computed,
            tokens_total=self.tokens_total,
            text_tokens=self.text_tokens,
            text_tokens_total=self.text_tokens_total,
            cache_bytes=self.cache_bytes,
            region_counts=(counts + self.calls_dense).unflatten(1, self.grid),
            warnings=warnings,
        )
