"""Where RAS sits in a transformer, and how it stays there while others change the model.

peft wraps modules; `fuse_qkv_projections`, `load_ip_adapter` and PAG pipelines set processors.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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

    def allocate(
        self, batch: int, image_tokens: int, text_tokens: int, *, carries: bool, **kind: Any
    ) -> None:
        """Make room for the layer's keys and values; `kind` is their dtype and device."""
        assert self._ours is not None
        attn, size = self._attn, self._attn.inner_dim // self._attn.heads
        shape = batch, image_tokens, attn.inner_kv_dim // size, size
        joint = attn.added_kv_proj_dim is not None
        self._ours.cache.allocate(shape, text_tokens if joint else 0, carries=carries, **kind)

    def clear(self) -> None:
        if self._ours is not None:
            self._ours.cache.clear()

    @property
    def tensors(self) -> list[Tensor]:
        """The layer's cache."""
        return [] if self._ours is None else self._ours.cache.tensors


class ForwardSlot:
    """A method on a transformer that may answer a call in the place of its `forward`.

    A forward hook cannot keep the blocks from running. Offloading and compilation put things in
    the same place; what was there is called through to, and is back after `remove`, unless
    somebody has put another thing on top since.
    """

    def __init__(
        self, transformer: nn.Module, answer: Callable[..., Callable[[], Any] | None]
    ) -> None:
        """`answer(transformer, args, kwargs)` returns what makes the output, or None for `forward`.

        Compilers do not look into `answer`, but into what it returns, as into `forward`: some
        refuse a call in which there is nothing for them.
        """
        self._transformer, self._answer = transformer, answer
        self._found: Any = None
        self.reached = False
        """For `answer` to set: whether the call under way has come here."""
        self._put()

    def _put(self) -> None:
        transformer, answer = self._transformer, self._answer
        self._before = before = vars(transformer).get("forward")
        of = weakref.ref(transformer)  # a deep copy has this function too

        @torch.compiler.disable(recursive=False)
        @functools.wraps(type(transformer).forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            answered = answer(self, args, kwargs)
            if answered is not None:
                return answered()
            if before is None or self is not of():
                return type(self).forward(self, *args, **kwargs)
            return before(*args, **kwargs)

        self._ours = types.MethodType(forward, transformer)
        transformer.forward = self._ours

    def before_call(self) -> None:
        """Note what is in the place of `forward` when the transformer is called."""
        self._found, self.reached = vars(self._transformer).get("forward"), False

    def after_call(self) -> None:
        """Put it back if the call went past it, or took it off.

        Pipelines take model offloading off and put it on again when they return, and group
        offloading with streams changes its hooks in the first call: both set `forward` to what it
        was before they came.
        """
        now = vars(self._transformer).get("forward")
        if now is not self._ours and not (self.reached and now is self._found):
            self._put()

    def remove(self) -> None:
        if vars(self._transformer).get("forward") is not self._ours:
            return
        del self._transformer.forward
        if self._before is not None:
            self._transformer.forward = self._before


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
