"""One point of the ruler's plot, and what a method has to bring for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from diffusers import DiffusionPipeline

STEPS = 28  # of the dense reference, and of all runs but those of fewer steps

Switch = Callable[[DiffusionPipeline], AbstractContextManager[None]]
Calibrate = Callable[[DiffusionPipeline], None]


@dataclass(frozen=True)
class Setting:
    """One point of the plot.

    Attributes:
        method: The line that it is on, e.g. "fewer steps".
        label: Which point of the line it is, e.g. "14 steps".
        steps: The `num_inference_steps` of its runs.
        switch: Puts the method on a pipeline for a `with` block, and wholly takes it off again.
    """

    method: str
    label: str
    steps: int
    switch: Switch


@contextmanager
def as_it_is(pipe: DiffusionPipeline) -> Iterator[None]:
    yield
