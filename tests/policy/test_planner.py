"""Plans: what a speed-up gets, in few steps and in other runs."""

import itertools
import math

import numpy as np
import pytest
from diffusers import FlowMatchHeunDiscreteScheduler, StableDiffusion3Img2ImgPipeline
from support import pipelines
from support.pipelines import normal, sd3_inputs
from support.runs import SHARES, levels, planned, run, run_noting_warnings

import ras
from ras.clock import Clock, read_clock
from ras.layout import Layout
from ras.policy.error_model import ErrorModel
from ras.policy.planner import plan_run, plan_speedup

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]


def longest_stretch(dense, steps):
    """Steps from one dense one to the next, or to the end."""
    return max(np.diff([*sorted(dense), steps]))


@pytest.mark.parametrize(("steps", "speedup"), [(8, 3.2), (8, 2.0), (6, 2.0), (4, 1.8)])
def test_a_small_mask_has_partial_steps_in_few(steps, speedup):
    """Where the budget would pay for more of them than there are steps, all others are partial."""
    plan, _ = planned(ras.RASConfig(speedup=speedup), levels(steps), 1024, 0, masked=60)
    dense = plan.shares.count(1)
    partial = sum(0 < share < 1 for share in plan.shares)
    cost = dense + partial * 60 / 1024
    assert partial and cost <= steps / speedup + 0.03
    assert partial == steps - dense or abs(steps / cost / speedup - 1) < 0.03


# --- what a speed-up gets -------------------------------------------------------------------------


TARGETS = (1.25, 1.5, 2, 2.5, 3, 4)

SIZES = ((256, 28), (1024, 333), (4096, 333), (4096, 0), (256, 333))


def cost(plan, tokens, text, reuse_text):
    """Tokens that a plan computes, counted one step after another."""
    total = 0
    for share in plan.shares:
        count = tokens * int(share) if share in (0, 1) else max(1, round(share * tokens))
        total += count + (text if count == tokens or (count and not reuse_text) else 0)
    return total


class AnyPlace(ErrorModel):
    """A model to which all plans are alike, so that many can be made in little time."""

    def best(self, count, pinned=()):
        first = sorted({0, *pinned}, key=lambda s: (s != 0, s))
        others = [s for s in range(self.steps) if s not in first]
        return tuple(sorted([*first, *others][: max(count, len(first))]))

    def error(self, dense):
        return 0.0


@pytest.mark.parametrize("reuse_text", [False, True])
@pytest.mark.parametrize("tokens, text", SIZES)
def test_every_speedup_is_met(tokens, text, reuse_text):
    """For each number of steps; what a plan costs does not hang on where its steps lie."""
    for steps in range(8, 101):
        model = AnyPlace([1 / steps] * steps, np.eye(steps), hold=False)
        layout = Layout((tokens,), text)
        for target in TARGETS:
            plan = plan_speedup(model, target, layout, reuse_text=reuse_text)
            assert len(plan.shares) == steps and plan.shares[0] == 1
            reached = steps * (tokens + text) / cost(plan, tokens, text, reuse_text)
            assert reached == pytest.approx(target, rel=0.03), (steps, plan)
            assert plan.speedup(tokens, text, reuse_text=reuse_text) == pytest.approx(reached)


@pytest.mark.parametrize("reuse_text", [False, True])
@pytest.mark.parametrize("tokens, text", SIZES)
@pytest.mark.parametrize("steps, target", [(8, 4), (9, 1.25), (11, 3), (28, 2.5), (50, 2)])
def test_a_runs_plan_meets_its_speedup(steps, target, tokens, text, reuse_text):
    config = ras.RASConfig(target, reuse_text=reuse_text)
    plan, complaint = planned(config, levels(steps), tokens, text)
    reached = steps * (tokens + text) / cost(plan, tokens, text, reuse_text)
    assert complaint is None and reached == pytest.approx(target, rel=0.03)


def test_the_default_is_a_speedup_of_two():
    default = planned(ras.RASConfig(), levels(28), 1024, 333)[0]
    assert default == planned(ras.RASConfig(2), levels(28), 1024, 333)[0]
    assert planned(ras.RASConfig(1), levels(28), 1024, 333)[0].shares == (1,) * 28


