"""Seeing the noise that a pipeline hands to its scheduler."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def noise_levels(scheduler: Any) -> tuple[float, ...]:
    """The noise level of each stage from the one that a run begins at, and that of the end.

    One read of the device before a run. A scheduler without `sigmas` is taken to have timesteps
    proportional to them.
    """
    begin = getattr(scheduler, "begin_index", None) or 0
    stages = len(scheduler.timesteps) - begin
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        train = scheduler.config.get("num_train_timesteps", 1000)
        sigmas = [*(scheduler.timesteps / train).tolist(), 0.0]
    levels = [float(sigma) for sigma in torch.as_tensor(sigmas).tolist()][begin:]
    return tuple(levels[: stages + 1])


def order_of(scheduler: Any) -> int:
    """Calls of `step`, and of the transformer, in a solver step: 2 for Heun's."""
    return getattr(scheduler, "order", 1)


def of_steps(levels: tuple[float, ...], order: int) -> tuple[float, ...]:
    """The noise level that each solver step begins at, and that of the end, out of all stages'."""
    return (*levels[:-1:order], levels[-1])


class StepWatch:
    """Tells `observe` the noise of each step of one scheduler, once the step is done.

    The scheduler's own `step` is called through a method on the instance, which `copy.deepcopy`
    binds to the copy; a copy is not observed.
    """

    def __init__(self, scheduler: Any, observe: Callable[[Tensor], None]) -> None:
        self.scheduler = scheduler
        self._before = vars(scheduler).get("step")
        self._observer = _Observer(scheduler, observe)
        step = _observed_step(type(scheduler), self._observer, self._before)
        self._step = types.MethodType(step, scheduler)
        scheduler.step = self._step

    def remove(self) -> None:
        """Take the method off; if somebody has put another on top of it, it only passes on."""
        self._observer.tell = None
        if vars(self.scheduler).get("step") is not self._step:
            return
        del self.scheduler.step
        covered = getattr(self._before, "observer", None)
        if self._before is not None and (covered is None or covered.tell is not None):
            self.scheduler.step = self._before


class _Observer:
    """Whom to tell of which scheduler's steps. It keeps neither alive: copies refer to it too."""

    def __init__(self, scheduler: Any, observe: Callable[[Tensor], None]) -> None:
        self.of = weakref.ref(scheduler)
        self.tell: weakref.WeakMethod | None = weakref.WeakMethod(observe)

    def __call__(self, scheduler: Any, noise: Tensor) -> None:
        observe = None if self.tell is None else self.tell()
        if observe is not None and scheduler is self.of():
            observe(noise)


def _observed_step(
    scheduler_type: Any, observer: _Observer, before: Callable[..., Any] | None
) -> Callable[..., Any]:
    @functools.wraps(scheduler_type.step)  # pipelines look at its signature
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if before is None or self is not observer.of():
            output = type(self).step(self, *args, **kwargs)
        else:
            output = before(*args, **kwargs)
        observer(self, args[0] if args else kwargs["model_output"])
        return output

    step.observer = observer  # type: ignore[attr-defined]
    return step
