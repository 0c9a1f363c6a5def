"""Runs of a pipeline, dense and with RAS in turn, and the figures of both."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageChops

import ras

from ..pictures import animated, difference_map, psnr
from ..pictures.panels import comparison
from ..stats import aligned
from .loading import Pipeline, quiet

WARM_UP_STEPS = 6  # enough to meet both kinds of step
REPEATS = 5  # of each timed run, unless they take long
PATIENCE = 10.0  # seconds of dense runs after which none is repeated


@dataclass(frozen=True)
class Run:
    """An image and the seconds that the pipeline's whole call took, from prompt to pixels."""

    image: Image.Image
    seconds: float


@dataclass(frozen=True)
class RasRun(Run):
    stats: ras.Stats


@dataclass(frozen=True)
class Job:
    """What is run.

    Attributes:
        pipe, device: The pipeline, and where it is.
        call: Arguments of its call, all but those below.
        steps, seed: Solver steps, and the seed of the noise.
        config, mask: What RAS is enabled with.
    """

    pipe: Pipeline
    device: torch.device
    call: dict[str, Any]
    steps: int
    seed: int
    config: ras.RASConfig
    mask: Any = None

    def compare(self) -> tuple[list[Run], list[RasRun]]:
        """Dense and RAS runs in turn, as many of each, after a warm-up: one if long, more if brief.

        Raises:
            ValueError: The pipeline makes no images, or RAS refuses it.
        """
        self.warm_up()
        dense: list[Run] = []
        sparse: list[RasRun] = []
        with quiet(diffusers_logging):  # what there is to say of the prompt has been said
            while len(dense) < REPEATS and sum(run.seconds for run in dense) < PATIENCE:
                dense.append(self.run("dense", self.steps))
                sparse.append(self.run_ras("RAS", self.steps))
        return dense, sparse

    def warm_up(self) -> None:
        """Make a brief run of either kind, in which all is done that is done once.

        Raises:
            ValueError: The pipeline makes no images, or RAS refuses it.
        """
        steps = min(self.steps, WARM_UP_STEPS)
        self.run_ras("warm-up", steps)  # first, since it may refuse the model
        with quiet(diffusers_logging):
            self.run("warm-up", steps)

    def report(self, dense: list[Run], sparse: list[RasRun]) -> dict[str, Any]:
        """What was run, and what was measured."""
        return {
            "device": str(self.device),
            "dtype": str(self.pipe.transformer.dtype).removeprefix("torch."),
            "seed": self.seed,
            "steps": self.steps,
            "width": sparse[0].image.width,
            "height": sparse[0].image.height,
            "config": dataclasses.asdict(self.config),
            **figures(dense, sparse),
        }

    def run_ras(self, label: str, steps: int) -> RasRun:
        """An image with RAS; its statistics hold the warnings."""
        with self._enabled():
            run = self.run(label, steps)
            return RasRun(run.image, run.seconds, ras.stats(self.pipe))

    def animate(self, file: Path | None) -> str | None:
        """Write an animation, if asked for, of one more run, as decoding images takes time."""
        if file is None:
            return None
        with self._enabled(), animated(self.pipe, file), quiet(diffusers_logging):
            self.run("animation", self.steps)
        return str(file)

    @contextmanager
    def _enabled(self) -> Iterator[None]:
        with warnings.catch_warnings(), ras.enabled(self.pipe, self.config, mask=self.mask):
            warnings.simplefilter("ignore", ras.RASWarning)
            yield

    def run(self, label: str, steps: int) -> Run:
        """One image, with a bar of that label on a terminal."""
        generator = torch.Generator().manual_seed(self.seed)
        pipe, terminal = self.pipe, sys.stderr.isatty()
        pipe.set_progress_bar_config(desc=label, leave=False, disable=not terminal)
        start = clock(self.device)
        output = pipe(num_inference_steps=steps, generator=generator, **self.call)
        seconds, images = clock(self.device) - start, getattr(output, "images", None)
        if images is None or not isinstance(images[0], Image.Image):
            raise ValueError(f"{type(pipe).__name__} makes no images, which is what is shown")
        return Run(images[0], seconds)


def clock(device: torch.device | str) -> float:
    """Seconds on a clock, read when the device has nothing left to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def figures(dense: list[Run], sparse: list[RasRun]) -> dict[str, Any]:
    """What was measured; what needs a dense run is None without one.

    Times are medians in seconds. An infinite PSNR is None, and `identical` says so.
    """
    stats = sparse[0].stats
    seconds = statistics.median(run.seconds for run in sparse)
    found: dict[str, Any] = {
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
        decibels = psnr(dense[0].image, sparse[0].image)
        found["seconds_dense"] = statistics.median(run.seconds for run in dense)
        found["speedup"] = found["seconds_dense"] / seconds
        found["psnr_db"] = finite(decibels)
        found["identical"] = decibels == math.inf
    return found


def finite(decibels: float) -> float | None:
    """What JSON can hold of a PSNR."""
    return decibels if math.isfinite(decibels) else None


def times_computed(stats: ras.Stats) -> torch.Tensor:
    """How often each region was computed, `(S, rows, columns)`; the image is one where nobody says
    where its tokens are."""
    counts = stats.region_counts
    return torch.full((1, 1, 1), stats.steps_dense) if counts is None else counts


def side_by_side(
    panels: list[tuple[str, Image.Image]], sparse: RasRun, report: dict[str, Any], more: list[str]
) -> Image.Image:
    """Images by their titles, the last two's difference, the map of regions, and the figures.

    These two are the dense image and that with RAS; the map is of how often each was computed.
    """
    dense, image = (each.convert("RGB") for _, each in panels[-2:])
    most = int(np.asarray(ImageChops.difference(dense, image)).max())
    counts = times_computed(sparse.stats)
    told = [
        f"{report['steps']} steps",
        f"{report['steps_dense']} steps dense, {report['steps_sparse']} sparse, "
        f"{report['steps_skipped']} skipped",
        f"seed {report['seed']}",
        f"speed-up {report['speedup']:.2f}x (ceiling {report['speedup_ceiling']:.2f}x)",
        difference(report),
        *more,
    ]
    return comparison(
        [*panels, (f"Difference, at most {most}", difference_map(dense, image))],
        counts[0].cpu().numpy(),
        "Times computed",
        caption=(report["prompt"], " · ".join(told)),
    )


def difference(report: dict[str, Any]) -> str:
    return "identical" if report["identical"] else f"PSNR {report['psnr_db']:.1f} dB"


def lines(report: dict[str, Any]) -> dict[str, str]:
    """The report's main figures by name."""
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
        return {"RAS": ras_run, "ceiling": ceiling, "timed": "one run, without a warm-up"}
    runs = "one run each" if report["runs"] == 1 else f"medians of {report['runs']} runs each"
    return {
        "dense": f"{report['seconds_dense']:.2f} s",
        "RAS": ras_run,
        "speed-up": f"{report['speedup']:.2f}x, where the token count allows {ceiling}",
        "difference": difference(report),
        "timed": f"{runs}, in turn after a warm-up, from prompt to pixels",
    }


def tell(report: dict[str, Any], lines: dict[str, str], *, as_json: bool) -> None:
    """Print the report, and its warnings apart."""
    for warning in report["warnings"]:
        print("ras: warning:", warning, file=sys.stderr)
    written = ", ".join(filter(None, (report["out"], report["animation"])))
    print(json.dumps(report, indent=2) if as_json else aligned(lines | {"written": written}))
