"""What a session warns of, once of each kind."""

from __future__ import annotations

import warnings


class RASWarning(UserWarning):
    """RAS does other than it was asked for; the message says what it does instead."""


class Warned:
    """Warns once of each kind.

    Attributes:
        messages: What there has been, by its kind.
    """

    def __init__(self) -> None:
        self.messages: dict[str, str] = {}

    def __call__(self, kind: str, message: str) -> None:
        if kind not in self.messages:
            self.messages[kind] = message
            warnings.warn(message, RASWarning, stacklevel=2)
