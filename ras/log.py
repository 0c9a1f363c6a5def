"""What runs tell of themselves to whoever asks: by `logging` under the name `ras`, else nobody.

`RAS_LOG=debug` in the environment writes it to the standard error: a line for each run at `info`,
its plan in signs (`#` dense, `+` some tokens, `.` nothing), and one for each step at `debug`.
Nothing is read from the device for it.
"""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("ras")
logger.addHandler(logging.NullHandler())

LEVELS = "debug", "info", "warning", "error"


def follow_environment() -> None:
    """Write to the standard error what `RAS_LOG` asks for, if it is set.

    Raises:
        ValueError: It is no level.
    """
    asked = os.environ.get("RAS_LOG", "")
    if not asked:
        return
    if asked.lower() not in LEVELS:
        raise ValueError(f"RAS_LOG must be one of {', '.join(LEVELS)}, got {asked!r}")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(asked.upper())
