"""Where a run's evaluations should fall: the error model behind plans, and the search on it.

Predicted noise `v` is treated as a random process along the run. What a plan does to the final
image is then, to first order, the sum over the steps of `(sigma[j+1] - sigma[j]) * (v̂_j - v_j)`,
where `v̂_j` is what step j reuses. With `p < s` the last two dense steps before j,

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
well); `benchmarks.quality.pareto` tells what they are worth elsewhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .config import DEFAULT_SPEEDUP, EXTRAPOLATION, PAPER_RESETS, PAPER_START, RASConfig
from .plan import DENSE, SKIP, Plan, paper_plan, resets

Array = NDArray[np.float64]
Steps = NDArray[np.integer]

SIGMAS = 0.05, 0.9999  # beyond which the position is taken to stand still: it has no end there
JUMP = 3.0  # variance, see above, in that of noise over a distance of 1
TOLERANCE = 0.03  # how far from the speed-up that was asked for a plan may be
MASK_PAYS = 0.35  # cost of a partial step, in dense ones, above which a mask is no use to a plan
PARTIALS = 2  # for each dense step, under a mask
LONGEST = 16  # steps that one stretch may have, unless there are few dense steps for many


def position(sigma: float) -> float:
    """Where a flow-matching noise level lies on the axis that noise wanders along evenly."""
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

    It is `gains` in closed form, of floats, arrays or tensors; `behind` is what the last change
    took, and not 0.
    """
    h = roughness(extrapolation)
    return ((ahead + behind) ** h - ahead**h - behind**h) / (2 * behind**h)


def covariance(sigmas: Sequence[float], extrapolation: float) -> Array:
    """`K` of a fractional Brownian motion with its jumps, up to a constant, `(n, n)`."""
    positions = np.array([position(sigma) for sigma in sigmas])
    distance = np.abs(positions[:, None] - positions)
    # All rows that K is multiplied by sum to 0, so that -D/2 does for it.
    jumps = JUMP * np.maximum(1 - np.asarray(sigmas, float) / SIGMAS[0], 0)
    return -0.5 * distance ** roughness(extrapolation) + np.diag(jumps)


def gains(kernel: Array, before: int, last: int, steps: Steps) -> Array:
    """The `g_j` that predict the noise of `steps` best from the dense steps `before < last`."""
    if before < 0:
        return np.zeros(len(steps))
    change = kernel[last] - kernel[before]  # <., v_s - v_p>
    size = change[last] - change[before]
    return (change[steps] - change[last]) / size if size > 0 else np.zeros(len(steps))


class ErrorModel:
    """The modelled error of stretches of reuse on one grid of noise levels.

    Args:
        sigmas: n + 1 noise levels, that of the end included.
        kernel: `(n, n)`, see the module.
        hold: Whether reuse holds the noise, all `g_j` being 0.
    """

    def __init__(self, sigmas: Sequence[float], kernel: Array, *, hold: bool) -> None:
        self.steps = len(sigmas) - 1
        self._widths = np.abs(np.diff(np.asarray(sigmas, float)))
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
        rows *= self._widths[steps, None]
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


