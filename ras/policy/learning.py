"""Learning from one call of a pipeline: the plan by which it comes nearest, for all later ones."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch.utils._pytree import tree_leaves

from ..checks import check_kind, shown
from ..clock import EXTRAPOLATION
from ..config import DEFAULT_SPEEDUP
from ..denoisers import transformers_of
from ..fingerprint import of_model, of_run
from ..session import Session
from ..sessions import session_of
from .candidates import first_plans
from .error_model import ErrorModel, covariance
from .planner import plan_run
from .trials import Trials, clock_and_layout, mixed, sure_gain


def learn(
    pipe: DiffusionPipeline, *args: Any, file: str | PathLike[str] | None = None, **call: Any
) -> Any:
    """Call an enabled pipeline densely, and plan later calls by what that shows, if it pays.

    From the noise of the dense run come plans; these and the default one then make the same call
    again, from the same noise. The plan by which the samples are surely nearer to the dense ones,
    by the mean gain in dB less two standard errors, is that of later runs of this model, scheduler,
    step count and guidance, whatever the prompt; where there is none, the default stays. It takes a
    call of several samples to be sure: one must gain 8 dB. `ras.stats(pipe).learnt` says what was
    gained. `ras.calibrate` searches farther.

    Args:
        pipe: The pipeline. In its settings `speedup` is what is asked for.
        *args, **call: What it is called with.
        file: Where to write the plan, for `ras.enable(pipe, plan=file)`.

    Returns:
        What the pipeline returns of the dense run.

    Raises:
        TypeError: No pipeline, or no file's path.
        ValueError: The pipeline is not enabled, its settings say already what each step computes,
            it has a mask, the file cannot be where it is to be, or noise that is not finite.
    """
    session = _learner(pipe, file)
    config = session.config
    dense = _Call(pipe, args, call)
    trials = Trials(pipe, [dense], session.using)
    measured = trials.dense(replace(config, speedup=1.0), _nothing)
    clock, layout = clock_and_layout(measured)
    speedup = config.speedup or DEFAULT_SPEEDUP
    prior = covariance(clock, config.extrapolation or EXTRAPOLATION)
    kernel = mixed(np.array(measured["kernel"]), measured["samples"], prior)
    model = ErrorModel(clock.weights, kernel, hold=config.extrapolation == 0)
    usual = plan_run(config, clock, layout).plan
    assert trials.run is not None
    masked = trials.run.masked is not None
    plans = () if masked else first_plans(model, usual, speedup, clock.sigmas, layout, config)
    errors = {
        plan: trials.errors(replace(config, speedup=None, plan=plan), _nothing) for plan in plans
    }
    gains = {
        plan: -math.inf if found is None else sure_gain(found, errors[usual])
        for plan, found in errors.items()
    }
    best = max(plans, key=gains.__getitem__, default=usual)
    gain = gains.get(best, 0.0)
    samples = f"{measured['samples']} sample" + "s" * (measured["samples"] > 1)
    told = f"surely {gain:.1f} dB nearer than the default plan" if gain > 0 else "the default plan"
    note = f"{speedup:g}x in {clock.steps} steps, learnt from {samples}: {told}"
    here = of_model(transformers_of(pipe), session.scheduler)
    made_for = {**here, **of_run((), measured["guidance"])}
    plan = replace(best, note=note, made_for=made_for)
    if gain > 0:
        session.replan(replace(config, speedup=None, plan=plan))
    session.learnt = note
    if file is not None:
        plan.save(file)
    return dense.output


def _learner(pipe: Any, file: Any) -> Session:
    """The session of a pipeline that can learn."""
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"learn takes a pipeline, got {type(pipe).__name__}")
    check_kind("file", file, str | PathLike | None, "a file's path, or None")
    session = session_of(pipe)
    if session is None:
        raise ValueError(f"this {type(pipe).__name__} is not enabled; call ras.enable on it first")
    config = session.config
    if config.plan is not None or config.sample_ratio is not None or session.mask is not None:
        raise ValueError(
            "there is nothing to learn where plan=, sample_ratio= or mask= say what steps compute; "
            "enable with speedup= alone"
        )
    if file is not None and (Path(file).is_dir() or not Path(file).parent.is_dir()):
        raise ValueError(f"file must be a file's path in a folder that there is, got {shown(file)}")
    return session


class _Call:
    """A call of a pipeline that is made for its output first, and then again from the same noise.

    Attributes:
        output: What the first call returned.
    """

    output: Any = None

    def __init__(self, pipe: Any, args: tuple[Any, ...], call: dict[str, Any]) -> None:
        self._pipe, self._args, self._call = pipe, args, call
        leaves = tree_leaves((args, call))
        self._generators = [each for each in leaves if isinstance(each, torch.Generator)]
        self._begin = self._states()
        self._made = False

    def _states(self) -> list[torch.Tensor]:
        states = [each.get_state() for each in self._generators] + [torch.get_rng_state()]
        on_gpu = self._pipe.device.type == "cuda"
        return states + ([torch.cuda.get_rng_state(self._pipe.device)] if on_gpu else [])

    def _go_to(self, states: list[torch.Tensor]) -> None:
        for each, state in zip(self._generators, states, strict=False):
            each.set_state(state)
        torch.set_rng_state(states[len(self._generators)])
        if len(states) > len(self._generators) + 1:
            torch.cuda.set_rng_state(states[-1], self._pipe.device)

    def __call__(self) -> None:
        if not self._made:
            self.output, self._made = self._pipe(*self._args, **self._call), True
            return
        call, after = dict(self._call), self._states()
        if "output_type" in inspect.signature(type(self._pipe).__call__).parameters:
            call["output_type"] = "latent"
        self._go_to(self._begin)
        try:
            self._pipe(*self._args, **call)
        finally:
            self._go_to(after)  # as if there had been the first call alone


def _nothing() -> None:
    pass
