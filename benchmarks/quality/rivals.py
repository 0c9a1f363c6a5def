"""The methods that RAS is measured against, each as settings for `benchmarks.quality.pareto`.

* Fewer steps of the same scheduler, the plainest of all, and of multistep solvers.
* The policy of RAS's published code, and the paper's as this library corrects it.
* The caches of diffusers and of cache-dit, see `benchmarks.quality.caches`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

import ras
import ras_kernels

from .caches import cache_dit, cache_dit_settings, diffusers_settings, takes_cache_dit
from .setting import STEPS, Calibrate, Setting, as_it_is

PUBLISHED_SCALE = 0.1  # what the published code uses, whatever its starvation_scale is set to


def settings(pipe: DiffusionPipeline, calibrate: Calibrate) -> list[Setting]:
    """The settings of all methods that can be had here.

    Args:
        pipe: What they are for.
        calibrate: Makes a run of `STEPS` steps with prompts that are not among those to be
            judged, for a method that has to learn something of the model first.
    """
    fewer = [
        Setting("fewer steps", f"{steps} steps", steps, as_it_is)
        for steps in (24, 20, 17, 14, 12, 10, 8, 7)
    ]
    solvers = [
        Setting(method, f"{steps} steps", steps, partial(solved, scheduler=scheduler))
        for method, scheduler in SOLVERS.items()
        for steps in (20, 17, 14, 12, 10, 8)
    ]
    regions = [
        Setting(method, f"ratio {ratio:g}", STEPS, partial(switch, ratio=ratio))
        for method, switch, ratios in (
            ("RAS, published", published, (0.5, 0.25)),
            ("RAS, paper", paper, (0.5, 0.25, 0.125)),
        )
        for ratio in ratios
    ]
    if not takes_solvers(pipe):
        solvers = []
    return (
        fewer + solvers + regions + diffusers_settings(pipe, calibrate) + cache_dit_settings(pipe)
    )


def left_out(pipe: DiffusionPipeline) -> list[str]:
    """What `settings` cannot have here, in words."""
    said = []
    if not takes_solvers(pipe):
        said.append("Multistep solvers do not take its noise levels: left out")
    if takes_cache_dit(pipe) and cache_dit() is None:
        said.append("cache-dit is not installed: left out")
    return said


# --- solvers ------------------------------------------------------------------------------------

SOLVERS = {
    "DPM++ 2M, fewer steps": partial(DPMSolverMultistepScheduler, solver_order=2),
    "UniPC, fewer steps": partial(UniPCMultistepScheduler, solver_order=2),
}


def takes_solvers(pipe: DiffusionPipeline) -> bool:
    """FLUX's pipelines hand their own noise levels to the scheduler, which these refuse."""
    return "Flux" not in type(pipe).__name__


@contextmanager
def solved(pipe: DiffusionPipeline, scheduler: Callable[..., Any]) -> Iterator[None]:
    """Another solver of the same equation, along the same shift of the noise levels."""
    own, config = pipe.scheduler, pipe.scheduler.config
    shift = config.get("flow_shift", config.get("shift"))
    pipe.scheduler = scheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    try:
        yield
    finally:
        pipe.scheduler = own


# --- RAS as it was ------------------------------------------------------------------------------


@contextmanager
def paper(pipe: DiffusionPipeline, ratio: float) -> Iterator[None]:
    with ras.enabled(pipe, ras.RASConfig.paper(sample_ratio=ratio)):
        yield


@contextmanager
def published(pipe: DiffusionPipeline, ratio: float) -> Iterator[None]:
    """The paper's schedule with the selection of the published code."""
    run: Any = None
    drops: Tensor | None = None

    def select(
        scores: Tensor, ages: Tensor, num_active: int, *, high_ratio: float, **_: Any
    ) -> tuple[Tensor, Tensor]:
        nonlocal run, drops
        if drops is None or run is not pipe.scheduler.timesteps:
            run, drops = pipe.scheduler.timesteps, torch.zeros_like(ages)
        active, drops = published_selection(scores, drops, num_active, high_ratio)
        return active, ages

    ours = ras_kernels.select_regions
    with paper(pipe, ratio):
        ras_kernels.select_regions = select
        try:
            yield
        finally:
            ras_kernels.select_regions = ours


def published_selection(
    scores: Tensor, drops: Tensor, num_active: int, high_ratio: float
) -> tuple[Tensor, Tensor]:
    """What the code of arXiv 2502.10389 does (https://github.com/microsoft/RAS).

    A region that was dropped gets a higher score, and those of high scores are dropped again. The
    published code rounds both shares of the dropped down, which may drop one less than here.

    Args:
        scores: `(B, N)`.
        drops: `(B, N)` integers: how often a region was dropped since the run began. Nothing
            resets them, neither being chosen nor a dense step.
        num_active: Regions to choose per sample.
        high_ratio: Share of the dropped regions that have the highest scores.

    Returns:
        The chosen regions `(B, num_active)` in ascending order, and the new drops `(B, N)`.
    """
    dropped = scores.shape[1] - num_active
    low = dropped - int(high_ratio * dropped)
    ranking = (scores * torch.exp(PUBLISHED_SCALE * drops)).argsort(dim=1, stable=True)
    active = ranking[:, low : low + num_active].sort(dim=1).values
    return active, (drops + 1).scatter(1, active, drops.gather(1, active))
