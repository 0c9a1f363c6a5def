"""The error of a plan, before it is run, and the plan of whole steps that has the least.

Predicted noise `v` is treated as a random process along the run. What a plan does to the final
image is then, to first order, the sum over the steps of `w_j * (v̂_j - v_j)`, where `v̂_j` is what
step j reuses and `w_j` its weight (see `ras.clock`), in flow matching the distance to the next
noise level. With `p < s` the last two dense steps before j,

    v̂_j = v_s + g_j * (v_s - v_p)

so that the mean square of each stretch from one dense step to the next is a quadratic form in the
covariance `K[i, j] = E <v_i, v_j>`; stretches are taken to be independent of each other. A plan
with the least sum is found exactly, by dynamic programming over pairs of successive dense steps;
in runs of more than 100 steps nearly.

`K` comes from a model's own dense runs (`ras.calibrate`), or, before anything has run, from the
observation that noise wanders at a uniform pace in the position

    u = 0.2 log(sigma) - log(1 - sigma)

namely as a fractional Brownian motion of it, `E |v_i - v_j|^2 = |u_i - u_j|^(2H)`, until it jumps
at the end: noise below sigma 0.05 has a part of its own besides, of variance

    JUMP * (1 - sigma / 0.05)

The prediction of a fractional Brownian motion from two points is the `g` of `gains` (Mandelbrot
and Van Ness, 1968, give the covariance; the best linear prediction is its normal equation). The
constants were chosen on the bundled model with 28 steps, shift 3 and guidance 4, that of the jump
on this model and another SD3 at guidance 1, 4 and 7 in 20, 28 and 50 steps (3 and 10 did equally
well); `benchmarks.quality.pareto` tells what they are worth elsewhere. Of a model that predicts
anything but the velocity of flow matching the velocity is taken to wander so; none was at hand.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..clock import SIGMAS, Clock, position, roughness

Array = NDArray[np.float64]
Steps = NDArray[np.integer]

JUMP = 3.0  # variance, see above, in that of noise over a distance of 1
EXACT = 100  # steps of a run up to which the plan is the best of all
SWEEPS = 4  # of moving each dense step to its best place, in longer runs


def covariance(clock: Clock, extrapolation: float) -> Array:
    """`K` of a fractional Brownian motion with its jumps, up to a constant, `(n, n)`."""
    sigmas = np.asarray(clock.sigmas[:-1], float)
    positions = np.array([position(sigma) for sigma in sigmas])
    distance = np.abs(positions[:, None] - positions) ** roughness(extrapolation)
    jumps = np.diag(JUMP * np.maximum(1 - sigmas / SIGMAS[0], 0))
    # All rows that K is multiplied by sum to 0, so that -D/2 does for it.
    kernel = jumps - 0.5 * distance
    scales = np.asarray(clock.scales)
    if (scales == 1).all():
        return kernel
    # What is predicted changes by so many times what the velocity does, from step to step.
    along = (scales[1:] + scales[:-1]) / 2
    steps = np.diff(np.diff(-0.5 * distance, axis=0), axis=1) * along[:, None] * along
    summed = np.zeros_like(kernel)
    summed[1:, 1:] = steps.cumsum(axis=0).cumsum(axis=1)
    return summed + jumps * scales[:, None] * scales


def gains(kernel: Array, before: int, last: int, steps: Steps) -> Array:
    """The `g_j` that predict the noise of `steps` best from the dense steps `before < last`."""
    if before < 0:
        return np.zeros(len(steps))
    change = kernel[last] - kernel[before]  # <., v_s - v_p>
    size = change[last] - change[before]
    return (change[steps] - change[last]) / size if size > 0 else np.zeros(len(steps))


class ErrorModel:
    """The modelled error of stretches of reuse in a run of n steps.

    Args:
        weights: `w_j` of each step, n.
        kernel: `(n, n)`, see the module.
        hold: Whether reuse holds the noise, all `g_j` being 0.
    """

    def __init__(self, weights: Sequence[float], kernel: Array, *, hold: bool) -> None:
        self.steps = len(weights)
        self._weights = np.asarray(weights, float)
        self._kernel, self._hold = kernel, hold
        # Sums up to a step, that step left out: of w_j; of w_j K[i, j]; of w_i w_j K[i, j].
        self._sums = np.concatenate([[0.0], self._weights.cumsum()])
        self._rows = np.pad((kernel * self._weights).cumsum(axis=1), ((0, 0), (1, 0)))
        self._areas = np.pad((self._rows * self._weights[:, None]).cumsum(axis=0), ((1, 0), (0, 0)))

    def gains(self, before: int, last: int, steps: Steps) -> Array:
        return np.zeros(len(steps)) if self._hold else gains(self._kernel, before, last, steps)

    def stretches(self, before: Any, last: Any, end: Any) -> Array:
        """The errors of reusing from `last` up to `end`, the next dense step or n.

        With `z_j = v_j - v_s` and `c = v_s - v_p` the best `g_j` are `<z_j, c> / |c|^2`; they leave
        `|sum w_j z_j|^2 - (sum w_j <z_j, c>)^2 / |c|^2`.

        Args:
            before, last, end: Steps, or arrays of them that broadcast; `before` is -1 for none.
        """
        kernel, rows, areas, first = self._kernel, self._rows, self._areas, last + 1
        weight = self._sums[end] - self._sums[first]
        own = rows[last, end] - rows[last, first]
        errors = areas[end, end] - 2 * areas[first, end] + areas[first, first]
        errors = errors - weight * (2 * own - weight * kernel[last, last])
        if self._hold:
            return errors
        size = kernel[last, last] - 2 * kernel[before, last] + kernel[before, before]
        moves = (before >= 0) & (size > 0)
        along = own - (rows[before, end] - rows[before, first])
        along = along - weight * (kernel[last, last] - kernel[before, last])
        return errors - np.where(moves, along, 0) ** 2 / np.where(moves, size, 1)

    def error(self, dense: Sequence[int]) -> float:
        """The error of a plan whose dense steps are `dense`, in ascending order from 0."""
        last = np.array(dense)
        return float(self.stretches(*_around(last, self.steps)[1:4]).sum())

    def adding(self, dense: Sequence[int]) -> Array:
        """For each step, the error of a plan in which it is dense, too."""
        last, n = np.array(dense), self.steps
        new = np.setdiff1d(np.arange(n), last)
        at = np.searchsorted(last, new)  # of the dense step after it
        padded = np.array([-1, *dense, n, n])
        before, start, end, following = (padded[at + i] for i in range(-1, 3))
        parts = self.stretches(before, start, new) + self.stretches(start, new, end)
        parts -= self.stretches(before, start, end)
        parts += np.where(end < n, self._second(new, end, following), 0)
        parts -= np.where(end < n, self._second(start, end, following), 0)
        errors = np.full(n, self.error(dense))
        errors[new] += parts
        return errors

    def dropping(self, dense: Sequence[int]) -> Array:
        """For each of the dense steps but the first, the error of the plan without it."""
        last, n = np.array(dense), self.steps
        two, before, here, end, following = (part[1:] for part in _around(last, n))
        parts = self.stretches(two, before, end) - self.stretches(two, before, here)
        parts -= self.stretches(before, here, end)
        parts += np.where(end < n, self._second(before, end, following), 0)
        parts -= np.where(end < n, self._second(here, end, following), 0)
        return self.error(dense) + parts

    def _second(self, before: Steps, last: Steps, end: Steps) -> Array:
        """`stretches`, of any value where there is no such stretch, as `last` is n."""
        return self.stretches(before, np.minimum(last, self.steps - 1), end)

    def best(self, count: int, pinned: Collection[int] = ()) -> tuple[int, ...]:
        """The `count` dense steps of least error, step 0 and the pinned ones among them.

        Of up to `EXACT` steps; of more they are near to it, see `_nearly_best`.
        """
        must = sorted({0, *pinned})
        count = min(max(count, len(must)), self.steps)
        if self.steps <= EXACT:
            return self._best(count, must)
        return self._nearly_best(count, must)

    def _best(self, count: int, must: list[int]) -> tuple[int, ...]:
        """By dynamic programming over the last two dense steps."""
        n = self.steps
        before, last, end = np.arange(-1, n), np.arange(n), np.arange(1, n + 1)
        # cost[p, s, e]: of a stretch from s to e, p the dense step before s; the first p is -1
        cost = self.stretches(
            before[:, None, None], last[:, None], np.maximum(end, last[:, None] + 1)
        )
        limit = np.array([*must, n])[np.searchsorted(must, last, side="right")]
        barred = (end <= last[:, None]) | (end > limit[:, None])
        cost = np.where(barred | (before[:, None, None] >= last[:, None]), np.inf, cost)
        # least[p, s]: the error before s of dense steps of which the last two are p and s
        least = np.full((n + 1, n), np.inf)
        least[0, 0] = 0
        origins = []
        for _ in range(count - 1):
            total = least[:, :, None] + cost[:, :, :-1]
            origins.append(total.argmin(axis=0))
            least = np.full((n + 1, n), np.inf)
            least[1:, 1:] = total.min(axis=0)
        pair, steps = np.unravel_index((least + cost[:, :, -1]).argmin(), least.shape), []
        for origin in reversed(origins):
            steps.append(int(pair[1]))
            pair = origin[pair[0] - 1, pair[1] - 1], pair[0] - 1
        return tuple(sorted([0, *steps]))

    def _nearly_best(self, count: int, must: list[int]) -> tuple[int, ...]:
        """The best plan of a coarse run, stretched; then steps are moved as long as that helps.

        The coarse run has up to `EXACT` of the steps, evenly, and a share of dense ones; as many as
        there are to be lie between two of its dense steps, evenly, as fall to that. Noise
        wanders alike at all scales, so that where many belong in the one they do in the other. Then
        each is moved between its neighbours, and the one that serves least to where it serves most.
        """
        n, ratio = self.steps, -(-self.steps // EXACT)
        some = np.arange(0, n, ratio)
        kernel = self._kernel[np.ix_(some, some)]
        weights = np.add.reduceat(self._weights, some).tolist()
        coarse = ErrorModel(weights, kernel, hold=self._hold)
        few = max(-(-count // ratio), min(count, len(some) // 2))
        marks = [*coarse.best(few), n / ratio]
        places = np.interp(np.arange(count) * few / count, range(len(marks)), marks)
        dense = sorted({*must, *(int(place) for place in places * ratio)})
        while len(dense) < count:
            dense = self._with_one(dense)
        while len(dense) > count:
            dense = self._without_one(dense, must)
        for _ in range(SWEEPS):
            before = list(dense)
            for i in range(1, count):
                if dense[i] not in must:
                    dense[i] = self._best_place(dense, i)
            for _ in range(self.steps // 4):
                other = self._without_one(self._with_one(dense), must)
                if other == dense:
                    break
                dense = other
            if dense == before:
                break
        return tuple(dense)

    def _with_one(self, dense: list[int]) -> list[int]:
        """With another dense step, where it serves most."""
        errors = self.adding(dense)
        errors[dense] = np.inf
        return sorted([*dense, int(errors.argmin())])

    def _without_one(self, dense: list[int], must: list[int]) -> list[int]:
        """Without the dense step that serves least."""
        errors = self.dropping(dense)
        errors[np.isin(dense[1:], must)] = np.inf
        least = 1 + int(errors.argmin())
        return dense[:least] + dense[least + 1 :]

    def _best_place(self, dense: list[int], i: int) -> int:
        """Of the i-th dense step, between those beside it."""
        n = self.steps
        two, before, _, end, following = [-1, *dense, n, n][i - 1 : i + 4]
        places = np.arange(before + 1, end)
        errors = self.stretches(two, before, places) + self.stretches(before, places, end)
        if end < n:
            errors = errors + self.stretches(places, end, following)
        return int(places[errors.argmin()])


def _around(dense: Steps, steps: int) -> tuple[Steps, ...]:
    """The dense steps two and one before each, they themselves, and those one and two after.

    -1 and n stand for those that are not.
    """
    padded = np.array([-1, -1, *dense, steps, steps])
    return tuple(padded[i : i + len(dense)] for i in range(5))