def plan_speedup(
    model: ErrorModel,
    speedup: float,
    num_tokens: int,
    text_tokens: int,
    *,
    reuse_text: bool,
    pinned: Collection[int] = (),
    share: float | None = None,
) -> Plan:
    """The plan of least modelled error at `1 / speedup` of a dense run's tokens, text included.

    Dense steps alone where some number of them comes within `TOLERANCE`: what a partial step adds
    is less than what keeping K and V for it costs. Else as many as the tokens allow, and partial
    ones for what is left.

    Args:
        model: The run's error model.
        speedup: At least 1; the plan comes as near as it can.
        num_tokens, text_tokens: Of one sample.
        reuse_text: Whether partial steps leave the text tokens out.
        pinned: Steps that must be dense.
        share: Of the image tokens in every partial step; None fits a step to what is left.
    """
    full = num_tokens + text_tokens
    text = 0 if reuse_text else text_tokens
    budget = model.steps * full / speedup
    least = len({0, *pinned})
    nearest = round(model.steps / speedup)
    if share is None and nearest >= least and abs(budget / (nearest * full) - 1) <= TOLERANCE:
        budget = nearest * full
    count = max(min(int(budget / full + 1e-9), model.steps), least)
    rest = budget - count * full
    partial: list[float] = []
    if share is not None:
        partial = [share] * max(0, round(rest / (share * num_tokens + text)))
    elif rest >= 1:
        # Where it is too little for a partial step, it makes some with a few of the dense ones.
        for fewer in range(count - least + 1 if rest > 0.01 * budget else 1):
            tokens = fewer * full + rest
            pieces = int(tokens / (num_tokens + text)) + 1
            size = tokens / pieces - text
            if size >= 1 and pieces <= model.steps - count + fewer:
                each = round(size / num_tokens, 4)
                count, partial = count - fewer, [each] * pieces
                break
    dense = model.best(count, pinned)
    shares = [DENSE if step in dense else SKIP for step in range(model.steps)]
    for size in partial[: model.steps - len(dense)]:
        place(model, shares, size, pinned)
    return Plan(tuple(shares))


def plan_masked(
    model: ErrorModel,
    speedup: float,
    num_tokens: int,
    text_tokens: int,
    *,
    reuse_text: bool,
    pinned: Collection[int],
    masked_tokens: int,
) -> Plan:
    """The plan for a mask: up to two partial steps, of the masked tokens, for a dense one.

    Dense steps keep the context fresh, which alone matters beside the mask; both kinds of step
    fall where as many dense ones would.
    """
    full = num_tokens + text_tokens
    partial = (masked_tokens + (0 if reuse_text else text_tokens)) / full
    must = {0, *pinned}
    budget = max(model.steps / speedup, 1)
    count = max(int(budget / (1 + PARTIALS * partial)), len(must))
    while count + round((budget - count) / partial) > model.steps:
        count += 1  # there are not steps enough for as many partial ones
    dense = model.best(count, must)
    rest = max(round((budget - count) / partial), 0)
    both = model.best(count + rest, dense)
    shares = [0.0] * model.steps
    for step in both:
        shares[step] = DENSE if step in dense else masked_tokens / num_tokens
    return Plan(tuple(shares))


def place(model: ErrorModel, shares: list[float], share: float, pinned: Collection[int]) -> None:
    """Put a partial step where it serves best: into a skipped step, or trading with a dense one.

    Of the error that a dense step would take away, a partial one is taken to leave
    `(1 - share)^2`: the tokens that it leaves out are those that change least.
    """
    left = (1 - share) ** 2

    def error(dense: Sequence[int], step: int) -> float:
        with_step = model.error(sorted([*dense, step]))
        return (1 - left) * with_step + left * model.error(dense)

    dense = [step for step, value in enumerate(shares) if value == DENSE]
    free = [step for step, value in enumerate(shares) if value == SKIP]
    plans = [(error(dense, step), dense, step) for step in free]
    taken = {step for step, value in enumerate(shares) if SKIP < value < DENSE}
    more = model.best(len(dense) + 1, {*pinned, *(d for d in dense if taken)})
    for step in more:
        if step and step not in pinned and not taken & set(more):
            rest = [other for other in more if other != step]
            plans.append((error(rest, step), rest, step))
    _, dense, step = min(plans, key=lambda plan: plan[0])
    for other in range(len(shares)):
        if other not in taken:
            shares[other] = DENSE if other in dense else SKIP
    shares[step] = share


