"""The quality gate: what the default is worth at 2x on the bundled models, and by which plan.

    python -m benchmarks.quality.gate --write

Sixteen captions and sixteen edits that training never saw, and that no constant was chosen on, are
drawn densely and by `ras.enable(pipe, speedup=2)`. `tests/benchmarks/test_gate.py` does the same
and holds it against `benchmarks/results/gate.json`, which this writes: run it when a change of the
policy is meant to change a plan, and look at what it has changed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import ras
from ras.files import write_text

from ..commands import as_command
from ..tables import RESULTS
from .drawing import decode, draw, encode, items, model
from .measures import psnr
from .setting import STEPS

RECORD = RESULTS / "gate.json"
MODELS = "bundled", "kontext"
COUNT = 16
SPEEDUP = 2.0


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark on the command line `argv` (default: the process's own)."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality.gate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--write", action="store_true", help="write the record")
    options = parser.parse_args(argv)
    found = {name: measure(name) for name in MODELS}
    told = json.dumps(found, indent=1) + "\n"
    if options.write:
        write_text(RECORD, told)
    print(told, end="")


def measure(name: str) -> dict[str, Any]:
    """The mean PSNR to the dense images in dB, and the plan's shares."""
    pipe = model(name)
    asked = items(pipe, argparse.Namespace(count=2 * COUNT, half="b"))
    inputs = encode(pipe, asked)
    dense = decode(pipe, draw(pipe, inputs, STEPS))
    with ras.enabled(pipe, speedup=SPEEDUP):
        images = decode(pipe, draw(pipe, inputs, STEPS))
        plan = ras.stats(pipe).plan
    assert plan is not None
    return {"psnr": round(psnr(images, dense).mean().item(), 2), "plan": list(plan.shares)}


if __name__ == "__main__":
    as_command(main)
