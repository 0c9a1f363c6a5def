"""What dense runs tell of how a model's noise changes, and the plans of later ones by it.

All that an error model needs (`ras.policy.error_model`) is the covariance of the noise,
`K[i, j] = <v_i, v_j>` of each sample. It is scaled so that neighbouring steps in the middle of the
run differ as they do by the prior: how much noise changes in all is of no account for a plan, and
otherwise the sample that changes most would rule. Of m samples, the mean is mixed with the prior as

    (m * mean + DOUBT * prior) / (m + DOUBT)

in which six samples count for 40 %, and one for a tenth. More would suit these samples better and
others worse: at 70 % for one, plans were up to 4 dB worse than the default's on the captions of the
bundled model that DOUBT was chosen on (the even ones, guidance 1, 4 and 7).

What dense runs do not show is how much an error of an early step grows by the end, of which the
prior, chosen by real runs, knows something. So a plan by the mixture takes the place of the default
only where it is nearer by `WORTH` or more, by its own measure and by that of the samples alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import shown
from ..clock import EXTRAPOLATION, Clock
from ..files import read_json, write_text
from ..fingerprint import differences, plain
from .error_model import Array, ErrorModel, covariance

FORMAT = 1  # of the file
DOUBT = 9.0  # samples that the prior counts for
WORTH = 0.5  # dB of modelled gain, from which on a plan takes the place of the default: of 25 on
# that model (guidance 1, 4, 7, shift 1, 20 steps) those of less were -3.4 to +5.9 dB nearer in real
# runs, whatever the measure said, and the three of more +1.3 to +5.1
MIDDLE = 0.1, 0.97  # noise levels between which changes are compared
SAME = 1e-4  # how much the noise levels of two runs that are alike may differ
SHOWN = 1.5, 2.0, 2.5, 3.0  # speed-ups


@dataclass(frozen=True)
class Learned:
    """How a model's noise changes along runs of one schedule, from dense ones; `print` shows it.

    Attributes:
        clock: The noise levels.
        kernel: The mean covariance, scaled as the module says: a row for each step, up to that.
        samples: How many it is the mean of.
        made_for: What it was learnt of, as `Plan.made_for`.

    Raises:
        ValueError, TypeError: What is no such thing.
    """

    clock: Clock
    kernel: tuple[tuple[float, ...], ...]
    samples: int
    made_for: Any = ()

    def __post_init__(self) -> None:
        rows = tuple(tuple(map(float, row)) for row in self.kernel)
        if [len(row) for row in rows] != list(range(1, self.clock.steps + 1)):
            raise ValueError(f"kernel must have the rows of {self.clock.steps} steps, up to each")
        if not all(np.isfinite(row).all() for row in rows):
            raise ValueError("kernel must be finite")
        if not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {shown(self.samples)}")
        object.__setattr__(self, "kernel", rows)
        object.__setattr__(self, "made_for", tuple(sorted(plain(dict(self.made_for)))))

    @classmethod
    def of(cls, clock: Clock, kernels: Array, made_for: Mapping[str, Any]) -> Learned:
        """From the covariances of samples, `(m, n, n)`."""
        prior = covariance(clock, EXTRAPOLATION)
        return cls(clock, _rows(mean_of(kernels, prior, clock)), len(kernels), made_for)

    def fits(self, clock: Clock, here: Mapping[str, Any]) -> bool:
        """Whether it is of such runs; `here` as for `Plan.unfit`."""
        return (
            clock.steps == self.clock.steps
            and (clock.order, clock.prediction) == (self.clock.order, self.clock.prediction)
            and np.allclose(clock.stages, self.clock.stages, rtol=0, atol=SAME)
            and not differences(dict(self.made_for), here, shared=True)
        )

    def covariances(self, prior: Array) -> tuple[Array, Array]:
        """`K`, `(n, n)`, mixed with that of the prior, and alone."""
        own = _square(self.kernel)
        return mixed(own, self.samples, prior), own

    def joined(self, other: Learned) -> Learned:
        """What both have learnt, of runs that are alike."""
        samples = self.samples + other.samples
        both = self.samples * _square(self.kernel) + other.samples * _square(other.kernel)
        return replace(self, kernel=_rows(both / samples), samples=samples)

    def gain(self, speedup: float) -> float:
        """By how many dB the modelled error of whole steps is less than that of the default plan.

        0 where the default is kept.
        """
        count = max(round(self.clock.steps / speedup), 1)
        prior = covariance(self.clock, EXTRAPOLATION)
        kernels = prior, *self.covariances(prior)
        usual, *taught = (ErrorModel(self.clock.weights, k, hold=False) for k in kernels)
        gain = least_gain(taught, taught[0].best(count), usual.best(count))
        return gain if gain >= WORTH else 0.0

    def __str__(self) -> str:
        runs = f"learnt from {self.samples} sample" + "s" * (self.samples > 1)
        found = {speedup: self.gain(speedup) for speedup in SHOWN}
        gains = [f"{gain:.1f} dB at {speedup:g}x" for speedup, gain in found.items() if gain]
        told = f"modelled gain over the default plans: {', '.join(gains)}"
        kept = "the default plans are kept, as no other is nearer by far"
        return f"{runs} of {self.clock.steps} steps; {told if gains else kept}"

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as a JSON file that people can read, or nothing at all."""
        pairs = {"ras_learned": FORMAT, "samples": self.samples, "stages": self.clock.stages}
        pairs |= {"order": self.clock.order, "prediction": self.clock.prediction}
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in pairs.items()]
        rows = (json.dumps([float(f"{value:.6g}") for value in row]) for row in self.kernel)
        lines.append('  "kernel": [\n    ' + ",\n    ".join(rows) + "\n  ]")
        made_for = (f"    {json.dumps(n)}: {json.dumps(value)}" for n, value in self.made_for)
        lines.append('  "made_for": {\n' + ",\n".join(made_for) + "\n  }")
        write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Learned:
        """Read what `save` wrote. Raises ValueError if the file is nothing learnt."""
        try:
            found = read_json(path)
            if not isinstance(found, dict) or found.get("ras_learned") != FORMAT:
                raise ValueError(f'it does not say "ras_learned": {FORMAT}')
            clock = Clock(tuple(found["stages"]), found["order"], found["prediction"])
            return cls(clock, found["kernel"], found["samples"], found["made_for"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is nothing that ras.learn wrote: {error}") from None


def least_gain(models: Sequence[ErrorModel], dense: Sequence[int], usual: Sequence[int]) -> float:
    """By how many dB a plan is nearer than the usual one, by the model that makes least of it."""
    return min(model.gain(dense, usual) for model in models)


def as_learned(value: Any) -> Learned:
    """What was learnt, from that or its file.

    Raises:
        TypeError: Something else.
        ValueError: A file that is something else.
        OSError: A file that cannot be read.
    """
    if isinstance(value, Learned):
        return value
    if isinstance(value, str | PathLike):
        return Learned.load(value)
    raise TypeError(f"learned must be what ras.learn learnt or its file, got {shown(value)}")


class Lesson:
    """The noise of a dense run, step by step."""

    def __init__(self) -> None:
        self._noise: list[Tensor] = []

    def see(self, noise: Tensor) -> None:
        """See the guided noise of a step, `(S, ...)`."""
        self._noise.append(noise.clone())

    def learnt(self, clock: Clock, made_for: Mapping[str, Any]) -> Learned | None:
        """What there was to learn; None if steps are missing, or noise is not finite.

        One read of the device.
        """
        if len(self._noise) != clock.steps or len({noise.shape for noise in self._noise}) > 1:
            return None
        kernels = covariances(self._noise)
        return Learned.of(clock, kernels, made_for) if np.isfinite(kernels).all() else None


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


def _rows(kernel: Array) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row[: i + 1].tolist()) for i, row in enumerate(kernel))


def _square(rows: tuple[tuple[float, ...], ...]) -> Array:
    kernel = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        kernel[i, : i + 1] = kernel[: i + 1, i] = row
    return kernel
