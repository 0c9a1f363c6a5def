"""The layout of a sample's tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Which tokens walk through a transformer.

    Attributes:
        grid: Tokens of the noise along each dimension, height and width of an image. `()` where
            nobody says where the tokens are: the whole output is then one token.
        text: Text tokens in the same attention.
    """

    grid: tuple[int, ...] = ()
    text: int = 0

    @property
    def tokens(self) -> int:
        """N, those of the noise."""
        return math.prod(self.grid)

    def __str__(self) -> str:
        if not self.grid:
            return "whole outputs"
        return f"{self.tokens} image and {self.text} text tokens"
