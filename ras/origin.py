"""The pipeline and the scheduler that runs come from, and what is watched there."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from .loops import LoopWatch
from .masks import MaskWatch
from .slots import Observe, StepWatch


class Origin:
    """A pipeline, or a scheduler alone, which it does not keep alive.

    Attributes:
        masks: Of an inpainting pipeline, what it has made of its mask.
    """

    def __init__(self, pipe: Any, scheduler: Any) -> None:
        """`scheduler` is that of loops by hand, where `pipe` is None."""
        self._pipe = None if pipe is None else weakref.ref(pipe)
        self._scheduler = weakref.ref(scheduler if pipe is None else pipe.scheduler)
        self._after_step: Callable[[], Observe | None] = lambda: None
        self._steps: StepWatch | None = None
        self._loop: LoopWatch | None = None
        self.masks: MaskWatch | None = None

    @property
    def pipeline(self) -> Any | None:
        """As long as there is one."""
        return None if self._pipe is None else self._pipe()

    @property
    def scheduler(self) -> Any | None:
        """The one in use, as long as there is one."""
        pipe = self.pipeline
        return self._scheduler() if pipe is None else pipe.scheduler

    def watch(self, after_step: Observe, broken_off: Callable[[], None]) -> None:
        """Watch the scheduler's steps, the pipeline's masks and its loop.

        Both are methods of an object that is not kept alive: see `StepWatch`, and `LoopWatch`.
        """
        pipe, self._after_step = self.pipeline, weakref.WeakMethod(after_step)
        if hasattr(pipe, "prepare_mask_latents"):
            self.masks = MaskWatch(pipe)
        if hasattr(pipe, "progress_bar"):
            self._loop = LoopWatch(pipe, broken_off)
        self.follow()

    def follow(self) -> Any:
        """Watch the steps of the scheduler in use, and return it."""
        scheduler, after_step = self.scheduler, self._after_step()
        if scheduler is None or after_step is None:
            return scheduler
        if self._steps is None or self._steps.scheduler is not scheduler:
            if self._steps is not None:
                self._steps.remove()
            self._scheduler = weakref.ref(scheduler)
            self._steps = StepWatch(scheduler, after_step)
        return scheduler

    def remove(self) -> None:
        """Take off whatever is still ours."""
        for watch in (self._steps, self.masks, self._loop):
            if watch is not None:
                watch.remove()
