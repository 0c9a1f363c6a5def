"""Runs of a pipeline by plans, on the noise of dense ones, and what both show.

All that an error model needs (`ras.policy.error_model`) is the covariance of the noise,
`K[i, j] = <v_i, v_j>` of each sample. It is scaled so that neighbouring steps in the middle of the
run differ as they do by the prior: how much noise changes in all is of no account for a plan, and
otherwise the sample that changes most would rule. Of m samples, the mean is mixed with the prior as

    (m * mean + DOUBT * prior) / (m + DOUBT)

in which six samples count for 40 %, and one for a tenth. More would suit these samples better and
others worse: at 70 % for one, plans were up to 4 dB worse than the default's on the captions of the
bundled model that DOUBT was chosen on (the even ones, guidance 1, 4 and 7).

What dense runs do not show is how an early error grows by the end. Plans that were to gain 1.7 and
9 dB by them alone lost 3.4 and 7 in real runs, so that a plan is judged by these (`sure_gain`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clock import EXTRAPOLATION, Clock
from ..config import RASConfig
from ..fingerprint import GUIDANCE, of_run
from ..layout import Layout
from ..run import Run
from ..sessions import session_of
from ..slots import StepWatch
from .error_model import Array, covariance

DOUBT = 9.0  # samples that the prior counts for
MIDDLE = 0.1, 0.97  # noise levels between which changes are compared
SURE = 2.0  # standard errors by which a plan must be nearer than the default's to take its place
SPREAD = 4.0  # dB by which gains of a plan differ from sample to sample, before any is known
LEAST = 1e-20  # error, of plans that leave nothing out
SAYING = (
    "plan",
    "sample_ratio",
    "error_reset_steps",
    "scheduler_start_step",
    "scheduler_end_step",
)
"""Settings that say what some steps compute."""


def check_free(config: RASConfig, told: str) -> None:
    """Raise a ValueError, which begins as told, where settings leave a plan nothing to choose."""
    for name in SAYING:
        if getattr(config, name) is not None:
            raise ValueError(f"{told} where {name}= says what steps compute; give speedup= alone")


class Trials:
    """Calls of a pipeline, made again and again, on the same noise.

    Attributes:
        run: The last one.
    """

    def __init__(
        self,
        pipe: Any,
        calls: Sequence[Callable[[], Tensor | None]],
        using: Callable[[RASConfig], AbstractContextManager[Any]],
    ) -> None:
        """
        Args:
            pipe: The pipeline.
            calls: Each calls it, and returns what it ends with, a row for each sample, or None for
                what the scheduler's last step returned.
            using: Has its runs be by these settings.
        """
        self.run: Run | None = None
        self._pipe, self._calls, self._using = pipe, calls, using
        self._final: list[Tensor] = []
        self._noise: dict[int, Tensor] = {}  # by the stage after it, of that run
        self._after: Any = None
        self._listens = False  # whether the noise is kept

    def _made(self, config: RASConfig) -> Iterator[Tensor]:
        """What each call ends with, `(S, n)` float64."""
        with self._using(config):
            watch = StepWatch(self._pipe.scheduler, self._see)
            try:
                for call in self._calls:
                    rows = call()
                    if rows is None and self._after is None:
                        raise ValueError("there is nothing to learn from a call without steps")
                    yield self._after.flatten(1).double() if rows is None else rows
            finally:
                watch.remove()
                self._noise.clear()
                self._after = None

    def _see(self, noise: Tensor, sample: Any, after: Any) -> None:
        session = session_of(self._pipe)
        assert session is not None and session.run is not None
        if session.run is not self.run:  # some pipelines make several runs in a call
            self.run, self._noise = session.run, {}
        if self._listens:  # to a copy, as models may write to one place in each step
            self._noise.setdefault(self.run.stage, noise.clone())
        self._after = after[0]

    def dense(self, config: RASConfig, tick: Callable[[], object]) -> dict[str, Any]:
        """What dense runs show, as JSON has it.

        The noise levels (`clock`), the tokens, the mean covariance of the guided noise between
        steps (`kernel`), of how many `samples`, and the guidance.

        Raises:
            ValueError: A run that breaks off, or noise that is not finite.
        """
        kernels: list[Any] = []
        self._final, self._listens = [], True
        for final in self._made(config):
            self._final.append(final)
            run = self.run
            assert run is not None
            stages = range(1, len(run.clock.stages), run.clock.order)
            if not {*stages} <= self._noise.keys():
                raise ValueError("there is nothing to learn from a run that leaves out steps")
            kernels += [*covariances([self._noise[at] for at in stages])]
            tick()
        self._listens = False
        assert run is not None
        if not np.isfinite(kernels).all():
            raise ValueError("there is nothing to learn from noise that is not finite")
        clock, layout = run.clock, run.planned.layout
        kernel = mean_of(kernels, covariance(clock, EXTRAPOLATION), clock)
        return {
            "clock": [clock.stages, clock.order, clock.prediction],
            "grid": layout.grid,
            "text": layout.text,
            "references": layout.references,
            "pictures": layout.pictures,
            "kernel": kernel.tolist(),
            "samples": len(kernels),
            "guidance": of_run((), getattr(self._pipe, "guidance_scale", None)).get(GUIDANCE),
        }

    def errors(self, config: RASConfig, tick: Callable[[], object]) -> list[float] | None:
        """Each sample's square error of what runs end with, as a share of the dense ones' square.

        None where one is not finite.
        """
        if not self._final:  # of an interrupted calibration
            whole = RASConfig(speedup=1.0)
            self._final = list(self._made(whole))
        found: list[float] = []
        for dense, final in zip(self._final, self._made(config), strict=True):
            wrong = (final - dense).square().sum(1) / dense.square().sum(1)
            found += wrong.tolist()
            tick()
        return found if np.isfinite(found).all() else None


def clock_and_layout(measured: dict[str, Any]) -> tuple[Clock, Layout]:
    """Those of the runs that `Trials.dense` tells of."""
    stages, order, prediction = measured["clock"]
    sides = tuple(map(tuple, measured["pictures"]))
    layout = Layout(tuple(measured["grid"]), measured["text"], measured["references"], sides)
    return Clock(tuple(stages), order, prediction), layout


def by_sample(leaf: Tensor, samples: int) -> Tensor:
    """`(samples, n)` float64 of an output; one that is not a row for each is every sample's."""
    if leaf.ndim and len(leaf) % samples == 0:
        return leaf.reshape(samples, -1).double()
    return leaf.reshape(1, -1).double().expand(samples, -1)


