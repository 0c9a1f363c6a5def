"""`ras generate`: an image, dense and with RAS, and the figures of both."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image

import ras

from ..files import written_whole
from ..stats import aligned
from . import pictures
from .loading import Pipeline, load, quiet

BUNDLED_CALL: dict[str, Any] = {"guidance_scale": 4.0, "max_sequence_length": 0}
"""What the bundled model's pipeline is called with: it was trained without T5's tokens."""

WARM_UP_STEPS = 6  # enough to meet both kinds of step
REPEATS = 5  # of each timed run, unless they take long
PATIENCE = 10.0  # seconds of dense runs after which none is repeated


@dataclass(frozen=True)
class _Run:
    """An image and the seconds that the pipeline's whole call took, from prompt to pixels."""

    image: Image.Image
    seconds: float


@dataclass(frozen=True)
class _RasRun(_Run):
    stats: ras.Stats


def main(options: argparse.Namespace) -> None:
    """Make the image or images, write the picture and print what was measured."""
    plan = None if options.plan is None else ras.Plan.load(options.plan)
    config = ras.RASConfig(options.speedup, plan, options.sample_ratio)
    pipe = load(options)
    dense: list[_Run]
    sparse: list[_RasRun]
    if options.no_compare:
        dense, sparse = [], [_run_ras(pipe, options, config, "RAS", options.steps)]
    else:
        dense, sparse = _compare(pipe, options, config)
    report = {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "model": options.model or "bundled",
        "device": str(options.device),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "seed": options.seed,
        "steps": options.steps,
        "width": sparse[0].image.width,
        "height": sparse[0].image.height,
        "config": dataclasses.asdict(config),
        **_figures(dense, sparse),
        "out": str(options.out),
    }
    picture = _side_by_side(dense[0], sparse[0], report) if dense else sparse[0].image
    with written_whole(options.out) as part:
        picture.save(part)
    for warning in report["warnings"]:
        print("ras: warning:", warning, file=sys.stderr)
    print(json.dumps(report, indent=2) if options.json else _summary(report))


def _compare(
    pipe: Pipeline, options: argparse.Namespace, config: ras.RASConfig
) -> tuple[list[_Run], list[_RasRun]]:
    """Dense and RAS runs in turn, as many of each, after a warm-up: one if long, more if brief."""
    warm_up = min(options.steps, WARM_UP_STEPS)
    _run_ras(pipe, options, config, "warm-up", warm_up)  # first, since it may refuse the model
    dense: list[_Run] = []
    sparse: list[_RasRun] = []
    with quiet(diffusers_logging):  # what there is to say of the prompt has been said
        _run(pipe, options, "warm-up", warm_up)
        while len(dense) < REPEATS and sum(run.seconds for run in dense) < PATIENCE:
            dense.append(_run(pipe, options, "dense", options.steps))
            sparse.append(_run_ras(pipe, options, config, "RAS", options.steps))
    return dense, sparse


def _run_ras(
    pipe: Pipeline,
    options: argparse.Namespace,
    config: ras.RASConfig,
    label: str,
    steps: int,
) -> _RasRun:
    with warnings.catch_warnings(), ras.enabled(pipe, config):
        warnings.simplefilter("ignore", ras.RASWarning)  # the statistics repeat them
        run = _run(pipe, options, label, steps)
        return _RasRun(run.image, run.seconds, ras.stats(pipe))


def _run(pipe: Pipeline, options: argparse.Namespace, label: str, steps: int) -> _Run:
    """One image from the noise of the options' seed, with a bar of that label on a terminal."""
    call = dict(BUNDLED_CALL) if options.model is None else {}
    for name in ("height", "width", "negative_prompt", "guidance_scale"):
        if getattr(options, name) is not None:
            call[name] = getattr(options, name)
    generator = torch.Generator().manual_seed(options.seed)
    pipe.set_progress_bar_config(desc=label, leave=False, disable=not sys.stderr.isatty())
    start = clock(options.device)
    output = pipe(options.prompt, num_inference_steps=steps, generator=generator, **call)
    seconds, images = clock(options.device) - start, getattr(output, "images", None)
    if images is None or not isinstance(images[0], Image.Image):
        raise ValueError(f"{type(pipe).__name__} makes no images, which is what ras generate shows")
    return _Run(images[0], seconds)


