"""Who calls a transformer, which pipelines and threads may share."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.modular_pipelines import ModularPipeline

PIPELINES = DiffusionPipeline, ModularPipeline


def calling_pipeline(enabled: Iterable[Any] = ()) -> Any | None:
    """The innermost pipeline with a scheduler whose call is under way in this thread, or None.

    Nothing that a transformer is given says whose call it is; the stack does.

    Args:
        enabled: Pipelines that are found whatever the name of their `__call__`.
    """
    found = call_under_way(enabled)
    return None if found is None else found[0]


def call_under_way(enabled: Iterable[Any] = ()) -> tuple[Any, CodeType] | None:
    """That pipeline, and the code of its call."""
    kinds: Iterable[Any] = map(type, enabled)
    codes = {_code_of(kind) for kind in kinds}
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if (code.co_name == "__call__" or code in codes) and code.co_argcount:
            caller = _first_argument(frame)
            if isinstance(caller, PIPELINES) and getattr(caller, "scheduler", None) is not None:
                return caller, code
        frame = frame.f_back
    return None


def calls_under_way(pipe: Any, code: CodeType) -> set[tuple[int, int]]:
    """All calls of a pipeline, by this code: the identity of each one's thread, and of its frame.

    The latter is another call's as soon as that one has ended.
    """
    here, found = threading.get_ident(), set()
    for thread, innermost in sys._current_frames().items():
        frame: FrameType | None = innermost
        while frame is not None:
            if frame.f_code is code and _first_argument(frame, thread == here) is pipe:
                found.add((thread, id(frame)))
            frame = frame.f_back
        del innermost  # which may be this function's own, and would keep itself
    return found


def _first_argument(frame: FrameType, here: bool = True) -> Any:
    """That of a frame of this thread, or of another one."""
    names = frame.f_locals
    found = names.get(frame.f_code.co_varnames[0])
    # Before Python 3.13 this is what `locals()` returns there: a copy, which the frame would keep,
    # and which code that another thread runs there may be reading just now.
    if here and isinstance(names, dict):
        names.clear()
    return found


@functools.cache
def _code_of(kind: Any) -> CodeType | None:
    return getattr(inspect.unwrap(kind.__call__), "__code__", None)


class Turn:
    """Lets one thread at a time call a transformer, whose layers are told of one call.

    A thread that has the turn may take it again, and gives it once; so that a thread that was
    interrupted in a call is not in its own way.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    @property
    def mine(self) -> bool:
        """Whether this thread has it."""
        return self._holder == threading.get_ident()

    def take(self) -> None:
        while self._holder != threading.get_ident():
            if self._lock.acquire(timeout=1):
                self._holder = threading.get_ident()
            elif self._holder not in sys._current_frames():  # that thread has ended in a call
                self._give_up(self._holder)

    def give(self) -> None:
        if self._holder == threading.get_ident():
            self._give_up(self._holder)

    def _give_up(self, holder: int | None) -> None:
        if holder is not None and self._holder == holder:
            self._holder = None
            self._lock.release()

    @contextmanager
    def held(self) -> Iterator[None]:
        """For a `with` block; whoever had it before still has it afterwards."""
        had = self.mine
        self.take()
        try:
            yield
        finally:
            if not had:
                self.give()
