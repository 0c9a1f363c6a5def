"""The error of a plan, before it is run, and the plan of whole steps that has the least.

Predicted noise `v` is treated as a random process along the run. What a plan does to the final
image is then, to first order, the sum over the steps of `w_j * (v̂_j - v_j)`, where `v̂_j` is what
step j reuses and `w_j` its weight (see `ras.clock`), in flow matching the distance to the next
noise level. With `p < s` the last two dense steps before j,

    v̂_j = v_s + g_j * (v_s - v_p)

so that the mean square of each stretch from one dense step to the next is a quadratic form in the
covariance `K[i, j] = E <v_i, v_j>`; stretches are taken to be independent of each other. A plan
with the least sum is found exactly, by dynamic programming over pairs of successive dense steps.

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

import math
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from ..clock import SIGMAS, Clock, position, roughness

Array = NDArray[np.float64]
Steps = NDArray[np.integer]

JUMP = 3.0  # variance, see above, in that of noise over a distance of 1
LONGEST = 16  # steps that one stretch may have, unless there are few dense steps for many


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

    def gains(self, before: int, last: int, steps: Steps) -> Array:
        return np.zeros(len(steps)) if self._hold else gains(self._kernel, before, last, steps)

    def stretch(self, before: int, last: int, end: int) -> Array:
        """The error of reusing from `last` up to each later step, `(end - last,)`.

        Entry i is for a stretch whose next dense step is `last + 1 + i`; the first is 0.
        """
        steps = np.arange(last + 1, end)
        g = self.gains(before, last, steps)
        rows = np.zeros((len(steps), self.steps))
        rows[np.arange(len(steps)), steps] -= 1
        rows[:, last] += 1 + g
        if before >= 0:
            rows[:, before] -= g
        rows *= self._weights[steps, None]
        total = np.cumsum(rows, axis=0)
        return np.concatenate([[0.0], np.einsum("ij,jk,ik->i", total, self._kernel, total)])

    def error(self, dense: Sequence[int]) -> float:
        """The error of a plan whose dense steps are `dense`, in ascending order from 0."""
        ends = [*dense[1:], self.steps]
        befores = [-1, *dense[:-1]]
        return sum(
            float(self.stretch(before, last, end)[-1])
            for before, last, end in zip(befores, dense, ends, strict=True)
        )

    def best(self, count: int, pinned: Collection[int] = ()) -> tuple[int, ...]:
        """The `count` dense steps of least error, step 0 and the pinned ones among them."""
        n, must = self.steps, sorted({0, *pinned})
        count = min(max(count, len(must)), n)
        gaps = np.diff([*must, n])
        shortest = next(size for size in range(1, n + 1) if np.ceil(gaps / size).sum() <= count)
        longest = max(LONGEST, 2 * shortest)
        # cost[p, s]: errors of a stretch from s to s + 1, s + 2, …; p is -1 for the first one
        cost: dict[tuple[int, int], Array] = {}
        for last in range(n):
            end = min(n, last + longest, next((m for m in must if m > last), n))
            for before in range(max(0, last - longest), last) if last else (-1,):
                cost[before, last] = self.stretch(before, last, end)
        # least[p, s]: the error before s of dense steps of which the last two are p and s
        least = {(-1, 0): 0.0}
        origin: list[dict[tuple[int, int], int]] = []
        for _ in range(count - 1):
            following: dict[tuple[int, int], float] = {}
            came: dict[tuple[int, int], int] = {}
            for (before, last), so_far in least.items():
                for i, error in enumerate(cost[before, last]):
                    pair = last, last + 1 + i
                    if pair[1] < n and so_far + error < following.get(pair, math.inf):
                        following[pair] = so_far + error
                        came[pair] = before
            origin.append(came)
            least = following
        ends = {
            pair: so_far + cost[pair][-1]
            for pair, so_far in least.items()
            if len(cost[pair]) == n - pair[1]
        }
        before, last = min(ends, key=lambda pair: ends[pair])
        chosen = [last]
        for came in reversed(origin):
            before, last = came[before, last], before
            chosen.append(last)
        return tuple(reversed(chosen))
