"""Attention over cached keys and values: what the processors of all model families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import ras_kernels

KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Walk:
    """How the tokens of one call of the transformer go.

    Attributes:
        branch: The skipped layers of skip-layer guidance, or () for the main call.
        rows: `(B, k)` tokens whose noise is fresh in this step, or None for all.
    """

    branch: tuple[int, ...]
    rows: Tensor | None

    @property
    def main(self) -> bool:
        """Whether K and V are cached. Another branch has other ones, and computes all tokens."""
        return not self.branch

    @property
    def active(self) -> Tensor | None:
        """The rows that walk through the blocks, or None for all."""
        return self.rows if self.main else None


class KVCache:
    """One layer's keys and values of all tokens, `(B, N + T, G, D)`: image first, then text."""

    def __init__(self) -> None:
        self._kept: KeyValue | None = None

    def update(self, image: KeyValue, text: KeyValue | None, active: Tensor | None) -> KeyValue:
        """Write this step's keys and values and return those of all tokens.

        Args:
            image: Of the image tokens that walk, `(B, k, G, D)`, or of all, `(B, N, G, D)`.
            text: Of the text tokens, `(B, T, G, D)`, if they are attended to with the image.
            active: `(B, k)` image tokens that walk, or None for all, which starts the cache.
        """
        text_tokens = 0 if text is None else text[0].shape[1]
        if active is None:
            self._kept = self._room(image, image[0].shape[1] + text_tokens)
        assert self._kept is not None
        for index, cached in enumerate(self._kept):
            tokens = cached[:, : cached.shape[1] - text_tokens]
            if active is None:
                tokens.copy_(image[index])
            else:
                ras_kernels.scatter_tokens_(tokens, active, image[index])
            if text is not None:
                cached[:, cached.shape[1] - text_tokens :] = text[index]
        return self._kept

    def clear(self) -> None:
        self._kept = None

    @property
    def nbytes(self) -> int:
        return sum(cached.nbytes for cached in self._kept or ())

    def _room(self, image: KeyValue, rows: int) -> KeyValue:
        """The cache as it is if `image` fits, else a new one."""
        key = image[0]
        shape = (key.shape[0], rows, *key.shape[2:])
        if self._kept is not None:
            old = self._kept[0]
            if (old.shape, old.dtype, old.device) == (shape, key.dtype, key.device):
                return self._kept
        return normal_empty(key, shape), normal_empty(key, shape)


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
