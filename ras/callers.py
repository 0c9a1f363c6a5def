"""Who calls a transformer, which pipelines and threads may share."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.modular_pipelines import ModularPipeline

PIPELINES = DiffusionPipeline, ModularPipeline


def calling_pipeline() -> Any | None:
    """The innermost pipeline with a scheduler whose call is under way in this thread, or None.

    Nothing that a transformer is given says whose call it is; the stack does.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            caller = frame.f_locals.get("self")
            if isinstance(caller, PIPELINES) and getattr(caller, "scheduler", None) is not None:
                return caller
        frame = frame.f_back
    return None


class Turn:
    """Lets one thread at a time call a transformer, whose layers are told of one call.

    A thread that has the turn may take it again, once is enough to give it; so that a thread that
    was interrupted in a call is not in its own way.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    def take(self) -> None:
        if self._holder != threading.get_ident():
            self._lock.acquire()
            self._holder = threading.get_ident()

    def give(self) -> None:
        if self._holder == threading.get_ident():
            self._holder = None
            self._lock.release()

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *_: object) -> None:
        self.give()
