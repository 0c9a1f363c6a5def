"""Pipelines that share a transformer."""

import copy
import functools

from .zoo import ENTRIES

PLAN = (1, 1, 0.5, 0, 1, 0.25, 0.5, 0)
STEPS = len(PLAN)
NAMES = ["sd3", "flux", "qwen", "wan", "z-image"]  # guidance in one call, none, in two; lists


def twins(name):
    """A pipeline, another one of its parts with a scheduler of its own, and what runs either."""
    pipe, call = ENTRIES[name].build()
    other = copy.copy(pipe)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    assert other.transformer is pipe.transformer and other.scheduler is not pipe.scheduler
    return pipe, other, functools.partial(call, STEPS)
