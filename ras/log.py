"""What runs tell of themselves to whoever asks: by `logging` under the name `ras`, else nobody.

`RAS_LOG=debug` in the environment writes it to the standard error: a line for each run at `info`,
its plan in signs (`#` dense, `+` some tokens, `.` nothing), and one for each step at `debug`.
Nothing is read from the device for it.
"""

from __future__ import annotations

import logging
import os

from torch import Tensor

from .layout import Layout
from .plan import DENSE, SKIP
from .run import Run

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


def tell_of_run(number: int, run: Run) -> None:
    """Log what a run is going to do."""
    signs = "".join({DENSE: "#", SKIP: "."}.get(share, "+") for share in run.planned.plan.shares)
    logger.info("run %d: %s, speed-up %.2f", number, signs, run.planned.speedup)


def tell_of_step(
    run: Run, layout: Layout, *, skip: bool, rows: Tensor | None, text_stays: bool
) -> None:
    """Log what a step does, by what the host knows."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    if skip or rows is None:
        told = ["nothing" if skip else "all tokens"]
    else:
        count = rows.shape[1]
        told = [f"{count} of {layout.tokens} tokens"]
        told += [f"{layout.under(count)} of {layout.references} references"] * bool(layout.pictures)
        told += ["no text"] * text_stays
    step = f"step {run.step} of {run.clock.steps} at {run.sigma:.3f}"
    logger.debug("%s: %s", step, ", ".join(told))
