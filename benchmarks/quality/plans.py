"""Make the plans that ship with the bundled model, and their rivals of whole steps alone.

    python -m benchmarks.quality.plans

For each speed-up, `ras.calibrate` searches on captions that neither training nor the ruler ever
saw, with partial steps. Where its plan, for `ras/bundled/plans`, has some, it searches again
without; where it finds another one then, that is for `benchmarks/quality/plans`, so that the ruler
can tell what regions are worth.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import ras

from ..commands import COUNT, SPEEDUP, as_command
from ..model import scenes
from ..model.sd3 import load
from .ours import CALIBRATED, STEPS, WHOLE_STEPS, has_partial_steps

PROMPTS = 60_000_000  # seeds from here on
SHARES = 0.25, 0.5  # of partial steps


def main(argv: Sequence[str] | None = None) -> None:
    """Make the plans; the command line is `argv` (default: the process's own)."""
    parser = argparse.ArgumentParser(prog="benchmarks.quality.plans", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, default=ras.bundled_model())
    parser.add_argument("--prompts", type=COUNT, default=12)
    parser.add_argument("--speedups", type=SPEEDUP, nargs="+", default=CALIBRATED)
    parser.add_argument("--out", type=Path, default=ras.bundled_model() / "plans")
    parser.add_argument("--whole-steps", type=Path, default=WHOLE_STEPS)
    options = parser.parse_args(argv)
    search = partial(
        ras.calibrate,
        load(options.model),
        [scenes.sample(PROMPTS + i).caption() for i in range(options.prompts)],
        num_inference_steps=STEPS,
        batch_size=min(options.prompts, 16),
        guidance_scale=4.0,
        max_sequence_length=0,
    )
    for speedup in options.speedups:
        name = f"{speedup:g}x.json"
        plan = search(speedup=speedup, shares=SHARES)
        save(plan, options.out / name)
        whole = search(speedup=speedup, shares=()) if has_partial_steps(plan) else plan
        if (whole.shares, whole.extrapolation) == (plan.shares, plan.extrapolation):
            (options.whole_steps / name).unlink(missing_ok=True)
        else:
            save(whole, options.whole_steps / name)


def save(plan: ras.Plan, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    plan.save(path)
    print(f"{path}: {plan.note}", flush=True)


if __name__ == "__main__":
    as_command(main)
