"""The error of a plan, before it is run, and the plan of whole steps that has the least.

Predicted noise `v` is treated as a random process along the run. What a plan does to the final
image is then, to first order, the sum over the steps of `w_j * (v̂_j - v_j)`, where `v̂_j` is what
step j reuses and `w_j` its weight (see `ras.clock`), in flow matching the distance to the next
noise level. With `p < s` the last two dense steps before j,

    v̂_j = v_s + g_j * (v_s - v_p)

so that the mean square of each stretch from one dense step to the next is a quadratic form in the
covariance `K[i, j] = E <v_i, v_j>`; stretches are taken to be independent of each other. A plan
with the least sum is found by dynamic programming over pairs of successive dense steps: exactly in
runs of up to 100 steps, and of 1,000 at speed-ups up to 15 where nothing is pinned; else nearly,
see `ErrorModel.best`.

`K` comes from a model's own dense runs (`ras.calibrate`), or, before anything has run, from the
observation that noise wanders at a uniform pace in the position

    u = 0.2 log(sigma) - log(1 - sigma)

namely as a fractional Brownian motion of it, `E |v_i - v_j|^2 = |u_i - u_j|^(2H)`, until it begins
to shake towards the end, and at last jumps: besides, each step has a part of its own, of variance

    SHAKE * (1 - sigma / 0.3)^2  below sigma 0.3,  and  JUMP * (1 - sigma / 0.05)  below 0.05

The prediction of a fractional Brownian motion from two points is the `g` of `gains` (Mandelbrot
and Van Ness, 1968, give the covariance; the best linear prediction is its normal equation). The
constants were chosen on the bundled model with 28 steps, shift 3 and guidance 4, that of the jump
on this model and another SD3 at guidance 1, 4 and 7 in 20, 28 and 50 steps (3 and 10 did equally
well). The shaking was found where schedules end at sigma 0.1, on the model of photographs and that
of edits; its size was chosen on the bundled one. `benchmarks.quality.pareto` tells what they are
worth elsewhere. Of a model that predicts anything but the velocity of flow matching the velocity is
taken to wander so; none was at hand.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..clock import SIGMAS, Clock, position, roughness

Array = NDArray[np.float64]
Steps = NDArray[np.integer]

JUMP, SHAKE = 3.0, 0.4  # variances, see above, in that of noise over a distance of 1
SHAKING = 0.3  # the noise level that shaking begins at
LONGEST = 16  # steps that one stretch may have, unless there are few dense steps for many
STRETCHES = 100**3  # what a search may weigh: all that there are in 100 steps
FINER = 8  # times as many dense steps has the plan that a coarser one is chosen out of
SWEEPS = 4  # of moving its steps, one after another


def covariance(clock: Clock, extrapolation: float) -> Array:
    """`K` of a fractional Brownian motion with its jumps, up to a constant, `(n, n)`."""
    sigmas = np.asarray(clock.sigmas[:-1], float)
    positions = np.array([position(sigma) for sigma in sigmas])
    distance = np.abs(positions[:, None] - positions) ** roughness(extrapolation)
    jumps = np.diag(
        JUMP * np.maximum(1 - sigmas / SIGMAS[0], 0)
        + SHAKE * np.maximum(1 - sigmas / SHAKING, 0) ** 2
    )
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


def brownian(clock: Clock) -> Array:
    """`K` of a Brownian motion of the noise level, up to a constant, `(n, n)`.

    Steps that are few are best left out as a plain solver of fewer steps would: by the distance
    that each bridges alone.
    """
    sigmas = np.asarray(clock.sigmas[:-1], float)
    return -0.5 * np.abs(sigmas[:, None] - sigmas)


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
        even: Whether the longest stretch of a plan is to be as short as may be.
        past: Steps that are over, and were not dense.
    """

    def __init__(
        self,
        weights: Sequence[float],
        kernel: Array,
        *,
        hold: bool,
        even: bool = False,
        past: Sequence[int] = (),
    ) -> None:
        self.steps = len(weights)
        self.past = frozenset(past)
        self._hold, self._even = hold, even
        # A row of zeros for what is no step: -1, before the first, and n, the end.
        self._kernel = np.pad(kernel, (0, 1))
        each = np.asarray(weights, float)
        # Sums up to a step, itself left out: of w_j; of w_j K[i, j]; of w_i w_j K[i, j].
        self._sums = np.pad(each.cumsum(), (1, 0))
        self._rows = np.pad((kernel * each).cumsum(axis=1), ((0, 1), (1, 0)))
        areas = (kernel * each * each[:, None]).cumsum(axis=0).cumsum(axis=1)
        self._areas = np.pad(areas, (1, 0))

    def gains(self, before: int, last: int, steps: Steps) -> Array:
        return np.zeros(len(steps)) if self._hold else gains(self._kernel, before, last, steps)

    def stretch(self, before: Any, last: Any, end: Any) -> Array:
        """The error of reusing from `last` until `end`, the next dense step or n.

        With `z = sum w_j (v_j - v_s)` and `c = v_s - v_p` it is `|z|^2 - <z, c>^2 / |c|^2`: the
        best `g_j` take away what of z lies along c.

        Args:
            before, last, end: Steps, or arrays of them that broadcast; `before` is -1 for none.
        """
        kernel, rows, areas = self._kernel, self._rows, self._areas
        first = np.minimum(last + 1, end)
        weight = self._sums[end] - self._sums[first]
        own = kernel[last, last]
        along = rows[last, end] - rows[last, first] - weight * own  # <z, v_s>
        square = areas[end, end] - 2 * areas[first, end] + areas[first, first]
        square = square - weight * (2 * along + weight * own)
        cross = kernel[before, last]
        size = own - 2 * cross + kernel[before, before]
        moves = (np.asarray(before) >= 0) & (size > 0) & (not self._hold)
        along = along - (rows[before, end] - rows[before, first] - weight * cross)
        return square - np.where(moves, along, 0) ** 2 / np.where(moves, size, 1)

    def error(self, dense: Sequence[int]) -> float:
        """The error of a plan whose dense steps are `dense`, in ascending order from 0."""
        return float(self._each(dense).sum())

    def adding(self, dense: Sequence[int]) -> Array:
        """For each step the error of the plan in which it is dense too, `(n,)`."""
        each, new = np.append(self._each(dense), 0), np.arange(self.steps)
        steps = np.array([-1, *dense, self.steps, self.steps])
        at = np.searchsorted(dense, new, side="right")
        before, last, end, after = (steps[at + i] for i in (-1, 0, 1, 2))
        change = self.stretch(before, last, new) - each[at - 1]
        change += self.stretch(last, new, end)
        change += self.stretch(new, end, after) - each[at]
        return each.sum() + np.where(new > last, change, 0)

    def dropping(self, dense: Sequence[int]) -> Array:
        """For each dense step but the first the error of the plan without it."""
        each, count = np.append(self._each(dense), 0), len(dense)
        steps = np.array([-1, *dense, self.steps, self.steps])
        prior, before, _, end, after = (steps[i : i + count - 1] for i in range(5))
        change = self.stretch(prior, before, end) + self.stretch(before, end, after)
        return each.sum() + change - each[:-2] - each[1:-1] - each[2:]

    def _each(self, dense: Sequence[int]) -> Array:
        """The errors of a plan's stretches."""
        steps = np.array([-1, *dense, self.steps])
        return self.stretch(steps[:-2], steps[1:-1], steps[2:])

    def best(self, count: int, pinned: Collection[int] = ()) -> tuple[int, ...]:
        """The `count` dense steps of least error, step 0 and the pinned ones among them.

        Exactly so, if no stretch is longer than `LONGEST` or twice what even ones would be, where
        that leaves `STRETCHES` at most to choose from. Of more, they are the best out of the steps
        of a plan with `FINER` times as many beside the pinned ones, in stretches as long as
        `STRETCHES` allows, each then moved to where it is best beside the others, until none moves,
        `SWEEPS` times at most. The error was at most 1 % above that of the exact search in 256
        plans of 150 to 1,000 steps on the `covariance` of five clocks, the same in 108 of them.
        """
        n, must = self.steps, sorted({0, *pinned})
        count = min(max(count, len(must)), n - len(self.past))
        if count == len(must):
            return tuple(must)
        if count == len(must) + 1 and not self._even:
            return self._with_best(must)
        longest = _shortest(n, count, must) if self._even else _longest(n, count, must)
        if longest <= LONGEST or n * longest**2 <= STRETCHES:
            places = np.setdiff1d(np.arange(n), [*self.past])
            return self._search(places, count, must, min(longest, len(places) - count + 1))
        places = np.array(self.best(len(must) + FINER * (count - len(must)), must))
        longest = max(LONGEST, math.isqrt(STRETCHES // len(places)))
        longest = min(longest, len(places) - count + 1)
        dense = self._search(places, count, must, longest)
        for _ in range(SWEEPS):
            before = dense
            for step in sorted({*dense} - {*must}):
                dense = self._with_best([other for other in dense if other != step])
            if dense == before:
                break
        return dense

    def _with_best(self, dense: Sequence[int]) -> tuple[int, ...]:
        """`dense` and the one step besides that leaves the least error."""
        errors = self.adding(dense)
        errors[[*dense, *self.past]] = np.inf
        return tuple(sorted([*dense, int(errors.argmin())]))

    def _search(
        self, places: Steps, count: int, must: Sequence[int], longest: int
    ) -> tuple[int, ...]:
        """The best dense steps out of `places`, by dynamic programming; `must` are among these.

        No stretch is longer than `longest` places. States are pairs of successive dense steps,
        `at[s]` and `at[s + 1 + j]`; a stretch begins at the second of them, and i is for
        `at[s - longest + i]` before it.
        """
        size, at = len(places), np.append(places, self.steps)
        s, span = np.arange(size), np.arange(longest)
        before, end = s[:, None] - longest + span, s[:, None] + 1 + span
        upto = np.searchsorted(must, places, side="right")  # how many of `must`
        limit = np.searchsorted(at, np.append(must, self.steps)[upto])
        cost = self.stretch(
            at[np.maximum(before, 0)][:, :, None],
            places[:, None, None],
            at[np.minimum(end, size)][:, None, :],
        )
        cost[before < 0] = np.inf
        np.moveaxis(cost, 1, 2)[end > limit[:, None]] = np.inf

        # least[longest + s, j]: the error before the second step of a pair, k steps dense before it
        least = np.full((longest + size, longest), np.inf)
        least[longest] = self.stretch(-1, 0, at[np.minimum(end[0], size)])
        least[longest, end[0] > limit[0]] = np.inf
        free, layers = count - len(must), []
        for k in range(1, count):
            # Of the k + 1 dense steps so far, as many are free and as many left out as may be.
            low = max(k, int(np.searchsorted(upto, k + 1 - free)))
            high = min(size - count + k + 1, int(np.searchsorted(upto, k + 1, side="right")))
            so_far = least[s[low:high, None] + span, longest - 1 - span]
            least[:] = np.inf
            total = so_far[:, :, None] + cost[low:high]
            total.min(axis=1, out=least[longest + low : longest + high])
            layers.append((low, so_far))

        last = size - 1 - int(least[longest + size - 1 - span, span].argmin())
        chosen, gap = [last], size - 1 - last
        for low, so_far in reversed(layers):
            gap = longest - 1 - int((so_far[last - low] + cost[last, :, gap]).argmin())
            last -= gap + 1
            chosen.append(last)
        return tuple(places[chosen[::-1]].tolist())


def _longest(steps: int, count: int, must: Sequence[int]) -> int:
    """How many steps a stretch may have."""
    return min(max(LONGEST, 2 * _shortest(steps, count, must)), steps - count + 1)


def _shortest(steps: int, count: int, must: Sequence[int]) -> int:
    """How many steps the longest stretch has at least."""
    gaps = np.diff([*must, steps])
    return next(size for size in range(1, steps + 1) if np.ceil(gaps / size).sum() <= count)