def sure_gain(errors: Sequence[float], usual: Sequence[float] | None) -> float:
    """How many dB nearer a plan is than the usual one, less `SURE` standard errors of that.

    What gains differ by is that of the samples and of one more, whose gain is off by `SPREAD`.

    Args:
        errors, usual: Mean square errors of the same samples; None of a usual plan whose results
            are not finite.
    """
    if usual is None:
        return math.inf
    gains = 10 * np.log10((np.array(usual) + LEAST) / (np.array(errors) + LEAST))
    if not gains.any():  # it is the usual plan
        return 0.0
    spread = (np.square(gains - gains.mean()).sum() + SPREAD**2) / len(gains)
    return float(gains.mean() - SURE * math.sqrt(spread / len(gains)))


def covariances(noise: Sequence[Tensor]) -> Array:
    """`<v_i, v_j>` of each sample, `(S, n, n)`, of the noise of n steps, each `(S, ...)`."""
    samples = zip(*noise)  # one by one, as doubles are large
    flats = (torch.stack([step.flatten().double() for step in sample]) for sample in samples)
    return torch.stack([flat @ flat.T for flat in flats]).cpu().numpy()


def mean_of(kernels: Iterable[Array], prior: Array, clock: Clock) -> Array:
    """The mean of samples' covariances, each scaled to the prior's change in mid-run."""
    low, high = MIDDLE
    sigmas = np.array(clock.sigmas[:-1])
    pairs = (sigmas[:-1] <= high) & (sigmas[1:] >= low)
    pairs = pairs if pairs.any() else np.ones_like(pairs)

    def change(kernel: Array) -> float:
        """The mean square change between neighbouring steps in the middle."""
        own = np.diag(kernel)
        each = own[:-1] + own[1:] - 2 * np.diag(kernel, 1)
        return float(each[pairs].mean()) if pairs.size else 1.0

    scales = [(kernel, change(kernel)) for kernel in kernels]
    scaled = [kernel * (change(prior) / size) for kernel, size in scales if size > 0]
    return np.mean(scaled, axis=0) if scaled else prior


def mixed(kernel: Array, samples: int, prior: Array) -> Array:
    """A mean of so many samples, mixed with the prior."""
    return (samples * kernel + DOUBT * prior) / (samples + DOUBT)