def clock(device: torch.device | str) -> float:
    """Seconds on a clock, read when the device has nothing left to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _figures(dense: list[_Run], sparse: list[_RasRun]) -> dict[str, Any]:
    """What was measured; what needs a dense run is None without one.

    Times are medians in seconds. An infinite PSNR is None, and `identical` says so.
    """
    stats = sparse[0].stats
    seconds = statistics.median(run.seconds for run in sparse)
    figures: dict[str, Any] = {
        "runs": len(sparse),
        "seconds_dense": None,
        "seconds_ras": seconds,
        "speedup": None,
        "speedup_ceiling": stats.speedup_ceiling,
        "psnr_db": None,
        "identical": None,
        "steps_dense": stats.steps_dense,
        "steps_sparse": stats.steps_sparse,
        "steps_skipped": stats.steps_skipped,
        "calls_computed": stats.calls_computed,
        "calls_total": stats.calls_total,
        "tokens_computed": stats.tokens_computed,
        "tokens_total": stats.tokens_total,
        "text_tokens": stats.text_tokens,
        "cache_bytes": stats.cache_bytes,
        "warnings": list(stats.warnings),
    }
    if dense:
        psnr = pictures.psnr(dense[0].image, sparse[0].image)
        figures["seconds_dense"] = statistics.median(run.seconds for run in dense)
        figures["speedup"] = figures["seconds_dense"] / seconds
        figures["psnr_db"] = psnr if math.isfinite(psnr) else None
        figures["identical"] = psnr == math.inf
    return figures


def _side_by_side(dense: _Run, sparse: _RasRun, report: dict[str, Any]) -> Image.Image:
    counts = sparse.stats.region_counts
    if counts is None:  # nobody says where the tokens are: the image as a whole
        counts = torch.full((1, 1, 1), report["steps_dense"])
    figures = [
        f"{report['steps']} steps",
        f"{report['steps_dense']} steps dense, {report['steps_sparse']} sparse, "
        f"{report['steps_skipped']} skipped",
        f"seed {report['seed']}",
        f"speed-up {report['speedup']:.2f}x (ceiling {report['speedup_ceiling']:.2f}x)",
        _difference(report),
    ]
    return pictures.comparison(
        dense.image,
        sparse.image,
        counts[0].cpu().numpy(),
        titles=(
            f"Dense · {report['seconds_dense']:.2f} s",
            f"RAS · {report['seconds_ras']:.2f} s",
            "Times computed",
        ),
        caption=(report["prompt"], " · ".join(figures)),
    )


def _difference(report: dict[str, Any]) -> str:
    return "identical" if report["identical"] else f"PSNR {report['psnr_db']:.1f} dB"


def _summary(report: dict[str, Any]) -> str:
    """The report's main figures, one a line."""
    kind = "tokens" if report["tokens_total"] else "calls"
    share = report[f"{kind}_computed"] / report[f"{kind}_total"]
    what = "image tokens" if report["tokens_total"] else "transformer's calls"
    ras_run = (
        f"{report['seconds_ras']:.2f} s ({report['steps_dense']} dense steps, "
        f"{report['steps_sparse']} sparse and {report['steps_skipped']} skipped, {share:.0%} of "
        f"the {what})"
    )
    ceiling = f"{report['speedup_ceiling']:.2f}x"
    if report["speedup"] is None:
        lines = {"RAS": ras_run, "ceiling": ceiling, "timed": "one run, without a warm-up"}
    else:
        runs = "one run each" if report["runs"] == 1 else f"medians of {report['runs']} runs each"
        lines = {
            "dense": f"{report['seconds_dense']:.2f} s",
            "RAS": ras_run,
            "speed-up": f"{report['speedup']:.2f}x, where the token count allows {ceiling}",
            "difference": _difference(report),
            "timed": f"{runs}, in turn after a warm-up, from prompt to pixels",
        }
    lines["written"] = report["out"]
    return aligned(lines)
