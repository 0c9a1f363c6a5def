"""The denoising loop of a pipeline's call: that it is the only one, and how it ends."""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

from .callers import PIPELINES, call_under_way, calls_under_way


class LoopWatch:
    """Calls `broken_off` when an exception of any kind ends the loop of a pipeline's call.

    Pipelines open a progress bar around their loop; what opens it is a method on the instance here.
    Whoever is gone in mid-run, a server's client, say, ends it by an exception.

    Two threads that call one pipeline at once give each other's settings to it and to its
    scheduler, so that both results may be wrong. That is a RuntimeError in each of them, as soon as
    it is known when its loop begins or ends.
    """

    def __init__(self, pipe: Any, broken_off: Callable[[], None]) -> None:
        self._pipe = weakref.ref(pipe)
        self._broken_off = weakref.WeakMethod(broken_off)
        self._before = before = _held_weakly(vars(pipe).get("progress_bar"))
        self._loop: _Loop | None = None  # under way
        self._disturbed: set[tuple[int, int]] = set()  # calls beside which there was another one
        self._lock = threading.RLock()  # whatever is collected meanwhile may end a loop
        watch = weakref.ref(self)

        @functools.wraps(type(pipe).progress_bar)
        def progress_bar(self: Any, *args: Any, **kwargs: Any) -> Any:
            owner, code = call_under_way([self]) or (self, None)  # copies have this method, too
            bar = before() or functools.partial(type(owner).progress_bar, owner)
            opened, seen = bar(*args, **kwargs), watch()
            if seen is None or code is None or owner is not seen._pipe():
                return opened
            return _Loop(opened, seen, code)

        self._function = progress_bar  # the method would keep the pipeline alive
        pipe.progress_bar = types.MethodType(progress_bar, pipe)

    def remove(self) -> None:
        """Take the method off, unless somebody has put another in its place."""
        pipe = self._pipe()
        if pipe is None:
            return
        if getattr(vars(pipe).get("progress_bar"), "__func__", None) is not self._function:
            return
        del pipe.progress_bar
        before = self._before()
        if before is not None:
            pipe.progress_bar = before

    def begin(self, loop: _Loop) -> None:
        with self._lock:
            if self._is_disturbed(loop):
                raise RuntimeError(self._told)
            self._loop = loop

    def end(self, loop: _Loop, error: type[BaseException] | None) -> None:
        with self._lock:
            if self._loop is not loop:  # another one has begun since
                return
            self._loop = None
            disturbed = self._is_disturbed(loop)
        broken_off = self._broken_off()
        if broken_off is not None and (disturbed or error is not None):
            broken_off()
        if disturbed and (error is None or issubclass(error, Exception)):
            raise RuntimeError(self._told)

    def _is_disturbed(self, loop: _Loop) -> bool:
        """Whether there is, or was, another thread's call beside this one's; note it for both."""
        calls = calls_under_way(self._pipe(), loop.code)
        mine = {call for call in calls if call[0] == threading.get_ident()}
        self._disturbed &= calls  # the others have ended
        if calls - mine:
            self._disturbed |= calls
        found = not mine.isdisjoint(self._disturbed)
        self._disturbed -= mine  # of which it is told now
        return found

    @property
    def _told(self) -> str:
        return (
            f"two threads call this {type(self._pipe()).__name__} at once, so that each changes "
            "the scheduler and the guidance of the other; hold a lock around each call, or give "
            "each thread a copy of the pipeline with a scheduler of its own, and ras.enable that"
        )


def _held_weakly(method: Any) -> Callable[[], Any]:
    """What returns a method, or None where the pipeline that it is of is gone."""
    if not isinstance(getattr(method, "__self__", None), PIPELINES):
        return lambda: method
    function, pipe = method.__func__, weakref.ref(method.__self__)

    def again() -> Any:
        owner = pipe()
        return None if owner is None else types.MethodType(function, owner)

    return again


class _Loop:
    """A progress bar, with word of when it is opened and closed."""

    def __init__(self, bar: Any, watch: LoopWatch, code: CodeType) -> None:
        self.code = code  # of the pipeline's call
        self._bar, self._watch = bar, watch

    def __enter__(self) -> Any:
        self._watch.begin(self)
        return self._bar.__enter__()

    def __exit__(self, *error: Any) -> Any:
        try:
            return self._bar.__exit__(*error)
        finally:
            self._watch.end(self, error[0])

    def __iter__(self) -> Iterator[Any]:
        with self as bar:
            yield from bar

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)
