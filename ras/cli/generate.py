"""`ras generate`: an image, dense and with RAS, and the figures of both."""

from __future__ import annotations

import argparse
from typing import Any

import ras

from ..files import writable, written_whole
from . import prompts
from .loading import load
from .options import IMAGES
from .runs import Job, RasRun, Run, lines, side_by_side, tell

BUNDLED_CALL: dict[str, Any] = {"guidance_scale": 4.0, "max_sequence_length": 0}
"""What the bundled model's pipeline is called with: it was trained without T5's tokens."""


def main(options: argparse.Namespace) -> None:
    """Make the image or images, write the picture and print what was measured."""
    if (options.prompt is None) == (options.prompts is None):
        raise ValueError("give a prompt, or a file of them by --prompts FILE")
    plan = None if options.plan is None else ras.Plan.load(options.plan)
    config = ras.RASConfig(options.speedup, plan, options.sample_ratio)
    call = {} if options.model else dict(BUNDLED_CALL)
    for name in ("height", "width", "negative_prompt", "guidance_scale"):
        if getattr(options, name) is not None:
            call[name] = getattr(options, name)
    if options.prompts is not None:
        prompts.main(options, config, call)
        return
    out = writable(options.out, IMAGES)
    pipe = load(options, ras.bundled_model())
    call["prompt"] = options.prompt
    job = Job(pipe, options.device, call, options.steps, options.seed, config)
    dense: list[Run]
    sparse: list[RasRun]
    if options.no_compare:
        dense, sparse = [], [job.run_ras("RAS", options.steps)]
    else:
        dense, sparse = job.compare()
    report = {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "model": options.model or "bundled",
        **job.report(dense, sparse),
        "out": str(out),
        "animation": job.animate(options.animate),
    }
    picture = sparse[0].image
    if dense:
        panels = [
            (f"Dense · {report['seconds_dense']:.2f} s", dense[0].image),
            (f"RAS · {report['seconds_ras']:.2f} s", picture),
        ]
        picture = side_by_side(panels, sparse[0], report, [])
    with written_whole(out) as part:
        picture.save(part)
    tell(report, lines(report), as_json=options.json)
