"""What each step of a run computes: the one place where plans are made."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from ..clock import EXTRAPOLATION, Clock
from ..config import DEFAULT_SPEEDUP, EDITED, RASConfig
from ..layout import Layout
from ..plan import DENSE, SKIP, Plan, RunPlan, dense_steps, speedup_of
from .error_model import ErrorModel, brownian, covariance
from .paper import paper_plan, resets

TOLERANCE = 0.03  # how far from the speed-up that was asked for a plan may be
MASK_PAYS = 0.55  # cost of a partial step, in dense ones, above which a mask is no use to a plan
FEW = 12  # steps, below which little is reused, see `plan_run` and `ras.policy.carry`
FEWEST = 10  # steps, below which what is left out is spread by `brownian`, and evenly: `covariance`
# favours the first steps, and left so much to them that 2x in 4 steps was 8 dB worse
PARTIALS = 0.5  # for each dense step, under a mask or of what an edit changes; like `MASK_PAYS`
# chosen on eight scenes and twelve edits under masks of 5, 20 and 50 %; the last gain nothing


@functools.lru_cache(maxsize=64)  # a plan takes longer than it should before each of many runs
def plan_run(
    config: RASConfig,
    clock: Clock,
    layout: Layout,
    masked_tokens: int | None = None,
    here: tuple[tuple[str, Any], ...] = (),
    done: tuple[float, ...] = (),
) -> RunPlan:
    """Plan a run by the settings.

    Args:
        config: The settings.
        clock: The noise level of each step.
        layout: The tokens of one sample. Where their grid is not known, steps are whole.
        masked_tokens: How many tokens a partial step computes where a mask says which.
        here: What a plan may have been made for, as `ras/fingerprint.py` tells it.
        done: The shares that the steps so far have computed, of a run that is planned anew.
    """
    steps, given = clock.steps, config.plan
    unfit = None if given is None else given.unfit(steps, dict(here))
    if not layout.grid:
        masked_tokens = None
    complaints = []
    if given is not None and unfit is None:
        plan = _with_mask(given, config, masked_tokens, layout)
    elif given is None and config.speedup is None and config.sample_ratio is not None:
        schedule = config
        if config.sample_ratio == EDITED:  # dense until it is known what that is
            share = 1.0 if masked_tokens is None else max(masked_tokens, 1) / layout.tokens
            schedule = replace(config, sample_ratio=share)
        plan, complaint = paper_plan(schedule, steps, layout.tokens)
        plan = replace(plan, shares=(*done, *plan.shares[len(done) :]))
        plan = _with_mask(plan, config, masked_tokens, layout)
        complaints += [] if complaint is None else [complaint]
    else:
        few = steps < FEW and not mask_pays(config, layout, masked_tokens)
        usual = _of_few(steps) if few else DEFAULT_SPEEDUP
        speedup = usual if config.speedup is None else config.speedup
        if given is not None:
            speedup = speedup_of(given, layout, config)
            complaints.append(f"{unfit}, so that another is made for its speed-up of {speedup:.2f}")
        plan = _of_least_error(config, speedup, clock, layout, masked_tokens, here, done)
        if few and given is None and config.speedup is None:
            complaints.append(
                f"{steps} steps leave little to reuse, so that {plan.shares.count(DENSE)} of them "
                "are computed: at 2x the result is hardly nearer to the dense one than that of "
                "half the steps; ask for speedup= if it is to be more, or for a mask=, which pays "
                "as ever"
            )
        reached = speedup_of(plan, layout, config)
        if abs(reached / speedup - 1) > TOLERANCE:
            complaints.append(
                f"a speed-up of {speedup:g} cannot be met in {steps} steps with these settings; "
                f"it is {reached:.2f}"
            )
    return RunPlan(plan, layout, config, "; ".join(complaints) or None)


def _of_few(steps: int) -> float:
    """The speed-up of few steps where none is asked for: one of six or more is left out."""
    return steps / (steps - 1) if steps >= 6 else 1.0


def mask_pays(config: RASConfig, layout: Layout, masked_tokens: int | None) -> bool:
    """Whether partial steps of the masked tokens are worth it, beside dense ones."""
    text = 0 if config.reuse_text else layout.text
    if not masked_tokens or (config.sample_ratio == EDITED and config.speedup is None):
        return bool(masked_tokens)
    return masked_tokens + layout.under(masked_tokens) < MASK_PAYS * layout.sequence - text


def without_partial_steps(
    planned: RunPlan, clock: Clock, here: tuple[tuple[str, Any], ...] = ()
) -> RunPlan:
    """The plan of whole steps for a run that has no room for keys and values."""
    plan = _of_least_error(planned.config, planned.speedup, clock, Layout(), None, here)
    return replace(planned, plan=plan)


def _of_least_error(
    config: RASConfig,
    speedup: float,
    clock: Clock,
    layout: Layout,
    masked_tokens: int | None,
    here: tuple[tuple[str, Any], ...],
    done: tuple[float, ...] = (),
) -> Plan:
    """The plan of least modelled error, with the steps dense that the settings want so."""
    steps = clock.steps
    start, end = config.scheduler_start_step, config.scheduler_end_step
    pinned = set(range(start or 0)) | (set() if end is None else set(range(end + 1, steps)))
    pinned |= resets(config.error_reset_steps or (), steps)
    pinned = {step for step in pinned if len(done) <= step < steps}
    pinned |= {step for step, share in enumerate(done) if share == DENSE}
    past = {*range(len(done))} - pinned
    hold = config.extrapolation == 0
    even = steps < FEWEST
    kernel = covariance(clock, config.extrapolation or EXTRAPOLATION)
    if even and clock.prediction == "flow":
        kernel = brownian(clock)
    model = ErrorModel(clock.weights, kernel, hold=hold, even=even, past=sorted(past))
    if not layout.grid:
        return plan_whole(model, speedup, pinned)
    if masked_tokens is not None and mask_pays(config, layout, masked_tokens):
        return plan_masked(
            model,
            speedup,
            layout,
            reuse_text=config.reuse_text,
            pinned=pinned,
            masked_tokens=masked_tokens,
            done=done,
        )
    plan = plan_speedup(
        model,
        speedup,
        layout,
        reuse_text=config.reuse_text,
        pinned=pinned,
        share=None if isinstance(config.sample_ratio, str) else config.sample_ratio,
        done=done,
    )
    return _with_mask(plan, config, masked_tokens, layout)


def plan_whole(model: ErrorModel, speedup: float, pinned: Collection[int] = ()) -> Plan:
    """Plan dense and skipped steps alone, as many dense ones as come nearest to the speed-up."""
    wanted = model.steps / speedup
    count = min((int(wanted) or 1, int(wanted) + 1), key=lambda n: max(n / wanted, wanted / n))
    dense = model.best(count, pinned)
    return Plan(tuple(DENSE if step in dense else SKIP for step in range(model.steps)))


def plan_speedup(
    model: ErrorModel,
    speedup: float,
    layout: Layout,
    *,
    reuse_text: bool,
    pinned: Collection[int] = (),
    share: float | None = None,
    done: Sequence[float] = (),
) -> Plan:
    """The plan of least modelled error at `1 / speedup` of what is in a dense run's sequences.

    Dense steps alone where some number of them comes within `TOLERANCE`: what a partial step adds
    is less than what keeping K and V for it costs. Else as many as the tokens allow, and partial
    ones for what is left.

    Args:
        model: The run's error model.
        speedup: At least 1; the plan comes as near as it can.
        layout: The tokens of one sample.
        reuse_text: Whether partial steps leave the text tokens out.
        pinned: Steps that must be dense.
        share: Of the image tokens in every partial step; None fits a step to what is left.
        done: What the steps so far have computed; the dense ones are pinned.
    """
    walking, full = layout.tokens + layout.under(layout.tokens), layout.sequence
    text = 0 if reuse_text else layout.text
    budget = model.steps * full / speedup - _spent(done, layout, text)
    least = len({0, *pinned})
    nearest = round(budget / full)
    if share is None and nearest >= least and abs(budget / (nearest * full) - 1) <= TOLERANCE:
        budget = nearest * full
    count = max(min(int(budget / full + 1e-9), model.steps), least)
    rest = budget - count * full
    partial: list[float] = []
    if share is not None:
        partial = [share] * max(0, round(rest / (share * walking + text)))
    elif rest >= 1:
        # Where it is too little for a partial step, it makes some with a few of the dense ones.
        for fewer in range(count - least + 1 if rest > 0.01 * budget else 1):
            tokens = fewer * full + rest
            pieces = int(tokens / (walking + text)) + 1
            size = tokens / pieces - text
            if size >= 1 and pieces <= model.steps - count + fewer:
                each = round(size / walking, 4)
                count, partial = count - fewer, [each] * pieces
                break
    dense = model.best(count, pinned)
    shares = [*done, *[SKIP] * (model.steps - len(done))]
    for step in dense:
        shares[step] = DENSE
    for size in partial[: model.steps - len(model.past) - len(dense)]:
        add_partial(model, shares, size, pinned)
    return Plan(tuple(shares))


def plan_masked(
    model: ErrorModel,
    speedup: float,
    layout: Layout,
    *,
    reuse_text: bool,
    pinned: Collection[int],
    masked_tokens: int,
    done: Sequence[float] = (),
) -> Plan:
    """The plan for a mask: partial steps of the masked tokens, and dense ones.

    Dense steps keep the context fresh, which alone matters beside the mask; both kinds of step
    fall where as many dense ones would. Of `done`, which the budget has paid for, dense steps are
    pinned.
    """
    num_tokens, full = layout.tokens, layout.sequence
    text = 0 if reuse_text else layout.text
    partial = (masked_tokens + layout.under(masked_tokens) + text) / full
    must = {0, *pinned}
    budget = max(model.steps / speedup, 1) - _spent(done, layout, text) / full
    free = model.steps - len(model.past)
    count = max(int(budget / (1 + PARTIALS * partial)), len(must)) if budget < free else free
    # Where there are not steps enough for so many partial ones, more are dense, if there is room.
    room = budget - partial
    while count + 1 < room and count + round((budget - count) / partial) > free:
        count += 1
    dense = model.best(count, must)
    rest = min(max(round((budget - count) / partial), 0), free - count)
    both = model.best(count + rest, dense)
    shares = [*done, *[0.0] * (model.steps - len(done))]
    for step in both:
        shares[step] = DENSE if step in dense else masked_tokens / num_tokens
    return Plan(tuple(shares))


def _spent(done: Sequence[float], layout: Layout, text: int) -> float:
    """Tokens of the partial steps so far, of which `text` each is of the text."""
    walking = layout.tokens + layout.under(layout.tokens)
    return sum(share * walking + text for share in done if SKIP < share < DENSE)


def add_partial(
    model: ErrorModel, shares: list[float], share: float, pinned: Collection[int]
) -> None:
    """Put a partial step where it serves best: into a skipped step, or trading with a dense one.

    Of the error that a dense step would take away, a partial one is taken to leave
    `(1 - share)^2`: the tokens that it leaves out are those that change least.
    """
    left = (1 - share) ** 2
    dense = dense_steps(shares)
    free = [step for step, value in enumerate(shares) if value == SKIP and step not in model.past]
    added = (1 - left) * model.adding(dense) + left * model.error(dense)
    plans = [(added[step], dense, step) for step in free]
    taken = {step for step, value in enumerate(shares) if SKIP < value < DENSE}
    more = [*model.best(len(dense) + 1, {*pinned, *(d for d in dense if taken)})]
    if not taken & set(more):
        dropped = (1 - left) * model.error(more) + left * model.dropping(more)
        plans += [(e, more, step) for e, step in zip(dropped, more[1:]) if step not in pinned]
    _, dense, step = min(plans, key=lambda plan: plan[0])
    for other in {*range(len(shares))} - taken:
        shares[other] = SKIP
    for other in dense:
        shares[other] = DENSE
    shares[step] = share


def _with_mask(plan: Plan, config: RASConfig, masked_tokens: int | None, layout: Layout) -> Plan:
    """The plan with room for the masked tokens in its partial steps; by drift, for others too."""
    if masked_tokens is None:
        return plan
    share = masked_tokens / layout.tokens
    others = config.metric == "drift"  # more than the masked ones may be chosen
    return replace(
        plan,
        shares=tuple(
            value if value in (SKIP, DENSE) else max(value, share) if others else share
            for value in plan.shares
        ),
    )
