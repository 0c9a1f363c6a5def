"""The state of one run: its plan, where it is, and what is chosen for the step to come."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .branch import Branch
from .clock import Clock
from .family import Family
from .layout import Layout
from .plan import RunPlan
from .policy.carry import Carry
from .policy.edits import Edit
from .policy.selection import Selection
from .stats import Tally


@dataclass
class Run:
    """One generation, from a scheduler's new timesteps to its last step.

    Attributes:
        timesteps: The scheduler's, by whose identity a run is known.
        clock: The noise levels.
        planned: What each step computes.
        masked: `(S or 1, k)` regions that every partial step computes, or None.
        tally: What has been done.
        stage: Scheduler steps done; `clock.order` of them make a solver step.
        calls: How many calls of each kind there were in this stage.
        observed: Whether the scheduler's steps are seen, and calls are ours to leave out.
        layouts: Of calls, by their form.
        family: That of the transformer whose call was the step's first.
        first_index: The scheduler's `step_index` at the first step.
        selection: What regions are chosen by.
        carry: How much of what is expected of reused noise comes; None where it is not measured.
        active: `(S, k)` regions chosen for the step under way, or None.
        leader: The branch whose call was the step's first.
        thread: In which it began.
        obstacle: What others have put on the model that does not take a part of the tokens.
        regions: Whether there may be partial steps, for which keys and values are kept.
        edit: What is going to change of a picture.
        follows_edit: Whether that says what partial steps compute.
    """

    timesteps: Tensor
    clock: Clock
    planned: RunPlan
    masked: Tensor | None
    tally: Tally
    stage: int = 0
    calls: Counter[Any] = field(default_factory=Counter)
    observed: bool = True
    layouts: dict[Any, Layout] = field(default_factory=dict)
    family: Family | None = None
    first_index: int | None = None
    selection: Selection | None = None
    carry: Carry | None = None
    active: Tensor | None = None
    leader: Branch | None = None
    obstacle: str | None = None
    regions: bool = False
    edit: Edit | None = None
    follows_edit: bool = False
    thread: int = field(default_factory=threading.get_ident)

    @property
    def step(self) -> int:
        """The solver step under way, or to come."""
        return self.stage // self.clock.order

    @property
    def over(self) -> bool:
        """Whether all stages are done; Heun's last step has but one."""
        return self.stage >= len(self.clock.stages) - 1

    @property
    def sigma(self) -> float:
        """The noise level of the stage under way, or to come."""
        return self.clock.stages[self.stage]

    @property
    def count(self) -> int:
        """How many tokens the step under way, or to come, computes."""
        return self.planned.counts[self.step]

    @property
    def tensors(self) -> list[Tensor]:
        """All that it keeps to choose and to carry on by."""
        parts = self.selection, self.carry, self.edit
        return [tensor for part in parts if part is not None for tensor in part.tensors]

    def advance(self, scheduler: Any) -> bool:
        """Note a step of the scheduler; False if it is one that it takes again.

        Some pipelines set its index back and take a step twice, once for the sample alone.
        """
        index = getattr(scheduler, "step_index", None)
        stage = self.stage + 1
        if index is not None:
            if self.first_index is None:
                self.first_index = index - 1
            stage = index - self.first_index
        stage = min(max(stage, 0), len(self.clock.stages) - 1)
        moved, self.stage = stage != self.stage, stage
        self.calls.clear()
        return moved
