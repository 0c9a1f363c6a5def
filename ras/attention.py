"""Attention over cached keys and values: what the processors of all model families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import ras_kernels

from .projections import KeyValue, Projection, Rows
from .reuse import HeldNoise
from .tokens import room


@dataclass(frozen=True)
class Walk:
    """How the tokens of one call of the transformer go.

    Of all that RAS is, a compiled transformer sees this and what it refers to: tensors, and
    settings that are the same in each dense step and in each partial step of a run.

    Attributes:
        branch: The skipped layers of skip-layer guidance, or () for the main call.
        held: The noise of the branch.
        rows: `(B, k)` tokens whose noise is fresh in this step, or None for all.
        gain: `(B, N)` float32, how much of its last change is added to each image token that does
            not walk, 0 for those that do; or None for nothing.
        caches: Whether keys and values are kept, as some step computes some of the tokens.
        skip: Whether nobody walks, and all noise is that of before.
        reuse_text: Whether the text stays behind where image tokens do.
    """

    branch: tuple[int, ...]
    held: HeldNoise
    rows: Tensor | None = None
    gain: Tensor | None = None
    caches: bool = False
    skip: bool = False
    reuse_text: bool = False

    @property
    def main(self) -> bool:
        """Whether it is the branch whose K and V may be cached. Any other computes all tokens."""
        return not self.branch

    @property
    def active(self) -> Tensor | None:
        """The rows that walk through the blocks, or None for all."""
        return self.rows if self.main else None

    @property
    def text_stays(self) -> bool:
        """Whether the text tokens do not walk."""
        return self.skip or (self.reuse_text and self.active is not None)


class KVCache:
    """One layer's keys and values of all tokens, `(B, N + T, G, D)`: image first, then text.

    Beside what a token last had, how that changed may be kept, to carry it on like its noise.
    """

    def __init__(self) -> None:
        self._kept: KeyValue | None = None
        self._changes: KeyValue | None = None  # (B, N, G, D), the image tokens' last changes
        self._image_tokens = 0

    def allocate(
        self,
        shape: tuple[int, int, int, int],
        text_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        carries: bool,
    ) -> None:
        """Make room, where it was if there is some; `update` with all tokens is what fills it.

        Args:
            shape: `(B, N, G, D)`, of the image tokens' keys.
            text_tokens: T, those that are attended to with the image.
            dtype, device: Of what is kept.
            carries: Whether to keep how they change.
        """
        batch, self._image_tokens, *rest = shape
        rows = (batch, self._image_tokens + text_tokens, *rest)
        key, value = self._kept or (None, None)
        self._kept = room(key, rows, dtype, device), room(value, rows, dtype, device)
        key, value = self._changes or (None, None)
        self._changes = None
        if carries:
            self._changes = room(key, shape, dtype, device), room(value, shape, dtype, device)

    def update(
        self, image: Rows | Projection, text: Rows | Projection | None, walk: Walk
    ) -> KeyValue:
        """Write this step's keys and values and return those of all tokens.

        Args:
            image: Of the image tokens that walk, `(B, k, G, D)`, or of all, `(B, N, G, D)`.
            text: Of the text tokens, `(B, T, G, D)`, if they are attended to with the image and
                walk in this step.
            walk: Of the main branch.
        """
        assert self._kept is not None, "allocated before the first step"
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

    def clear(self) -> None:
        self._kept = self._changes = None

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return [*(self._kept or ()), *(self._changes or ())]


class RASAttnProcessor:
    """Stands in an attention layer for the processor it found there, which it calls if idle."""

    replaces: ClassVar[tuple[type, ...]]
    """The processors that compute what this one does."""

    def __init__(self, original: Any, walk: Callable[[], Walk | None]) -> None:
        self.original = original
        self.walk = walk
        self.cache = KVCache()
