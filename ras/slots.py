"""Where RAS sits in a transformer, and how it stays there while others change the model.

peft wraps modules; `fuse_qkv_projections`, `load_ip_adapter` and PAG pipelines set processors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .attention import RASAttnProcessor, Walk


class HookSlot:
    """A forward hook on the submodule that is at `path`, whichever module that may be."""

    def __init__(self, transformer: nn.Module, path: str, hook: Callable[..., Any]) -> None:
        self._transformer, self._path, self._hook = transformer, path, hook
        self._module: nn.Module | None = None
        self._handle: Any = None

    def put_in_place(self) -> bool:
        """Return whether there was anything to do."""
        module = self._transformer.get_submodule(self._path)
        if module is self._module:
            return False
        self.remove()
        self._module, self._handle = module, module.register_forward_hook(self._hook)
        return True

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()


class ProcessorSlot:
    """Our processor in one attention layer, around whichever processor is there."""

    def __init__(
        self, attn: Any, kind: type[RASAttnProcessor], walk: Callable[[], Walk | None]
    ) -> None:
        self._attn, self._kind, self._walk = attn, kind, walk
        self._ours: RASAttnProcessor | None = None

    def obstacle(self) -> str | None:
        """The name of a processor that does what ours does not."""
        original = _original(self._attn.processor)
        return None if type(original) in self._kind.replaces else type(original).__name__

    def put_in_place(self) -> bool:
        """Return whether there was anything to do."""
        if self._ours is not None and self._attn.processor is self._ours:
            return False
        self._ours = self._kind(_original(self._attn.processor), self._walk)
        self._attn.set_processor(self._ours)
        return True

    def remove(self) -> None:
        if isinstance(self._attn.processor, RASAttnProcessor):
            self._attn.set_processor(_original(self._attn.processor))

    def clear(self) -> None:
        if self._ours is not None:
            self._ours.cache.clear()

    @property
    def nbytes(self) -> int:
        return 0 if self._ours is None else self._ours.cache.nbytes


def forget_fused_originals(transformer: nn.Module) -> None:
    """Take our processors out of what `unfuse_qkv_projections` is going to put back."""
    saved = getattr(transformer, "original_attn_processors", None)
    if isinstance(saved, dict):
        for name, processor in saved.items():
            saved[name] = _original(processor)


def _original(processor: Any) -> Any:
    """The processor beneath ours."""
    while isinstance(processor, RASAttnProcessor):
        processor = processor.original
    return processor
