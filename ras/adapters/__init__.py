"""The supported model families."""

from __future__ import annotations

from .base import Adapter
from .lumina import LuminaNext
from .sd3 import SD3

ADAPTERS: tuple[Adapter, ...] = (SD3(), LuminaNext())


def adapter_for(transformer: object) -> Adapter:
    """The adapter of a transformer. Raises ValueError if there is none."""
    for adapter in ADAPTERS:
        if isinstance(transformer, adapter.model):
            return adapter
    known = ", ".join(adapter.model.__name__ for adapter in ADAPTERS)
    raise ValueError(
        f"{type(transformer).__name__} is not supported; supported transformers are: {known}"
    )