@functools.lru_cache(maxsize=64)  # a plan takes longer than it should before each of many runs
def plan_run(
    config: RASConfig,
    sigmas: tuple[float, ...],
    num_tokens: int,
    text_tokens: int,
    masked_tokens: int | None = None,
) -> tuple[Plan, str | None]:
    """What each solver step of a run computes, by the settings.

    Args:
        config: The settings.
        sigmas: The noise level of each step, and that of the end.
        num_tokens: Image tokens of one sample, N.
        text_tokens: Text tokens that walk with them, T.
        masked_tokens: How many tokens a partial step computes where a mask says which.

    Returns:
        The plan, and what to warn of, if anything: a speed-up that cannot be met.
    """
    steps, given = len(sigmas) - 1, config.plan
    if given is not None and len(given.shares) == steps:
        return _with_mask(given, config, masked_tokens, num_tokens), None
    if given is None and config.speedup is None and config.sample_ratio is not None:
        plan, complaint = _of_the_paper(config, steps, num_tokens)
        return _with_mask(plan, config, masked_tokens, num_tokens), complaint
    speedup = DEFAULT_SPEEDUP if config.speedup is None else config.speedup
    complaints = []
    if given is not None:
        speedup = given.speedup(num_tokens, text_tokens, reuse_text=config.reuse_text)
        complaints.append(
            f"the plan is one of {len(given.shares)} steps and the run has {steps}, so that "
            f"another is made for its speed-up of {speedup:.2f}"
        )
    plan = _of_least_error(config, speedup, sigmas, num_tokens, text_tokens, masked_tokens)
    reached = plan.speedup(num_tokens, text_tokens, reuse_text=config.reuse_text)
    if abs(reached / speedup - 1) > TOLERANCE:
        complaints.append(
            f"a speed-up of {speedup:g} cannot be met in {steps} steps with these settings; it "
            f"is {reached:.2f}"
        )
    return plan, "; ".join(complaints) or None


def _of_the_paper(config: RASConfig, steps: int, num_tokens: int) -> tuple[Plan, str | None]:
    """The paper's schedule, and a complaint if it leaves nothing out."""
    ratio, start = config.sample_ratio, config.scheduler_start_step
    assert ratio is not None
    start = PAPER_START if start is None else start
    given = config.error_reset_steps
    plan = paper_plan(
        steps,
        num_tokens,
        sample_ratio=ratio,
        error_reset_steps=PAPER_RESETS if given is None else given,
        scheduler_start_step=start,
        scheduler_end_step=config.scheduler_end_step,
        skip_num_step=config.skip_num_step,
        skip_num_step_length=config.skip_num_step_length,
    )
    if min(plan.shares) < DENSE or ratio == 1:
        return plan, None
    return plan, (
        f"none of this run's {steps} steps can be sparse, so that all are dense: the first that "
        f"may be is scheduler_start_step={start}"
    )


def _of_least_error(
    config: RASConfig,
    speedup: float,
    sigmas: tuple[float, ...],
    num_tokens: int,
    text_tokens: int,
    masked_tokens: int | None,
) -> Plan:
    """The plan of least modelled error, with the steps dense that the settings want so."""
    steps = len(sigmas) - 1
    start, end = config.scheduler_start_step, config.scheduler_end_step
    pinned = set(range(start or 0)) | (set() if end is None else set(range(end + 1, steps)))
    pinned |= resets(config.error_reset_steps or (), steps)
    pinned = {step for step in pinned if step < steps}
    hold = config.extrapolation == 0
    kernel = covariance(sigmas[:-1], EXTRAPOLATION if hold else config.extrapolation)
    model = ErrorModel(sigmas, kernel, hold=hold)
    tokens: dict[str, Any] = dict(
        num_tokens=num_tokens, text_tokens=text_tokens, reuse_text=config.reuse_text
    )
    text = 0 if config.reuse_text else text_tokens
    if masked_tokens and (masked_tokens + text) / (num_tokens + text_tokens) < MASK_PAYS:
        return plan_masked(model, speedup, **tokens, pinned=pinned, masked_tokens=masked_tokens)
    plan = plan_speedup(model, speedup, **tokens, pinned=pinned, share=config.sample_ratio)
    return _with_mask(plan, config, masked_tokens, num_tokens)


def _with_mask(plan: Plan, config: RASConfig, masked_tokens: int | None, num_tokens: int) -> Plan:
    """The plan with room for the masked tokens in its partial steps; by drift, for others too."""
    if masked_tokens is None:
        return plan
    share = masked_tokens / num_tokens
    room = config.metric == "drift"
    return replace(
        plan,
        shares=tuple(
            value if value in (SKIP, DENSE) else max(value, share) if room else share
            for value in plan.shares
        ),
    )
