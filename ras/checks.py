"""What settings and arguments are held to: one clear error, which says what would be right."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

MOST = 2**31 - 1  # of whatever is counted
MOST_STEPS = 10_000  # of a run


def check_number(name: str, value: object) -> None:
    """Raise TypeError unless it is a number, and ValueError if it is too large for a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number of less than 308 digits") from None


def check_whole(name: str, value: object) -> None:
    """Raise TypeError unless it is a whole number."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {shown(value)}")


def check_count(name: str, value: Any, least: int = 1, most: int = MOST) -> None:
    """Raise TypeError or ValueError unless it is a whole number from `least` on, up to `most`."""
    check_whole(name, value)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {shown(value)}")


def check_kind(name: str, value: object, kind: Any, what: str) -> None:
    """Raise TypeError unless it is of a kind, which `what` describes."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what}, got {shown(value)}")


def check_mapping(name: str, value: Any, key: Any, kind: Any, what: str) -> None:
    """Raise TypeError unless it is a mapping of such keys to such values."""
    check_kind(name, value, Mapping, what)
    for each, inner in value.items():
        if not isinstance(each, key) or not isinstance(inner, kind):
            raise TypeError(f"{name} must be {what}, got {shown(each)}: {shown(inner)}")


def shown(value: object) -> str:
    """A value for a message, which stays short, whatever the value."""
    try:
        text = repr(value)
    except Exception:  # too deep, too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:160]}… ({type(value).__name__})"
