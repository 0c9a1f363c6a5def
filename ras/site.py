"""One layer's site of attention: its keys and values, and what stands in for its processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import ras_kernels

from .output import HeldTokens
from .projections import KeyValue, Projected, Projection
from .tokens import room


@dataclass(frozen=True)
class Walk:
    """How the tokens of one call of the transformer go, if some of them may stay behind.

    Of all that RAS is, a compiled transformer sees this and what it refers to: tensors, and
    settings that are the same in each dense step and in each partial step of a run.

    Attributes:
        held: The noise of the branch.
        rows: `(B, k)` tokens whose noise is fresh in this step, or None for all.
        gain: `(B, N)` float32, how much of its last change is added to each image token that does
            not walk, 0 for those that do; or None for nothing.
        whole: Whether all tokens walk all the same, and keep no keys and values.
        reuse_text: Whether the text stays behind where image tokens do.
    """

    held: HeldTokens
    rows: Tensor | None = None
    gain: Tensor | None = None
    whole: bool = False
    reuse_text: bool = False

    @property
    def active(self) -> Tensor | None:
        """The rows that walk through the blocks, or None for all."""
        return None if self.whole else self.rows


class KVCache:
    """One layer's keys and values of all tokens, `(B, N + T, G, D)`: image first, then text.

    Beside what a token last had, how that changed may be kept, to carry it on like its noise.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        text_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        carries: bool,
    ) -> None:
        """Make room; `update` with all tokens is what fills it.

        Args:
            shape: `(B, N, G, D)`, of the image tokens' keys.
            text_tokens: T, those that are attended to with the image.
            dtype, device: Of what is kept.
            carries: Whether to keep how they change.
        """
        batch, self._image_tokens, *rest = shape
        rows = (batch, self._image_tokens + text_tokens, *rest)
        self._kept = room(None, rows, dtype, device), room(None, rows, dtype, device)
        self._changes: KeyValue | None = None  # (B, N, G, D), the image tokens' last changes
        if carries:
            changes = room(None, shape, dtype, device), room(None, shape, dtype, device)
            self._changes = changes

    def update(
        self, image: Projected | Projection, text: Projected | Projection | None, walk: Walk
    ) -> KeyValue:
        """Write this step's keys and values and return those of all tokens.

        Args:
            image: Of the image tokens that walk, `(B, k, G, D)`, or of all, `(B, N, G, D)`.
            text: Of the text tokens, `(B, T, G, D)`, if they are attended to with the image and
                walk in this step.
            walk: How the tokens go.
        """
        key, value = self._kept
        tokens = self._image_tokens
        image.put((key[:, :tokens], value[:, :tokens]), self._changes, walk.active)
        if text is not None:
            text.put((key[:, tokens:], value[:, tokens:]), None, None)
        if walk.gain is None or self._changes is None:
            return key, value
        carried = zip((key, value), self._changes)
        key, value = (
            ras_kernels.carry_tokens(cache, change, walk.gain) for cache, change in carried
        )
        return key, value

    def reset(self) -> None:
        """Forget what was, where it is."""
        for tensor in self.tensors:
            tensor.zero_()

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return [*self._kept, *(self._changes or ())]


class RASAttnProcessor:
    """Stands in an attention layer for the processor it found there, which it calls if idle."""

    replaces: ClassVar[tuple[type, ...]]
    """The processors that compute what this one does."""

    def __init__(self, original: Any, walk: Callable[[], Walk | None]) -> None:
        self.original = original
        self.walk = walk
        self.cache: KVCache | None = None
        """That of the branch under way."""
