"""What runs are asked for, by `ras.enable` or for a block: settings of the thread that is in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple

from torch import Tensor

from .config import EDITED, RASConfig
from .plan import DENSE, SKIP


class Settings(NamedTuple):
    """What runs are asked for.

    Attributes:
        config: The settings.
        mask: `(S, 1, height, width)`, None for an inpainting pipeline's own, or False.
    """

    config: RASConfig
    mask: Tensor | Literal[False] | None


def asks_for_partial_steps(settings: Settings) -> str | None:
    """The setting that asks for partial steps, if any does."""
    config, mask = settings
    if isinstance(mask, Tensor):
        return "mask="
    if config.sample_ratio not in (None, 1):
        return "sample_ratio="
    shares = () if config.plan is None else config.plan.shares
    return "plan=" if any(SKIP < share < DENSE for share in shares) else None


def may_be_masked(settings: Settings, pipe: object) -> bool:
    """Whether a mask is given, or a pipeline's own is watched for."""
    mask = settings.mask
    return mask is not False and (mask is not None or hasattr(pipe, "prepare_mask_latents"))


def goes_by_pictures(settings: Settings, pipe: object) -> bool:
    """Whether plans are made by what a call is given: a mask, or a picture to edit."""
    return may_be_masked(settings, pipe) or settings.config.sample_ratio == EDITED


_BLOCKS: ContextVar[tuple[tuple[object, Settings], ...]] = ContextVar("ras.settings", default=())
"""Those that a thread, or a task, is in, the innermost last: whose they are, and what holds."""


def in_block(session: object) -> Settings | None:
    """What holds for a session in the innermost block of this thread that is of it."""
    return next((held for owner, held in reversed(_BLOCKS.get()) if owner is session), None)


@contextmanager
def using(session: object, settings: Settings) -> Iterator[None]:
    """Have runs of a session that this thread begins in a `with` block be by these settings."""
    block = session, settings
    _BLOCKS.set((*_BLOCKS.get(), block))
    try:
        yield
    finally:  # it may end in another context than it began in
        _BLOCKS.set(tuple(each for each in _BLOCKS.get() if each is not block))
