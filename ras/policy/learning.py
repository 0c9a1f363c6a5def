"""Learning from one call of a pipeline: the plan by which it comes nearest, for all later ones."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch.utils._pytree import tree_leaves

from ..checks import check_kind, shown
from ..clock import EXTRAPOLATION
from ..config import RASConfig
from ..denoisers import transformers_of
from ..fingerprint import of_model, of_run
from ..plan import Plan, speedup_of
from ..scope import in_block, may_be_masked
from ..session import Session
from ..sessions import enabled_session
from ..warned import RASWarning
from .candidates import first_plans
from .error_model import ErrorModel, covariance
from .planner import plan_run
from .trials import Trials, check_free, clock_and_layout, mixed, sure_gain


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
            it may have a mask, or the file cannot be where it is to be. Once the pipeline has
            returned, what goes wrong (a run that breaks off, noise that is not finite, a file that
            cannot be written) is told by one warning.
    """
    session = _learner(pipe, file)
    dense = _Call(pipe, args, call)
    try:
        with diffusers_logging.tqdm(total=1, desc="learning") as bar:
            plan = _taught(pipe, session, dense, bar)
        session.learnt = plan.note
        if file is not None:
            plan.save(file)
    except (ValueError, OSError) as error:
        if not dense.made:
            raise
        warnings.warn(f"ras.learn: {error}", RASWarning, stacklevel=2)
    return dense.output


def _taught(pipe: Any, session: Session, dense: _Call, bar: Any) -> Plan:
    """The plan that the samples of a call are nearest by; the session plans by it from now on.

    The bar goes on by one for each call of the pipeline.
    """
    config = session.config
    trials = Trials(pipe, [dense], partial(_planning, session))
    measured = trials.dense(replace(config, speedup=1.0), bar.update)
    clock, layout = clock_and_layout(measured)
    prior = covariance(clock, config.extrapolation or EXTRAPOLATION)
    kernel = mixed(np.array(measured["kernel"]), measured["samples"], prior)
    model = ErrorModel(clock.weights, kernel, hold=config.extrapolation == 0)
    usual = plan_run(config, clock, layout).plan
    speedup = config.speedup or speedup_of(usual, layout, config)
    plans = first_plans(model, usual, speedup, clock.sigmas, layout, config)
    bar.total = 1 + len(plans)
    errors = {
        plan: trials.errors(replace(config, speedup=None, plan=plan), bar.update) for plan in plans
    }
    gains = {
        plan: -math.inf if found is None else sure_gain(found, errors[usual])
        for plan, found in errors.items()
    }
    best = max(plans, key=gains.__getitem__)
    gain = gains[best]
    samples = f"{measured['samples']} sample" + "s" * (measured["samples"] > 1)
    told = f"surely {gain:.1f} dB nearer than the default plan" if gain > 0 else "the default plan"
    note = f"{speedup:.3g}x in {clock.steps} steps, learnt from {samples}: {told}"
    here = of_model(transformers_of(pipe), session.origin.scheduler)
    plan = replace(best, note=note, made_for={**here, **of_run((), measured["guidance"])})
    if gain > 0:
        session.replan(replace(config, speedup=None, plan=plan))
    return plan


@contextmanager
def _planning(session: Session, config: RASConfig) -> Iterator[None]:
    """Have a session plan by other settings for a block, and tell of no run afterwards."""
    before = session.config
    session.replan(config)
    try:
        yield
    finally:
        session.replan(before)


def _learner(pipe: Any, file: Any) -> Session:
    """The session of a pipeline that can learn."""
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"learn takes a pipeline, got {type(pipe).__name__}")
    check_kind("file", file, str | PathLike | None, "a file's path, or None")
    session = enabled_session(pipe)
    if in_block(session) is not None:
        raise ValueError("ras.learn plans all later runs; call it outside of ras.settings")
    if may_be_masked(session.settings, pipe):
        raise ValueError(
            "there is nothing to learn where a mask says what steps compute; enable an inpainting "
            "pipeline with mask=False, and others with speedup= alone"
        )
    check_free(session.config, "there is nothing to learn")
    if file is not None and (Path(file).is_dir() or not Path(file).parent.is_dir()):
        raise ValueError(f"file must be a file's path in a folder that there is, got {shown(file)}")
    return session


class _Call:
    """A call of a pipeline that is made for its output first, and then again from the same noise.

    Attributes:
        output: What the first call returned.
        made: Whether it has returned.
    """

    def __init__(self, pipe: Any, args: tuple[Any, ...], call: dict[str, Any]) -> None:
        self.output: Any = None
        self.made = False
        self._pipe, self._args, self._call = pipe, args, call
        leaves = tree_leaves((args, call))
        self._generators = [each for each in leaves if isinstance(each, torch.Generator)]
        device = getattr(pipe, "_execution_device", pipe.device)  # of an offloaded one, too
        self._cuda = device if device.type == "cuda" else None
        self._begin = self._states()

    def _states(self) -> list[torch.Tensor]:
        states = [each.get_state() for each in self._generators] + [torch.get_rng_state()]
        return states + ([] if self._cuda is None else [torch.cuda.get_rng_state(self._cuda)])

    def _go_to(self, states: list[torch.Tensor]) -> None:
        for each, state in zip(self._generators, states, strict=False):
            each.set_state(state)
        torch.set_rng_state(states[len(self._generators)])
        if self._cuda is not None:
            torch.cuda.set_rng_state(states[-1], self._cuda)

    def __call__(self) -> None:
        if not self.made:
            self.output, self.made = self._pipe(*self._args, **self._call), True
            return
        signature = inspect.signature(type(self._pipe).__call__)
        given = signature.bind(self._pipe, *self._args, **self._call)
        if "output_type" in signature.parameters:
            given.arguments["output_type"] = "latent"
        after = self._states()
        self._go_to(self._begin)
        try:
            type(self._pipe).__call__(*given.args, **given.kwargs)
        finally:
            self._go_to(after)  # as if there had been the first call alone
