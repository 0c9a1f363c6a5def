"""Finding a plan for one pipeline, from what its noise does on a few prompts."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, zip_longest
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
from ..clock import EXTRAPOLATION, Clock, carried, position
from ..config import DEFAULT_SPEEDUP, RASConfig
from ..denoisers import transformers_of
from ..files import read_json, write_text
from ..fingerprint import GUIDANCE, differences, of_call, of_model, of_run, of_weights, plain
from ..layout import Layout
from ..plan import DENSE, SKIP, Plan, dense_steps, speedup_of
from ..run import Run
from ..sessions import session_of
from ..slots import StepWatch
from .error_model import ErrorModel, covariance
from .learning import covariances, mean_of, mixed
from .planner import TOLERANCE, plan_run, plan_speedup, plan_whole

ROUNDS = 4  # of improving the plan by real runs
TRIED = 12  # plans in a round, those of least modelled error
FACTORS = -0.5, 3.0  # the least and the greatest extrapolation of a step
SURE = 2.0  # standard errors by which a plan must be nearer than the default's to take its place
LEAST = 1e-20  # error, of plans that leave nothing out


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

    The prompts' dense runs give the covariance of the noise between steps, as `ras.learn` has it of
    one, from which comes the plan of least modelled error in an instant. Then plans near it are
    run: those whose dense steps lie elsewhere, and, where the model can take partial steps, those
    that trade a dense step for partial ones of the same cost. By how much nearer to the dense ones
    a plan's final latents are than the default plan's is known prompt by prompt: the one for which
    the mean of that, in dB, less two standard errors is greatest is kept, until no neighbour has
    more. Where no plan has more than nothing, the default plan comes back.

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
        ValueError: A number out of its range, fewer than two prompts, an enabled pipeline, one that
            RAS does not support or that returns no latents, or a checkpoint of another
            calibration, which says in what it differs.
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
    config = replace(config or RASConfig(), speedup=speedup, sample_ratio=None, plan=None)
    if not isinstance(shares, Sequence) or isinstance(shares, str | bytes):
        raise TypeError(f"shares must be a list of numbers, got {shown(shares)}")
    for share in shares:
        check_number("shares", share)
        if not 0 < share < 1:
            raise ValueError(f"shares must be in (0, 1), got {shown(share)}")
    if is_enabled(pipe):
        raise ValueError("calibrate needs the pipeline as it is; call ras.disable(pipe) first")
    runs = _Runs(pipe, prompts, num_inference_steps, batch_size, seed, call)
    transformers = transformers_of(pipe)
    model: Any = pipe
    weighing = {
        role: getattr(part, "_orig_mod", part)
        for role, part in model.components.items()
        if isinstance(part, nn.Module)
    }
    model_here = of_model(transformers, model.scheduler)
    key = {"prompts": prompts, "speedup": speedup, "num_inference_steps": num_inference_steps}
    key |= {"shares": shares, "batch_size": batch_size, "seed": seed, **of_call(call)}
    key |= {f"config.{name}": value for name, value in vars(config).items()}
    key |= {"pipeline": type(pipe).__name__, **model_here, **of_weights(weighing)}
    log = _Log(None if checkpoint is None else Path(checkpoint), key)
    bar = diffusers_logging.tqdm(total=len(runs) * (5 + ROUNDS * TRIED), desc="calibrating")

    measured = log.kept("noise", lambda: runs.dense(bar.update))
    stages, order, prediction = measured["clock"]
    clock = Clock(tuple(stages), order, prediction)
    sides = tuple(map(tuple, measured["pictures"]))
    layout = Layout(tuple(measured["grid"]), measured["text"], measured["references"], sides)
    config = replace(config, speedup=None)
    prior = covariance(clock, config.extrapolation or EXTRAPOLATION)
    kernel = mixed(np.array(measured["kernel"]), len(prompts), prior)
    model = ErrorModel(clock.weights, kernel, hold=config.extrapolation == 0)
    usual = plan_run(replace(config, speedup=speedup), clock, layout).plan
    if layout.grid:
        start = plan_speedup(model, speedup, layout, reuse_text=config.reuse_text)
    else:
        start, shares = plan_whole(model, speedup), ()

    def errors(plan: Plan) -> list[float] | None:
        name = json.dumps([plan.shares, plan.extrapolation])
        return log.kept(name, lambda: runs.errors(plan, config, bar.update))

    def tried(plan: Plan) -> tuple[float, Plan]:
        found = errors(plan)
        return -math.inf if found is None else sure_gain(found, errors(usual)), plan

    def fitted(shares: tuple[float, ...]) -> Plan:
        return Plan(shares, factors(model, clock.sigmas, shares))

    def alike(shares: tuple[float, ...]) -> Plan:
        """By its own factors, or by what each run shows, as the best so far."""
        return Plan(shares) if best[1].extrapolation is None else fitted(shares)

    def meets(plan: tuple[float, ...]) -> bool:
        reached = speedup_of(Plan(plan), layout, config)
        return abs(reached / speedup - 1) <= TOLERANCE or not layout.grid

    first = usual, Plan(start.shares), fitted(usual.shares), fitted(start.shares)
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


def sure_gain(errors: Sequence[float], usual: Sequence[float] | None) -> float:
    """How many dB nearer a plan is than the usual one, less `SURE` standard errors of that.

    Args:
        errors, usual: Mean square errors of the same samples, at least two; None of a usual plan
            whose results are not finite.
    """
    if usual is None:
        return math.inf
    gains = 10 * np.log10((np.array(usual) + LEAST) / (np.array(errors) + LEAST))
    return float(gains.mean() - SURE * gains.std(ddof=1) / math.sqrt(len(gains)))


def factors(
    model: ErrorModel, sigmas: Sequence[float], shares: Sequence[float]
) -> tuple[float, ...]:
    """The extrapolation of each step that amounts to the model's gain there (see `ras.output`)."""
    found = [0.0] * len(shares)
    dense = dense_steps(shares)
    for before, last, end in zip(dense, dense[1:], [*dense[2:], len(shares)], strict=False):
        steps = np.arange(last + 1, end)
        behind = abs(position(sigmas[last]) - position(sigmas[before]))
        gains = model.gains(before, last, steps)
        for step, gain in zip(steps.tolist(), gains, strict=True):
            ratio = abs(position(sigmas[step]) - position(sigmas[last])) / max(behind, 1e-9)
            found[step] = _factor(float(gain), ratio)
    return tuple(found)


