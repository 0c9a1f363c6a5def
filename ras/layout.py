"""The layout of a sample's tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from .checks import check_count, shown


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

    Raises:
        TypeError, ValueError: No whole numbers, or numbers below 1 (in the grid) or 0.
    """

    grid: tuple[int, ...] = ()
    text: int = 0
    references: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.grid, list | tuple):
            raise TypeError(f"grid must be a tuple of whole numbers, got {shown(self.grid)}")
        for size in self.grid:
            check_count("grid", size)
        object.__setattr__(self, "grid", tuple(map(int, self.grid)))
        check_count("text", self.text, 0)
        check_count("references", self.references, 0)

    @property
    def tokens(self) -> int:
        """N, those of the noise."""
        return math.prod(self.grid)

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


class Rows(Enum):
    """What has a row per token, and along which dimension."""

    IMAGE = 1, False
    """`(B, n, ...)`, rows of the image's tokens."""
    JOINT = 1, True
    """`(B, n, ...)`, rows of the image's and the text's tokens."""
    TABLE = 0, False
    """`(n, ...)`, rows of the image's tokens, the same for all samples."""
    JOINT_TABLE = 0, True
    """`(n, ...)`, rows of the image's and the text's tokens, the same for all samples."""
    GRID = 2, False
    """`(B, C, f, h, w)`: from the third dimension on, the tokens' grid."""

    @property
    def dim(self) -> int:
        return self.value[0]

    @property
    def text(self) -> bool:
        """Whether the text's rows are among them."""
        return self.value[1]
