"""The clock of a run: the noise level of each step, and how far noise wanders between two.

Every noise level is told as `sigma` of flow matching, `x = (1 - sigma) * x0 + sigma * noise`. A
model of another kind, `x = alpha * x0 + s * noise`, is at the same signal-to-noise ratio where
`sigma = s / (alpha + s)`, so that `log SNR = 2 * log((1 - sigma) / sigma)` whatever the kind.

What it predicts is told by the same ruler. With `z = x / (alpha + s)` its solver is one of
`dz / dsigma = v`, of the velocity `v = noise - x0`. Where `x` is known, a prediction `p` that is
wrong by `e` makes that velocity wrong by `e / m`, with

    p   v    noise (epsilon)    x0 (sample)    alpha * noise - s * x0 (v-prediction)
    m   1    1 - sigma          sigma          sqrt((1 - sigma)^2 + sigma^2)

as `noise = z + (1 - sigma) v` and `x0 = z - sigma v`. A step that reuses `p` makes `z` wrong by
`e / m` times the distance to the next level: exactly so for DDIM (arXiv 2010.02502), which is
Euler's method of this equation. And along the run `dp = m dv` (by `dz = v dsigma`; of x0 but for
the sign, of v-prediction but for its turning by the known `x`), so that all of them change where
the velocity does.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EXTRAPOLATION = 0.625  # what is taken to go on over an equal distance
SIGMAS = 0.05, 0.9999  # beyond which the position is taken to stand still: it has no end there


def position(sigma: float) -> float:
    """Where a noise level lies on the axis that predicted noise wanders along evenly.

    `0.2 log(sigma) - log(1 - sigma)`, which is all of the log SNR but for a little.
    """
    sigma = min(max(sigma, SIGMAS[0]), SIGMAS[1])
    return 0.2 * math.log(sigma) - math.log1p(-sigma)


def roughness(extrapolation: float) -> float:
    """`2H` of the motion of whose last change that share goes on over an equal distance.

    `2^(2H - 1) - 1` is that share: 0 for a Brownian motion, 1 for a straight line.
    """
    return 1 + math.log2(1 + extrapolation)


def carried(ahead: Any, behind: Any, extrapolation: float) -> Any:
    """The share `g` of the last change that has gone on after a distance `ahead`.

        g = ((a + b)^h - a^h - b^h) / (2 b^h),    a = ahead,  b = behind,  h = 2H

    Floats, arrays or tensors of positions; `behind` is what the last change took, and not 0.
    """
    h = roughness(extrapolation)
    return ((ahead + behind) ** h - ahead**h - behind**h) / (2 * behind**h)


@dataclass(frozen=True)
class Clock:
    """The noise levels of a run.

    Attributes:
        stages: `sigma` of each stage, which is a call of the scheduler's `step`, and of the end.
        order: Stages in a solver step: 2 for Heun's.
        prediction: What the model predicts: `"flow"`, `"epsilon"`, `"v_prediction"` or `"sample"`.
        begin: Stages of the scheduler that the run leaves out before its own.
    """

    stages: tuple[float, ...]
    order: int = 1
    prediction: str = "flow"
    begin: int = 0

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The noise level that each solver step begins at, and that of the end."""
        return (*self.stages[: -1 : self.order], self.stages[-1])

    @property
    def steps(self) -> int:
        """Solver steps."""
        return len(self.sigmas) - 1

    @property
    def scales(self) -> tuple[float, ...]:
        """`m` of each solver step, see the module."""
        return tuple(_scale(self.prediction, sigma) for sigma in self.sigmas[:-1])

    @property
    def weights(self) -> tuple[float, ...]:
        """How wrong each solver step makes the result, for an error of 1 in what it reuses."""
        distances = (abs(after - sigma) for sigma, after in itertools.pairwise(self.sigmas))
        return tuple(distance / scale for distance, scale in zip(distances, self.scales))


def _scale(prediction: str, sigma: float) -> float:
    if prediction == "epsilon":
        return max(1 - sigma, 1 - SIGMAS[1])
    if prediction == "sample":
        return max(sigma, 1 - SIGMAS[1])
    return math.hypot(1 - sigma, sigma) if prediction == "v_prediction" else 1.0


def is_set(scheduler: Any) -> bool:
    """Whether `set_timesteps` has been called for a run.

    Before, some schedulers have no number of steps, others that of training (of some hundreds).
    """
    train = scheduler.config.get("num_train_timesteps") or 0
    timesteps = getattr(scheduler, "timesteps", None)
    count = None if timesteps is None else len(timesteps)
    steps = getattr(scheduler, "num_inference_steps", count)
    return None not in (steps, count) and (steps != train or train < 100)


def read_clock(scheduler: Any, timestep: Tensor | None = None, begin: int | None = None) -> Clock:
    """The clock of the run that a scheduler is about to make, from the stage that it begins at.

    One read of the device before a run.

    Args:
        scheduler: Any of diffusers' that adds no noise levels of its own between `timesteps`.
        timestep: What the transformer is called with first, for a scheduler that has no
            `begin_index`: where a run begins that leaves out the first timesteps. 0 is taken where
            the transformer is told the time in other units.
        begin: The stage that the run begins at; None takes what the scheduler has been told.
    """
    stages, prediction = _stages(scheduler)
    if begin is None:
        begin = getattr(scheduler, "begin_index", None) or 0
        if not hasattr(scheduler, "begin_index") and timestep is not None:
            begin = _index_of(timestep, scheduler.timesteps)
    order = getattr(scheduler, "order", None) or 1
    return Clock(tuple(stages[begin:]), order, prediction, begin)


def _stages(scheduler: Any) -> tuple[list[float], str]:
    """The `sigma` of each timestep and of the end, and what the model predicts."""
    timesteps, config = scheduler.timesteps, scheduler.config
    prediction = config.get("prediction_type") or "flow_prediction"
    if prediction == "trigflow":  # angles, the last of which is the end
        ratios = [math.tan(min(t, math.pi / 2 - 1e-4)) for t in timesteps.tolist()]
        return [_sigma(ratio) for ratio in ratios], "v_prediction"
    sigmas, alphas = (getattr(scheduler, name, None) for name in ("sigmas", "alphas_cumprod"))
    if sigmas is not None:
        levels = [float(s) for s in torch.as_tensor(sigmas).tolist()][: len(timesteps) + 1]
        flows = prediction == "flow_prediction" and max(levels) <= 1
        if flows or config.get("use_flow_sigmas"):
            rises = levels[0] < levels[-1]
            levels = [1 - level for level in levels] if rises else levels
        else:
            scale = config.get("sigma_data") or 1.0
            levels = [_sigma(level / scale) for level in levels]
    elif alphas is not None:
        signal = alphas[timesteps.long().cpu()].tolist()
        signal.append(float(getattr(scheduler, "final_alpha_cumprod", 1.0)))
        levels = [_sigma(math.sqrt((1 - a) / max(a, 1e-12))) for a in signal]
    else:
        train = config.get("num_train_timesteps", 1000)
        levels = [*(timesteps / train).clamp(0, 1).tolist(), 0.0]
    return levels, "flow" if prediction == "flow_prediction" else prediction


def _sigma(ratio: float) -> float:
    """`sigma` where the noise is so many times the signal."""
    return ratio / (1 + ratio)


def _index_of(timestep: Tensor, timesteps: Sequence[float] | Tensor) -> int:
    """The index among the timesteps of the one that a model is called with; 0 if it is none."""
    known = torch.as_tensor(timesteps).flatten().tolist()
    found = float(torch.as_tensor(timestep).flatten()[0])
    return known.index(found) if found in known else 0
