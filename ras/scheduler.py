"""Seeing the noise that a pipeline hands to its scheduler."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor


class StepWatch:
    """Tells `observe` the noise of each step of one scheduler, once the step is done.

    The scheduler's own `step` is called through a method on the instance, which `copy.deepcopy`
    binds to the copy; a copy is not observed.
    """

    def __init__(self, scheduler: Any, observe: Callable[[Tensor], None]) -> None:
        self.scheduler = scheduler
        self._before = vars(scheduler).get("step")
        self._step = types.MethodType(_observed(scheduler, observe, self._before), scheduler)
        scheduler.step = self._step

    def remove(self) -> None:
        """Take the method off, unless somebody has put another on top of it."""
        if vars(self.scheduler).get("step") is not self._step:
            return
        del self.scheduler.step
        if self._before is not None and _in_use(self._before):
            self.scheduler.step = self._before


def _observed(scheduler: Any, observe: Callable[[Tensor], None], before: Any) -> Any:
    watched, observer = weakref.ref(scheduler), weakref.WeakMethod(observe)

    @functools.wraps(type(scheduler).step)  # pipelines look at its signature
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if before is None or self is not watched():
            output = type(self).step(self, *args, **kwargs)
        else:
            output = before(*args, **kwargs)
        tell = observer()
        if tell is not None and self is watched():
            tell(args[0] if args else kwargs["model_output"])
        return output

    step.observer = observer  # type: ignore[attr-defined]
    return step


def _in_use(step: Any) -> bool:
    """False for the method of a watch whose observer is gone."""
    observer = getattr(step, "observer", None)
    return observer is None or observer() is not None