def _factor(gain: float, ratio: float) -> float:
    """The extrapolation whose gain after `ratio` times the last gap is `gain`: by bisection."""
    low, high = FACTORS
    for _ in range(30):
        middle = (low + high) / 2
        if carried(ratio, 1.0, middle) < gain:
            low = middle
        else:
            high = middle
    return round(middle, 4)


def neighbours(
    model: ErrorModel,
    shares: tuple[float, ...],
    sizes: Sequence[float],
    layout: Layout,
    *,
    reuse_text: bool,
) -> list[tuple[float, ...]]:
    """Plans one move away at the same cost, those of least modelled error first.

    A move takes a dense or partial step to a skipped one nearby, or makes partial steps of a
    dense one; two of the first kind come for one of the second.
    """
    n = len(shares)
    moved: set[tuple[float, ...]] = set()
    split: set[tuple[float, ...]] = set()
    for step in range(1, n):
        if shares[step] == SKIP:
            continue
        for other in range(max(1, step - 3), min(n, step + 4)):
            if shares[other] == SKIP:
                plan = list(shares)
                plan[step], plan[other] = SKIP, shares[step]
                moved.add(tuple(plan))
        if shares[step] < DENSE:
            continue
        for size in sizes:
            text = 0 if reuse_text else layout.text
            walking = size * (layout.tokens + layout.under(layout.tokens))
            count = round(layout.sequence / (walking + text))
            plan = list(shares)
            plan[step] = size
            free = sorted(
                (s for s in range(1, n) if shares[s] == SKIP), key=lambda s: abs(s - step)
            )
            for other in free[: count - 1]:
                plan[other] = size
            split.add(tuple(plan))

    def error(plan: tuple[float, ...]) -> float:
        return model.error(dense_steps(plan))

    moves, splits = sorted(moved, key=error), sorted(split, key=error)
    triples = zip_longest(moves[::2], moves[1::2], splits)
    return [plan for triple in triples for plan in triple if plan is not None]


