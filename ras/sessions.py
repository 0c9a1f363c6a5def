"""The sessions that there are of a model, and those that another one takes the place of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .callers import PIPELINES
from .denoisers import denoisers
from .family import Family
from .mount import Mount
from .session import Session


def session_of(model: object) -> Session | None:
    """The session of an enabled pipeline, or the last one of a transformer."""
    return next(reversed(sessions_of(model)), None)


def enabled_session(model: object) -> Session:
    """The session of a model. Raises ValueError if it is not enabled."""
    session = session_of(model)
    if session is None:
        raise ValueError(f"this {type(model).__name__} is not enabled; call ras.enable on it first")
    return session


def sessions_of(model: object) -> list[Session]:
    """The sessions of a pipeline's runs, or all of a transformer."""
    return _each(
        mount.sessions_of(model) if isinstance(model, PIPELINES) else mount.sessions
        for mount in _mounts(model)
    )


def replaced_by(model: object, scheduler: Any) -> list[Session]:
    """The sessions that end where a model is enabled.

    A pipeline's own, and those of a bare transformer, or of a pipeline that is gone, with its
    scheduler; for a bare transformer all but those of other pipelines with other schedulers; and
    whatever has lost its scheduler.
    """
    by_hand = not isinstance(model, PIPELINES)

    def ends(each: Session) -> bool:
        if each.origin.scheduler is None or each.origin.pipeline is model:
            return True
        same = each.origin.scheduler is scheduler
        return same or by_hand if each.origin.pipeline is None else same and by_hand

    return [each for each in _each(mount.sessions for mount in _mounts(model)) if ends(each)]


def _mounts(model: object) -> list[Mount]:
    return [mount for mount in map(Mount.of, denoisers(model)) if mount is not None]


def _each(lists: Iterable[list[Session]]) -> list[Session]:
    """All that are in some lists, each once."""
    return list(dict.fromkeys(session for sessions in lists for session in sessions))


def mount_of(transformer: nn.Module, family: Family, replaced: list[Session]) -> Mount:
    """A transformer's mount: that of the pipelines which share it, unless all are replaced.

    Raises:
        ValueError: They have another record of it.
    """
    found = Mount.of(transformer)
    if found is None or set(found.sessions) <= set(replaced):
        return Mount(transformer, family)
    if found.family != family:
        raise ValueError(
            f"this {family.model} is enabled for another pipeline with another record; call "
            "ras.disable on the transformer first"
        )
    return found
