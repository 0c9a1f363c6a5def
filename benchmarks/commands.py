"""What all commands have in common: numbers that are typed, and how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ras.cli.options import number

COUNT = number(int, 1, 2**31 - 1)
STEP = number(int, 0, 2**31 - 1)  # the first is 0, as is a seed
SHARE = number(float, 1e-6, 1)
SPEEDUP = number(float, 1)
DURATION = number(float, 0)


def as_command(main: Callable[[], Any]) -> None:
    """Run a command: what cannot be done is a line and status 2, and an interrupt status 130."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