def test_one_partial_step_for_what_is_left():
    """By hand: 8 steps at a half of 1.6 are 2.5 dense ones; of text there are 20 tokens."""
    plan, _ = planned(ras.RASConfig(3.2), levels(8), 100, 20)
    shares = [share for share in plan.shares if share not in (0, 1)]
    assert plan.shares.count(1) == 2 and shares == [pytest.approx((0.5 * 120 - 20) / 100)]
    plan, _ = planned(ras.RASConfig(3.2, reuse_text=True), levels(8), 100, 20)
    shares = [share for share in plan.shares if share not in (0, 1)]
    assert plan.shares.count(1) == 2 and shares == [pytest.approx(0.6)]


@pytest.mark.parametrize("speedup, dense", [(1.5, 19), (2, 14), (2.5, 11), (2.472, 11)])
def test_no_partial_step_where_whole_ones_come_near_enough(speedup, dense):
    plan, _ = planned(ras.RASConfig(speedup), levels(28), 1024, 333)
    assert plan.shares.count(1) == dense and set(plan.shares) == {0, 1}
    plan, _ = planned(ras.RASConfig(speedup, sample_ratio=0.05), levels(28), 1024, 333)
    assert set(plan.shares) <= {0, 0.05, 1}


@pytest.mark.parametrize(
    "settings",
    [
        dict(speedup=50),
        dict(speedup=3, scheduler_start_step=6),
        dict(speedup=2.4, sample_ratio=0.9),
    ],
)
def test_a_speedup_out_of_reach_is_warned_of(settings):
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe)
    with ras.enabled(pipe, **settings):
        result, told = run_noting_warnings(pipe, inputs)
        assert not run_noting_warnings(pipe, inputs)[1]
        stats = ras.stats(pipe)
    assert result.isfinite().all()
    assert len(told) == 1 and f"{settings['speedup']:g}" in told[0]
    assert f"{stats.speedup_ceiling:.2f}" in told[0] and stats.warnings == tuple(told)
    assert abs(stats.speedup_ceiling / settings["speedup"] - 1) > 0.03


def test_pinned_steps_are_dense():
    config = ras.RASConfig(
        2, scheduler_start_step=3, scheduler_end_step=24, error_reset_steps=(9, 0.5, 99)
    )
    plan, complaint = planned(config, levels(28), 1024, 333)
    assert complaint is None
    assert all(plan.shares[s] == 1 for s in (0, 1, 2, 9, 14, 25, 26, 27))
    assert min(plan.shares) == 0


@pytest.mark.parametrize("speedup", [2.1, 2.9])
def test_partial_steps_are_of_the_asked_ratio(speedup):
    config = ras.RASConfig(speedup, sample_ratio=0.125)
    plan, complaint = planned(config, levels(28), 1024, 333)
    assert complaint is None and set(plan.shares) == {0, 0.125, 1}


@pytest.mark.parametrize("scheduler", ["shift-1", "heun", "late", "clamped"])
def test_any_noise_levels(scheduler):
    sigmas = {
        "shift-1": levels(20, 1.0),
        "heun": None,
        "late": levels(40)[20:],
        "clamped": (1, 0.99999, 0.99995, 0.8, 0.5, 0.3, 0.03, 0.02, 0.01, 0.001, 0),
    }[scheduler]
    if sigmas is None:
        heun = FlowMatchHeunDiscreteScheduler()
        heun.set_timesteps(20)
        stages = read_clock(heun).stages
        assert len(stages) == 40 and stages[1] == stages[2] > stages[3]
        sigmas = read_clock(heun).sigmas
        assert sigmas == (*stages[:-1:2], stages[-1])
        assert len(sigmas) == 21 and all(a > b for a, b in itertools.pairwise(sigmas))
    plan, complaint = planned(ras.RASConfig(2.5), sigmas, 1024, 333)
    assert complaint is None and len(plan.shares) == len(sigmas) - 1
    assert plan.speedup(1024, 333) == pytest.approx(2.5, rel=0.03)


def test_image_to_image_is_planned_from_where_it_begins():
    scheduler = pipelines.euler()
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(8)
    assert read_clock(scheduler).stages == tuple(scheduler.sigmas.tolist()[8:])


# --- plans for other runs -------------------------------------------------------------------------


