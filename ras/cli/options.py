"""Numbers that are typed."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable

from ..checks import shown

IMAGES = (".png", ".jpg", ".jpeg", ".webp")


def number(
    kind: type[int | float], low: float, high: float = sys.float_info.max
) -> Callable[[str], float]:
    """A converter of text into a finite number from `low` to `high`, both included."""
    noun = "a whole number" if kind is int else "a number"
    span = f"of at least {low}" if high == sys.float_info.max else f"from {low} to {high}"

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {noun} {span}, got {shown(text)}")
        return value

    return convert