class _Runs:
    """Runs of the pipeline on the prompts, batch by batch."""

    def __init__(
        self,
        pipe: Any,
        prompts: list[str],
        steps: int,
        batch_size: int,
        seed: int,
        call: dict[str, Any],
    ) -> None:
        self._pipe, self._prompts, self._seed = pipe, prompts, seed
        self._batch_size = batch_size
        self._call = {**call, "num_inference_steps": steps, "output_type": "latent"}
        # what a pipeline takes first may be an image, or a class
        self._named = "prompt" in inspect.signature(type(pipe).__call__).parameters
        self._final: list[Tensor] = []
        self._run: Run | None = None
        self._noise: dict[int, Tensor] = {}  # by the stage after it, of that run

    def __len__(self) -> int:
        return math.ceil(len(self._prompts) / self._batch_size)

    def _batches(self) -> Iterator[Tensor]:
        for first in range(0, len(self._prompts), self._batch_size):
            prompts = self._prompts[first : first + self._batch_size]
            seeds = range(self._seed + first, self._seed + first + len(prompts))
            generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
            generator = generators if len(generators) > 1 else generators[0]
            call = {**self._call, "generator": generator, "return_dict": False}
            output = (
                self._pipe(prompt=prompts, **call) if self._named else self._pipe(prompts, **call)
            )
            found = [leaf for leaf in tree_leaves(output[0]) if isinstance(leaf, Tensor)]
            if not found:
                raise ValueError(
                    f"calibrate compares latents, and {type(self._pipe).__name__} returns none"
                )
            yield torch.cat([_by_sample(leaf, len(prompts)) for leaf in found], dim=1)

    def dense(self, tick: Callable[[], object]) -> dict[str, Any]:
        """The covariance of the guided noise between the steps of dense runs."""
        kernels: list[Any] = []
        with enabled(self._pipe, speedup=1.0):  # counts the tokens, computes them all
            watch = StepWatch(self._pipe.scheduler, self._see)
            try:
                self._final = []
                for final in self._batches():
                    self._final.append(final)
                    run = self._run
                    assert run is not None
                    stages = range(1, len(run.clock.stages), run.clock.order)
                    kernels += [*covariances([self._noise[at] for at in stages])]
                    tick()
            finally:
                watch.remove()
                self._noise.clear()
        assert run is not None
        if not np.isfinite(kernels).all():
            raise ValueError("calibrate needs finite noise, and that of the dense runs is not")
        clock, layout = run.clock, run.planned.layout
        kernel = mean_of(kernels, covariance(clock, EXTRAPOLATION), clock)
        return {
            "clock": [clock.stages, clock.order, clock.prediction],
            "grid": layout.grid,
            "text": layout.text,
            "references": layout.references,
            "pictures": layout.pictures,
            "kernel": kernel.tolist(),
            "guidance": of_run((), getattr(self._pipe, "guidance_scale", None)).get(GUIDANCE),
        }

    def _see(self, noise: Tensor, sample: Any, after: Any) -> None:
        session = session_of(self._pipe)
        assert session is not None and session.run is not None
        if session.run is not self._run:  # some pipelines make several runs in a call
            self._run, self._noise = session.run, {}
        self._noise.setdefault(self._run.stage, noise)

    def errors(
        self, plan: Plan, config: RASConfig, tick: Callable[[], object]
    ) -> list[float] | None:
        """Each prompt's square error of the final latents, as a share of the dense ones' square.

        None where one is not finite.
        """
        if not self._final:  # of an interrupted calibration
            self._final = list(self._batches())
        found: list[float] = []
        with enabled(self._pipe, replace(config, plan=plan)):
            for dense, final in zip(self._final, self._batches(), strict=True):
                wrong = (final - dense).square().sum(1) / dense.square().sum(1)
                found += wrong.tolist()
                tick()
        return found if np.isfinite(found).all() else None


def _by_sample(leaf: Tensor, samples: int) -> Tensor:
    """`(samples, n)` float64 of an output; one that is not a row for each is every sample's."""
    if leaf.ndim and len(leaf) % samples == 0:
        return leaf.reshape(samples, -1).double()
    return leaf.reshape(1, -1).double().expand(samples, -1)


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