def test_a_plan_of_another_number_of_steps():
    """One warning, and a plan for the same speed-up."""
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe)
    with ras.enabled(pipe, plan=SHARES):
        _, told = run_noting_warnings(pipe, inputs, steps=12)
        stats = ras.stats(pipe)
        assert not run_noting_warnings(pipe, inputs, steps=12)[1]
        assert not run_noting_warnings(pipe, inputs)[1]
        assert ras.stats(pipe).plan.shares == SHARES
    assert len(told) == 1 and "8 steps" in told[0] and "12" in told[0]
    assert len(stats.plan.shares) == 12
    assert stats.speedup_ceiling == pytest.approx(2, rel=0.03)


def test_the_default_run():
    pipe = pipelines.sd3()
    with ras.enabled(pipe):
        run(pipe, sd3_inputs(pipe), steps=20)
        stats = ras.stats(pipe)
    assert stats.speedup_ceiling == pytest.approx(2, rel=0.03)
    assert stats.steps_skipped and stats.warnings == ()
    assert stats.plan == planned(ras.RASConfig(), levels(20), 64, 12)[0]


def test_image_to_image_follows_its_own_plan():
    pipe = pipelines.sd3(StableDiffusion3Img2ImgPipeline, vae=pipelines.autoencoder())
    inputs = sd3_inputs(pipe, latents=False, strength=0.5, image=normal(1, 3, 128, 128).sigmoid())
    with ras.enabled(pipe, speedup=2.5):
        run(pipe, inputs, steps=20)
        stats = ras.stats(pipe)
    assert stats.plan == planned(ras.RASConfig(2.5), levels(20)[10:], 64, 12)[0]
    assert stats.steps_dense + stats.steps_sparse + stats.steps_skipped == 10


# --- few steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(1, 13))
def test_of_few_steps_one_is_left_out_with_a_word(steps):
    """Of a run of at least six, unless more is asked for."""
    planned = ras.plan(ras.RASConfig(), steps)
    left_out = 0 if steps < 6 else 1 if steps < 12 else 6
    assert planned.plan.shares.count(1) == steps - left_out
    assert planned.plan.shares.count(0) == left_out
    assert (planned.warning is not None) == (steps < 12)
    if planned.warning is not None:
        assert f"{steps} steps leave little to reuse" in planned.warning
        assert f"{steps - left_out} of them" in planned.warning
    asked = ras.plan(ras.RASConfig(speedup=2), steps)
    if steps % 2 == 0:
        assert asked.plan.shares.count(1) == steps // 2 and asked.warning is None


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("steps", range(2, 10))
def test_few_steps_are_left_out_evenly(steps, shift):
    """None is left to a dense step further off than it must be: 2x of 4 lost 8 dB by it."""
    for count in range(1, steps + 1):
        settings = ras.RASConfig(speedup=steps / count)
        shares = planned(settings, levels(steps, shift), 64, 12)[0].shares
        dense = [step for step, share in enumerate(shares) if share]
        assert len(dense) == count
        assert longest_stretch(dense, steps) == math.ceil(steps / count), shares


@pytest.mark.parametrize(
    "sigmas, dense",
    [  # as FLUX has them, with shift 3: the first of these gaps is small, the last large
        ((1, 0.9, 0.75, 0.5, 0), {0, 2, 3}),
        ((1, 0.9375, 0.8571, 0.75, 0.6, 0.375, 0), {0, 2, 4, 5}),
        (levels(4), {0, 1, 2}),  # as SD3 has them: of the last, little is left to do
    ],
)
def test_few_steps_are_left_out_where_they_bridge_little(sigmas, dense):
    """By the noise level, as a plain solver's: the usual plan was 3 dB worse on edits."""
    settings = ras.RASConfig(speedup=(len(sigmas) - 1) / len(dense))
    shares = planned(settings, sigmas, 64, 12)[0].shares
    assert {step for step, share in enumerate(shares) if share == 1} == dense


@pytest.mark.parametrize("settings", [dict(plan=(1, 0, 1, 0)), dict(speedup=3)])
def test_what_is_asked_for_in_few_steps_is_without_a_word(settings):
    assert ras.plan(ras.RASConfig(**settings), 6 if "speedup" in settings else 4).warning is None


def test_masks_pay_in_few_steps():
    """As in many; one that covers most of the image does not, and is told."""
    clock, layout = Clock(tuple(levels(8))), Layout((16, 16), 8)
    small = plan_run(ras.RASConfig(), clock, layout, 60)
    assert small.warning is None and small.partial and small.speedup == pytest.approx(2, rel=0.03)
    large = plan_run(ras.RASConfig(), clock, layout, 200)
    assert "8 steps" in large.warning and large.plan.shares.count(1) == 7
