"""Attention over cached keys and values: what the processors of all model families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import ras_kernels

from .projections import KeyValue, Projection, Rows


@dataclass(frozen=True)
class Walk:
    """How the tokens of one call of the transformer go.

    Attributes:
        branch: The skipped layers of skip-layer guidance, or () for the main call.
        rows: `(B, k)` tokens whose noise is fresh in this step, or None for all.
        caches: Whether keys and values are kept, as some step computes some of the tokens.
        skip: Whether nobody walks, and all noise is that of before.
        extrapolates: Whether to keep how keys and values change.
        gain: `(B, N)` float32, how much of its last change is added to each image token's cached
            keys and values, 0 for those that walk; or None for nothing.
        reuse_text: Whether the text stays behind where image tokens do.
    """

    branch: tuple[int, ...]
    rows: Tensor | None
    caches: bool = True
    skip: bool = False
    extrapolates: bool = False
    gain: Tensor | None = None
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

    def update(
        self,
        image: Rows | Projection,
        text: Rows | Projection | None,
        active: Tensor | None,
        *,
        extrapolates: bool = False,
        gain: Tensor | None = None,
    ) -> KeyValue:
        """Write this step's keys and values and return those of all tokens.

        Args:
            image: Of the image tokens that walk, `(B, k, G, D)`, or of all, `(B, N, G, D)`.
            text: Of the text tokens, `(B, T, G, D)`, if they are attended to with the image and
                walk in this step.
            active: `(B, k)` image tokens that walk, or None for all, which starts the cache.
            extrapolates: Whether to keep how they change.
            gain: `(B, N)` float32, how much of its last change is added to each image token, 0
                for those that walk.
        """
        fresh_start = self._kept is None
        if active is None:
            self._image_tokens = image.shape[1]
            kept = self._room(image, self._image_tokens + (0 if text is None else text.shape[1]))
            fresh_start = fresh_start or kept is not self._kept
            self._kept = kept
        assert self._kept is not None
        if extrapolates and (self._changes is None or fresh_start):
            like, shape = image.like, (image.shape[0], self._image_tokens, *image.shape[2:])
            self._changes = normal_empty(like, shape).zero_(), normal_empty(like, shape).zero_()
        key, value = self._kept
        tokens = self._image_tokens
        changes = self._changes if extrapolates and not fresh_start else None
        image.put((key[:, :tokens], value[:, :tokens]), changes, active)
        if text is not None:
            text.put((key[:, tokens:], value[:, tokens:]), None, None)
        if gain is None or self._changes is None:
            return key, value
        carried = zip((key, value), self._changes)
        key, value = (ras_kernels.carry_tokens(cache, change, gain) for cache, change in carried)
        return key, value

    def clear(self) -> None:
        self._kept = self._changes = None

    @property
    def nbytes(self) -> int:
        return sum(cached.nbytes for cached in (*(self._kept or ()), *(self._changes or ())))

    def _room(self, image: Rows | Projection, rows: int) -> KeyValue:
        """The cache as it is if `image` fits, else a new one."""
        like, shape = image.like, (image.shape[0], rows, *image.shape[2:])
        if self._kept is not None:
            old = self._kept[0]
            if (old.shape, old.dtype, old.device) == (shape, like.dtype, like.device):
                return self._kept
        return normal_empty(like, shape), normal_empty(like, shape)


def read(kept: Tensor, rows: Tensor | None) -> Tensor:
    """The rows `(B, k)` of `(B, N, ...)`, or all (None)."""
    return kept if rows is None else ras_kernels.gather_tokens(kept, rows)


def write(kept: Tensor, rows: Tensor | None, new: Tensor) -> None:
    """Overwrite the rows `(B, k)` of `(B, N, ...)`, or all (None)."""
    if rows is None:
        kept.copy_(new)
    else:
        ras_kernels.scatter_tokens_(kept, rows, new)


def normal_empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised tensor that may be written to both inside and outside inference mode."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=like.dtype, device=like.device)


class RASAttnProcessor:
    """Stands in an attention layer for the processor it found there, which it calls if idle."""

    replaces: ClassVar[tuple[type, ...]]
    """The processors that compute what this one does."""

    def __init__(self, original: Any, walk: Callable[[], Walk | None]) -> None:
        self.original = original
        self.walk = walk
        self.cache = KVCache()
