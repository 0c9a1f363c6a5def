"""Make the plans that ship with the bundled model, and their rivals of whole steps alone.

    python -m benchmarks.plans

For each speed-up, `ras.calibrate` searches twice on captions that neither training nor the ruler
ever saw: once with partial steps, for `ras/bundled/plans`, and once without, for
`benchmarks/plans`, so that the ruler can tell what regions are worth.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import ras

from . import scenes
from .model import load
from .ours import CALIBRATED, STEPS, WHOLE_STEPS

PROMPTS = 60_000_000  # seeds from here on


def main(argv: Sequence[str] | None = None) -> None:
    """Make the plans; the command line is `argv` (default: the process's own)."""
    parser = argparse.ArgumentParser(prog="benchmarks.plans", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", type=Path, default=ras.bundled_model())
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--speedups", type=float, nargs="+", default=CALIBRATED)
    parser.add_argument("--out", type=Path, default=ras.bundled_model() / "plans")
    parser.add_argument("--whole-steps", type=Path, default=WHOLE_STEPS)
    options = parser.parse_args(argv)
    pipe = load(options.model)
    pipe.set_progress_bar_config(disable=True)
    prompts = [scenes.sample(PROMPTS + i).caption() for i in range(options.prompts)]
    for folder, shares in ((options.out, (0.25, 0.5)), (options.whole_steps, ())):
        for speedup in options.speedups:
            plan = ras.calibrate(
                pipe,
                prompts,
                speedup=speedup,
                num_inference_steps=STEPS,
                shares=shares,
                batch_size=min(options.prompts, 16),
                guidance_scale=4.0,
                max_sequence_length=0,
            )
            folder.mkdir(parents=True, exist_ok=True)
            plan.save(folder / f"{speedup:g}x.json")
            print(f"{folder / f'{speedup:g}x.json'}: {plan.note}", flush=True)


if __name__ == "__main__":
    main()
