"""The layout of a sample's tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from .checks import check_count, shown

ASPECT = 0.1  # how much more oblong a picture may be than the image, by the logarithm


@dataclass(frozen=True)
class Layout:
    """Which tokens walk through a transformer.

    Attributes:
        grid: Tokens of the noise along each dimension: height and width of an image, frames,
            height and width of a video. `()` where nobody says where the tokens are: the whole
            output is then one token.
        text: Text tokens in the same attention.
        references: Tokens that come after the noise's, only condition, and stay behind in partial
            steps: pictures to edit, and padding.
        pictures: Of those, height and width in tokens of each picture, in their order; the padding
            is what is left.

    Raises:
        TypeError, ValueError: No whole numbers, numbers below 1 (in grids) or 0, or pictures of
            more tokens than there are references.
    """

    grid: tuple[int, ...] = ()
    text: int = 0
    references: int = 0
    pictures: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", _sizes("grid", self.grid))
        check_count("text", self.text, 0)
        check_count("references", self.references, 0)
        if not isinstance(self.pictures, list | tuple):
            raise TypeError(f"pictures must be a tuple of grids, got {shown(self.pictures)}")
        pictures = tuple(_sizes("pictures", sides) for sides in self.pictures)
        if any(len(sides) != 2 for sides in pictures):
            raise ValueError(
                f"pictures must be of height and width each, got {shown(self.pictures)}"
            )
        if sum(map(math.prod, pictures)) > self.references:
            raise ValueError(
                f"pictures must be among the references, {self.references} tokens, got "
                f"{shown(self.pictures)}"
            )
        object.__setattr__(self, "pictures", pictures)

    @property
    def tokens(self) -> int:
        """N, those of the noise."""
        return math.prod(self.grid)

    @cached_property
    def picture(self) -> tuple[int, tuple[int, int]] | None:
        """The first picture that is about as oblong as the image: the reference that it begins at,
        and its sides. None where there is none."""
        begin = 0
        for height, width in self.pictures if len(self.grid) == 2 else ():
            if abs(math.log(height * self.grid[1] / (width * self.grid[0]))) <= ASPECT:
                return begin, (height, width)
            begin += height * width
        return None

    def under(self, count: int) -> int:
        """How many references walk with so many tokens of the noise, those of the picture there."""
        whole = 0 if self.picture is None else math.prod(self.picture[1])
        return -(-count * whole // self.tokens) if whole else 0

    @property
    def image(self) -> int:
        """N + R, those of the noise and the references."""
        return self.tokens + self.references

    @property
    def sequence(self) -> int:
        """N + R + T, all that a dense step computes."""
        return self.image + self.text

    def __str__(self) -> str:
        if not self.grid:
            return "whole outputs"
        references = f", {self.references} reference" if self.references else ""
        return f"{self.tokens} image{references} and {self.text} text tokens"


def _sizes(name: str, given: Any) -> tuple[int, ...]:
    if not isinstance(given, list | tuple):
        raise TypeError(f"{name} must be a tuple of whole numbers, got {shown(given)}")
    for size in given:
        check_count(name, size)
    return tuple(map(int, given))


class Rows(Enum):
    """What has a row per token, and along which dimension."""

    IMAGE = 1, True, False
    """`(B, n, ...)`, rows of the image's tokens."""
    JOINT = 1, True, True
    """`(B, n, ...)`, rows of the image's and the text's tokens."""
    TABLE = 0, True, False
    """`(n, ...)`, rows of the image's tokens, the same for all samples."""
    JOINT_TABLE = 0, True, True
    """`(n, ...)`, rows of the image's and the text's tokens, the same for all samples."""
    GRID = 2, True, False
    """`(B, C, f, h, w)`: from the third dimension on, the tokens' grid."""
    TEXT = 1, False, True
    """`(B, T, ...)`, rows of the text's tokens, which only context parallelism splits."""
    TEXT_TABLE = 0, False, True
    """`(T, ...)`, rows of the text's tokens, likewise."""

    @property
    def dim(self) -> int:
        return self.value[0]

    @property
    def image(self) -> bool:
        """Whether the image's rows are among them."""
        return self.value[1]

    @property
    def text(self) -> bool:
        """Whether the text's rows are among them."""
        return self.value[2]
