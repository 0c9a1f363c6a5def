"""Finding a plan for one pipeline, from what its noise does on a few prompts."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..api import enabled, is_enabled
from ..checks import MOST_STEPS, check_count, check_kind, check_number, shown
from ..clock import EXTRAPOLATION
from ..config import DEFAULT_SPEEDUP, RASConfig
from ..denoisers import modules_of, transformers_of
from ..files import read_json, write_text
from ..fingerprint import differences, of_call, of_model, of_run, of_weights, plain
from ..plan import Plan, speedup_of
from .candidates import factors, first_plans, neighbours
from .error_model import ErrorModel, covariance
from .planner import TOLERANCE, plan_run
from .trials import Trials, by_sample, check_free, clock_and_layout, mixed, sure_gain

ROUNDS = 4  # of improving the plan by real runs
TRIED = 12  # plans in a round, those of least modelled error


def calibrate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    speedup: float = DEFAULT_SPEEDUP,
    num_inference_steps: int = 28,
    config: RASConfig | None = None,
    shares: Sequence[float] = (0.25, 0.5),
    batch_size: int = 8,
    seed: int = 0,
    checkpoint: str | PathLike[str] | None = None,
    **call: Any,
) -> Plan:
    """Search the plan that comes nearest to the dense images of some prompts at a given cost.

    The prompts' dense runs give the covariance of the noise between steps, from which comes the
    plan of least modelled error in an instant. Then plans near it are run: those whose dense steps
    lie elsewhere, and, where the model can take partial steps, those that trade a dense step for
    partial ones of the same cost. By how much nearer to the dense ones a plan's final latents are
    than the default plan's is known prompt by prompt: the one for which the mean of that, in dB,
    less two standard errors is greatest is kept, until no neighbour has more. Where no plan has
    more than nothing, the default plan comes back.

    Args:
        pipe: The pipeline; it must not be enabled, and is left as it was.
        prompts: What to calibrate on; 8 to 32 that are like those to come, at least two.
        speedup: Tokens of a dense run per token computed, text included.
        num_inference_steps: Of the runs to come: a plan is for one number of steps.
        config: The other settings of the runs to come, `RASConfig()` if None.
        shares: Sizes of partial steps to try, in (0, 1); () tries whole steps alone.
        batch_size: Prompts per call of the pipeline.
        seed: Prompt i is drawn from noise of the seed `seed + i`.
        checkpoint: A file to keep what has been measured in, from which a calibration of the same
            weights, scheduler and arguments goes on after an interruption.
        **call: Other arguments of the pipeline's call, such as `guidance_scale`.

    Returns:
        The plan, for `ras.enable(pipe, plan=…)` of this model and scheduler; `save` keeps it.

    Raises:
        TypeError: An argument of a wrong type.
        ValueError: A number out of its range, fewer than two prompts, settings that say already
            what each step computes, an enabled pipeline, one that RAS does not support or that
            returns no latents, or a checkpoint of another calibration, which says in what it
            differs.
    """
    if not callable(pipe) or isinstance(pipe, nn.Module):
        raise TypeError(f"calibrate takes a pipeline, got {type(pipe).__name__}")
    if not isinstance(prompts, Iterable) or isinstance(prompts, str | bytes | Mapping):
        raise TypeError(f"prompts must be a list of texts, got {shown(prompts)}")
    prompts = list(prompts)
    if len(prompts) < 2:
        raise ValueError(
            f"prompts must be at least two, since one shows no plan to be surely nearer; got "
            f"{len(prompts)}"
        )
    named = "prompt" in inspect.signature(type(pipe).__call__).parameters
    for prompt in prompts if named else ():  # elsewhere it may be an image, or a class
        check_kind("prompts", prompt, str, "a list of texts")
    check_number("speedup", speedup)
    check_count("num_inference_steps", num_inference_steps, most=MOST_STEPS)
    check_count("seed", seed, 0, 2**63 - 1)
    check_kind("checkpoint", checkpoint, str | PathLike | None, "a file's path, or None")
    check_count("batch_size", batch_size)
    if config is not None and not isinstance(config, RASConfig):
        raise TypeError(f"config must be a RASConfig, got {shown(config)}")
    config = config or RASConfig()
    check_free(config, "there is nothing to calibrate")
    config = replace(config, speedup=speedup)
    if not isinstance(shares, Sequence) or isinstance(shares, str | bytes):
        raise TypeError(f"shares must be a list of numbers, got {shown(shares)}")
    for share in shares:
        check_number("shares", share)
        if not 0 < share < 1:
            raise ValueError(f"shares must be in (0, 1), got {shown(share)}")
    if is_enabled(pipe):
        raise ValueError("calibrate needs the pipeline as it is; call ras.disable(pipe) first")
    calls = [*_calls(pipe, prompts, num_inference_steps, batch_size, seed, call)]
    trials = Trials(pipe, calls, partial(enabled, pipe))
    transformers = transformers_of(pipe)
    model: Any = pipe
    model_here = of_model(transformers, model.scheduler)
    key = {"prompts": prompts, "speedup": speedup, "num_inference_steps": num_inference_steps}
    key |= {"shares": shares, "batch_size": batch_size, "seed": seed, **of_call(call)}
    key |= {f"config.{name}": value for name, value in vars(config).items()}
    key |= {"pipeline": type(pipe).__name__, **model_here, **of_weights(modules_of(pipe))}
    log = _Log(None if checkpoint is None else Path(checkpoint), key)
    bar = diffusers_logging.tqdm(total=len(calls) * (5 + ROUNDS * TRIED), desc="calibrating")

    # Counts the tokens, and computes them all.
    measured = log.kept("noise", lambda: trials.dense(RASConfig(speedup=1.0), bar.update))
    clock, layout = clock_and_layout(measured)
    config = replace(config, speedup=None)
    prior = covariance(clock, config.extrapolation or EXTRAPOLATION)
    kernel = mixed(np.array(measured["kernel"]), len(prompts), prior)
    model = ErrorModel(clock.weights, kernel, hold=config.extrapolation == 0)
    usual = plan_run(replace(config, speedup=speedup), clock, layout).plan
    shares = shares if layout.grid else ()

    def errors(plan: Plan) -> list[float] | None:
        name = json.dumps([plan.shares, plan.extrapolation])
        return log.kept(name, lambda: trials.errors(replace(config, plan=plan), bar.update))

    def tried(plan: Plan) -> tuple[float, Plan]:
        found = errors(plan)
        return -math.inf if found is None else sure_gain(found, errors(usual)), plan

    def alike(shares: tuple[float, ...]) -> Plan:
        """By its own factors, or by what each run shows, as the best so far."""
        own = best[1].extrapolation is not None
        return Plan(shares, factors(model, clock.sigmas, shares) if own else None)

    def meets(plan: tuple[float, ...]) -> bool:
        reached = speedup_of(Plan(plan), layout, config)
        return abs(reached / speedup - 1) <= TOLERANCE or not layout.grid

    first = first_plans(model, usual, speedup, clock.sigmas, layout, config)
    best = max((tried(plan) for plan in first), key=_gain)
    for _ in range(ROUNDS):
        near = neighbours(model, best[1].shares, shares, layout, reuse_text=config.reuse_text)
        plans = islice(filter(meets, near), TRIED)
        nearest = max((tried(alike(plan)) for plan in plans), key=_gain, default=best)
        if nearest[0] <= best[0]:
            break
        best = nearest
    bar.close()
    gain, plan = best
    found = errors(plan)
    told = f"surely {gain:.1f} dB nearer than the default plan" if gain > 0 else "the default plan"
    if found is not None:
        told += f"; relative error of the final latents {math.sqrt(np.mean(found)):.4f}"
    return replace(
        plan,
        note=f"{speedup:g}x in {num_inference_steps} steps, calibrated on {len(prompts)} prompts: "
        f"{told}",
        made_for={**model_here, **of_run(layout.grid, measured["guidance"])},
    )


def _gain(tried: tuple[float, Plan]) -> float:
    return tried[0]


def _calls(
    pipe: Any,
    prompts: list[str],
    steps: int,
    batch_size: int,
    seed: int,
    call: dict[str, Any],
) -> Iterator[Callable[[], Tensor]]:
    """Calls of the pipeline on the prompts, batch by batch."""
    call = {**call, "num_inference_steps": steps, "output_type": "latent", "return_dict": False}
    # what a pipeline takes first may be an image, or a class
    named = "prompt" in inspect.signature(type(pipe).__call__).parameters

    def drawn(first: int) -> Tensor:
        batch = prompts[first : first + batch_size]
        seeds = range(seed + first, seed + first + len(batch))
        generators = [torch.Generator("cpu").manual_seed(each) for each in seeds]
        own = {**call, "generator": generators if len(generators) > 1 else generators[0]}
        output = pipe(prompt=batch, **own) if named else pipe(batch, **own)
        found = [leaf for leaf in tree_leaves(output[0]) if isinstance(leaf, Tensor)]
        if not found:
            raise ValueError(f"calibrate compares latents, and {type(pipe).__name__} returns none")
        return torch.cat([by_sample(leaf, len(batch)) for leaf in found], dim=1)

    return (partial(drawn, first) for first in range(0, len(prompts), batch_size))


class _Log:
    """What has been measured, by name, kept in a file if there is one."""

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self._path, self._found = path, {"calibration": dict(plain(key))}
        if path is None or not path.exists():
            return
        try:
            found = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} is no checkpoint: {error}") from None
        there = found.get("calibration") if isinstance(found, dict) else None
        if not isinstance(there, dict):
            raise ValueError(f"{path} is no checkpoint of a calibration; name another one")
        told = differences(dict(plain(there)), self._found["calibration"])
        if told:
            raise ValueError(
                f"{path} is of another calibration ({'; '.join(told)}); name another checkpoint"
            )
        self._found = found

    def kept(self, name: str, measure: Callable[[], Any]) -> Any:
        if name not in self._found:
            self._found[name] = measure()
            if self._path is not None:
                write_text(self._path, json.dumps(self._found, allow_nan=False))
        return self._found[name]
