"""The state of one run: its plan, what it reuses, and what it has done so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .attention import normal_empty
from .config import RASConfig
from .plan import plan_steps
from .report import Stats


@dataclass
class Run:
    """One generation, from a scheduler's new timesteps to its last step.

    Shapes: B the transformer's batch, S samples (B without the guidance copies), N regions.
    """

    config: RASConfig
    timesteps: Tensor
    grid: tuple[int, int]  # regions in height and width
    order: int  # calls of the transformer in a solver step
    plan: tuple[int, ...]  # regions computed in each solver step
    samples: int  # S as far as it is known; B before the first scheduler step

    stages: int = 0  # scheduler steps done; `order` of them make a solver step
    branches: set[tuple[int, ...]] = field(default_factory=set)  # called in this stage
    unseen: bool = False  # whether its steps are taken where nobody sees them

    # What is reused. `key` tells what it is good for, and is None while there is nothing.
    key: tuple[Any, ...] | None = None
    noise: dict[tuple[int, ...], Tensor] = field(default_factory=dict)  # (B, N, C), by branch

    # The regions chosen for the current step, (S, k), the steps that each region has waited,
    # (S, N), and the rows that the step's calls really compute, (B, k); None is all of them.
    active: Tensor | None = None
    ages: Tensor | None = None
    rows: Tensor | None = None
    begun: int = -1  # the last solver step in which the transformer was called

    steps_sparse: int = 0
    steps_dense: int = 0
    calls_dense: int = 0
    active_counts: Tensor | None = None  # (S, N): in how many sparse calls a region was active
    tokens_computed: int = 0
    tokens_total: int = 0
    text_tokens: int = 0
    cache_bytes: int = 0

    @classmethod
    def of(cls, config: RASConfig, scheduler: Any, grid: tuple[int, int], batch: int) -> Run:
        """A run over the scheduler's timesteps, from the one that it begins at."""
        order = getattr(scheduler, "order", 1)
        begin = getattr(scheduler, "begin_index", None) or 0
        num_steps = max(math.ceil((len(scheduler.timesteps) - begin) / order), 1)
        plan = plan_steps(config, num_steps, math.prod(grid))
        return cls(config, scheduler.timesteps, grid, order, plan, samples=batch)

    @property
    def regions(self) -> int:
        return math.prod(self.grid)

    @property
    def dense(self) -> bool:
        """Whether no step can be sparse."""
        return min(self.plan) == self.regions

    @property
    def step(self) -> int:
        return self.stages // self.order

    @property
    def over(self) -> bool:
        return self.step >= len(self.plan)

    def count(self, active: Tensor | None, batch: int, text_tokens: int, main: bool) -> None:
        """Note a call of the transformer that computes these rows, `(B, k)`, or all."""
        self.tokens_total += batch * self.regions
        self.tokens_computed += batch * (self.regions if active is None else active.shape[1])
        self.text_tokens += batch * text_tokens
        if not main:
            return
        if self.begun != self.step or self.unseen:
            self.begun = self.step
            self.steps_dense += active is None
            self.steps_sparse += active is not None
        if active is None:
            self.calls_dense += 1
            return
        assert self.active is not None
        if self.active_counts is None or len(self.active_counts) != len(self.active):
            shape = (len(self.active), self.regions)
            self.active_counts = normal_empty(self.active, shape).zero_()
        self.active_counts.scatter_add_(1, self.active, torch.ones_like(self.active))

    def stats(self, runs: int, warnings: tuple[str, ...]) -> Stats:
        counts = self.active_counts
        if counts is None:
            counts = torch.zeros(self.samples, self.regions, dtype=torch.int64)
        return Stats(
            config=self.config,
            runs=runs,
            steps_dense=self.steps_dense,
            steps_sparse=self.steps_sparse,
            steps_planned=len(self.plan),
            tokens_computed=self.tokens_computed,
            tokens_total=self.tokens_total,
            text_tokens=self.text_tokens,
            cache_bytes=self.cache_bytes,
            region_counts=(counts + self.calls_dense).unflatten(1, self.grid),
            warnings=warnings,
        )
