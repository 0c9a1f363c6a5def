"""Plans: the error model and the search on it, what a speed-up gets, files, other runs.

The error model is held against explicit vectors.
"""

import itertools
import json
import math
from functools import partial

import numpy as np
import pytest
from diffusers import (
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
)
from support import pipelines
from support.oracle import gain
from support.pipelines import normal, sd3_inputs
from support.runs import SHARES, levels, planned, run, run_noting_warnings

import ras
from ras.clock import Clock, position, read_clock, roughness
from ras.layout import Layout
from ras.policy import error_model
from ras.policy.error_model import JUMP, SHAKE, ErrorModel, covariance, gains
from ras.policy.planner import add_partial, plan_run, plan_speedup

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]


# --- the error model and the search on it ---------------------------------------------------------


def vectors(n=8, size=5, seed=0):
    """A wandering noise, `(n, size)`, and noise levels, `n + 1`."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=(n, size)).cumsum(axis=0)
    return noise, np.sort(generator.uniform(size=n + 1))[::-1]


def direct_error(noise, sigmas, dense, hold):
    """The summed square of each stretch's error, all vectors at hand."""
    total, dense = 0.0, sorted(dense)
    for at, last in enumerate(dense):
        wrong = np.zeros(noise.shape[1])
        for step in range(last + 1, dense[at + 1] if at + 1 < len(dense) else len(noise)):
            reused = noise[last].copy()
            if at and not hold:
                change = noise[last] - noise[dense[at - 1]]
                reused += (noise[step] - noise[last]) @ change / (change @ change) * change
            wrong += (sigmas[step] - sigmas[step + 1]) * (reused - noise[step])
        total += wrong @ wrong
    return total


@pytest.mark.parametrize("hold", [False, True])
def test_stretch_and_error_are_those_of_explicit_vectors(hold):
    noise, sigmas = vectors()
    model = ErrorModel(Clock(tuple(sigmas)).weights, noise @ noise.T, hold=hold)
    for dense in ([0], [0, 1], [0, 3], [0, 2, 3, 7], [0, 1, 5], list(range(8))):
        assert model.error(dense) == pytest.approx(direct_error(noise, sigmas, dense, hold))
    for before, last in ((0, 1), (0, 4), (2, 3)):
        ends = np.arange(last + 1, 9)
        stretch = model.stretch(before, last, ends)
        assert len(stretch) == 8 - last and stretch[0] == 0
        for end, error in zip(ends, stretch):
            # dense from there on: nothing but this stretch is in error
            dense = [*range(before + 1), last, *range(end, 8)]
            between = [*range(before + 1), *range(last, 8)]
            alone = direct_error(noise, sigmas, dense, hold)
            alone -= direct_error(noise, sigmas, between, hold)
            assert error == pytest.approx(alone, abs=1e-9)


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("dense", [[0], [0, 1], [0, 3], [0, 2, 3, 7], list(range(8))])
def test_a_step_more_or_less_is_another_plan(dense, hold):
    noise, sigmas = vectors()
    model = ErrorModel(Clock(tuple(sigmas)).weights, noise @ noise.T, hold=hold)
    with_one = [direct_error(noise, sigmas, {*dense, step}, hold) for step in range(8)]
    assert model.adding(dense) == pytest.approx(with_one)
    without = [direct_error(noise, sigmas, {*dense} - {step}, hold) for step in dense[1:]]
    assert model.dropping(dense) == pytest.approx(without)


@pytest.mark.parametrize("pinned", [(), (5,), (1, 2, 7)])
@pytest.mark.parametrize("hold", [False, True])
def test_the_search_is_exact(hold, pinned):
    """Of all subsets, for every count and several kinds of noise."""
    for seed in range(3):
        noise, sigmas = vectors(seed=seed)
        model = partial(ErrorModel, Clock(tuple(sigmas)).weights, noise @ noise.T, hold=hold)
        for count in range(1, 9):
            size = max(count, len({0, *pinned}))
            subsets = [
                {0, *more}
                for more in itertools.combinations(range(1, 8), size - 1)
                if {*pinned} <= {*more}
            ]
            least = min(subsets, key=lambda s: direct_error(noise, sigmas, s, hold))
            assert model().best(count, pinned) == tuple(sorted(least))
            shortest = min(longest_stretch(subset, 8) for subset in subsets)
            even = [subset for subset in subsets if longest_stretch(subset, 8) == shortest]
            least = min(even, key=lambda s: direct_error(noise, sigmas, s, hold))
            assert model(even=True).best(count, pinned) == tuple(sorted(least))


def longest_stretch(dense, steps):
    """Steps from one dense one to the next, or to the end."""
    return max(np.diff([*sorted(dense), steps]))


def test_the_search_is_exact_where_few_steps_reach_far():
    noise, sigmas = vectors(n=40)
    model = ErrorModel(Clock(tuple(sigmas)).weights, noise @ noise.T, hold=False)
    least = min(range(1, 40), key=lambda s: direct_error(noise, sigmas, [0, s], False))
    assert model.best(2) == (0, least)
    pairs = itertools.combinations(range(1, 40), 2)
    assert model.best(3) == (0, *min(pairs, key=lambda s: direct_error(noise, sigmas, [0, *s], 0)))
    assert model.best(1) == (0,)


class Work(np.ndarray):
    """An array that, with all computed of it, counts the numbers that arithmetic has made."""

    made = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **options):
        plain = [np.asarray(x) if isinstance(x, Work) else x for x in inputs]
        if out:
            options["out"] = tuple(np.asarray(x) for x in out)
        result = getattr(ufunc, method)(*plain, **options)
        Work.made += max(np.size(x) for x in (*plain, result))
        return out[0] if out else np.asarray(result).view(Work)


@pytest.fixture
def work(monkeypatch):
    """Of the search and all else that begins with the errors of stretches."""
    stretch = ErrorModel.stretch

    def counted(*args):
        errors = np.asarray(stretch(*args))
        Work.made += errors.size
        return errors.view(Work)

    monkeypatch.setattr(ErrorModel, "stretch", counted)
    monkeypatch.setattr(Work, "made", 0)
    return Work


@pytest.mark.parametrize(
    "settings",
    [
        *(dict(speedup=x) for x in (1, 1.05, 1.5, 2, 3, 7, 15, 16, 29.5, 50, 100, 300, 1000)),
        dict(speedup=2, sample_ratio=0.001, reuse_text=True),
        dict(speedup=700, sample_ratio=1e-6, reuse_text=True),
        dict(speedup=1.9, scheduler_start_step=490),
        dict(speedup=8, error_reset_steps=tuple(range(3, 900, 9))),
        dict(speedup=14, extrapolation=0),
    ],
    ids=str,
)
@pytest.mark.parametrize("grid", [(32, 32), ()])
@pytest.mark.parametrize("steps, most", [(50, 2e6), (100, 1e7), (1000, 5e8)])
def test_the_work_of_a_plan_is_bounded(work, steps, most, grid, settings):
    """At any speed-up; some 10^9 such numbers are made in a second."""
    clock = Clock(levels(steps))
    plan_run.__wrapped__(ras.RASConfig(**settings), clock, Layout(grid, 333))
    assert work.made < most


@pytest.mark.parametrize("masked", [64, 200])
@pytest.mark.parametrize("speedup", [1.5, 3, 40])
def test_the_work_of_a_plan_under_a_mask_is_bounded(work, speedup, masked):
    plan_run.__wrapped__(ras.RASConfig(speedup), Clock(levels(1000)), Layout((32, 32), 0), masked)
    assert 0 < work.made < 5e8


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("shift", [1.0, 7.0])
@pytest.mark.parametrize(
    "steps, counts", [(101, (3, 50)), (200, (3, 4, 5, 20, 190)), (400, (5, 8, 15, 100))]
)
def test_long_runs_are_planned_nearly_as_well_as_can_be(monkeypatch, steps, counts, shift, hold):
    """Within 1 %, where all stretches can still be weighed."""
    clock = Clock(levels(steps, shift))
    model = ErrorModel(clock.weights, covariance(clock, 0.6), hold=hold)
    found = {(count, pin): model.best(count, pin) for count in counts for pin in ((), (steps - 2,))}
    monkeypatch.setattr(error_model, "STRETCHES", steps**3)
    for (count, pinned), dense in found.items():
        assert len({*dense}) == count and {0, *pinned} <= {*dense}
        least = model.error(model.best(count, pinned))
        assert least > 0 and model.error(dense) <= 1.01 * least


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("pinned", [(), (5,)])
def test_a_partial_step_lies_where_it_leaves_the_least_error(pinned, share, hold):
    """Of all skipped steps, and of the dense ones of the best plan with one more."""
    for seed in range(6):
        noise, sigmas = vectors(seed=seed)
        model = ErrorModel(Clock(tuple(sigmas)).weights, noise @ noise.T, hold=hold)

        def error(dense, step, noise=noise, sigmas=sigmas):
            left = (1 - share) ** 2
            with_it = direct_error(noise, sigmas, {*dense, step}, hold)
            return (1 - left) * with_it + left * direct_error(noise, sigmas, dense, hold)

        dense, more = {*model.best(4, pinned)}, {*model.best(5, pinned)}
        plans = [(dense, step) for step in {*range(8)} - dense]
        plans += [(more - {step}, step) for step in more - {0, *pinned}]
        least, step = min(plans, key=lambda plan: error(*plan))
        shares = [float(step in dense) for step in range(8)]
        add_partial(model, shares, share, pinned)
        assert shares == [share if s == step else float(s in least) for s in range(8)]


@pytest.mark.parametrize("steps, pinned", [(28, range(10)), (100, range(20)), (50, range(30, 50))])
def test_pinned_steps_may_leave_a_long_way_to_go(steps, pinned):
    sigmas = levels(steps)
    model = ErrorModel(
        Clock(tuple(sigmas)).weights, covariance(Clock(tuple(sigmas)), 0.6), hold=False
    )
    for count in (1, len({0, *pinned})):
        assert model.best(count, pinned) == tuple(sorted({0, *pinned}))


@pytest.mark.parametrize(("steps", "speedup"), [(8, 3.2), (8, 2.0), (6, 2.0), (4, 1.8)])
def test_a_small_mask_has_partial_steps_in_few(steps, speedup):
    """Where the budget would pay for more of them than there are steps, all others are partial."""
    plan, _ = planned(ras.RASConfig(speedup=speedup), levels(steps), 1024, 0, masked=60)
    dense = plan.shares.count(1)
    partial = sum(0 < share < 1 for share in plan.shares)
    cost = dense + partial * 60 / 1024
    assert partial and cost <= steps / speedup + 0.03
    assert partial == steps - dense or abs(steps / cost / speedup - 1) < 0.03


def test_noise_shakes_and_jumps_at_the_end():
    """So the end is computed where the rest is good enough for it to matter, and only there."""
    sigmas = (0.9, 0.5, 0.05, 0.025, 0.01)
    kernel = covariance(Clock((*sigmas, 0)), 0.625)
    at = np.array([position(sigma) for sigma in sigmas])  # which stand still at the end
    smooth = -0.5 * np.abs(at[:, None] - at) ** roughness(0.625)
    own = np.diag(kernel - smooth)
    shaking = [0, 0, *(SHAKE * (1 - sigma / 0.3) ** 2 for sigma in sigmas[2:])]
    assert np.allclose(own, np.add(shaking, [0, 0, 0, JUMP / 2, JUMP * 0.8]))
    assert np.allclose(kernel - np.diag(own), smooth)
    sigmas = tuple(levels(28))
    for speedup, last in ((1.25, 1), (1.5, 1), (2, 1), (3, 0), (4, 0)):
        assert planned(ras.RASConfig(speedup=speedup), sigmas, 256, 0)[0].shares[-1] == last


def test_the_last_steps_are_computed_where_levels_end_high():
    """As FLUX's do, at sigma 0.1: what is left out of the last three lost 6 dB at 2x."""
    flow = np.linspace(1, 1 / 28, 28)
    sigmas = (*(3 * flow / (1 + 2 * flow)).tolist(), 0.0)
    for speedup in (1.5, 2):
        plan, _ = planned(ras.RASConfig(speedup=speedup), sigmas, 256, 0)
        assert plan.shares[-3:] == (1, 1, 1)


@pytest.mark.parametrize("extrapolation", [0.3, 0.62, 1.0])
def test_gains_are_the_closed_form(extrapolation):
    """The best linear prediction on the model's covariance is the formula of `ras/clock.py`."""
    sigmas = levels(12)[:-1]
    kernel = covariance(Clock((*sigmas, 0)), extrapolation)
    at = [position(sigma) for sigma in sigmas]
    for before, last in ((0, 1), (1, 4), (3, 9)):
        steps = np.arange(last + 1, 12)
        expected = [
            gain(abs(at[s] - at[last]), abs(at[last] - at[before]), extrapolation).item()
            for s in steps
        ]
        assert gains(kernel, before, last, steps) == pytest.approx(expected, abs=1e-9)
    assert (gains(kernel, -1, 3, np.arange(4, 9)) == 0).all()
    still = np.ones((4, 4))  # noise that never changes has no direction to go on in
    assert (gains(still, 0, 1, np.arange(2, 4)) == 0).all()


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


# --- plans and their files ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, options, named",
    [
        (ValueError, dict(shares=()), "must begin with"),
        (ValueError, dict(shares=(0, 1)), "must begin with"),
        (ValueError, dict(shares=(0.5, 1)), "must begin with"),
        (ValueError, dict(shares=(1, 1.5)), "1.5"),
        (ValueError, dict(shares=(1, -0.1)), "-0.1"),
        (ValueError, dict(shares=(1, math.nan)), "nan"),
        (TypeError, dict(shares=(1, True)), "True"),
        (TypeError, dict(shares=(1, "0.5")), "0.5"),
        (TypeError, dict(shares="10"), "10"),
        (TypeError, dict(shares=1), "1"),
        (ValueError, dict(shares=(1, 0), extrapolation=(0.5,)), "2 steps"),
        (ValueError, dict(shares=(1, 0), extrapolation=(0, 9)), "9"),
        (ValueError, dict(shares=(1, 0), extrapolation=(0, -1)), "-1"),
        (ValueError, dict(shares=(1, 0), extrapolation=(0, math.inf)), "inf"),
        (TypeError, dict(shares=(1, 0), extrapolation=(0, None)), "None"),
        (TypeError, dict(shares=(1, 0), note=5), "5"),
    ],
)
def test_wrong_plans_are_refused(error, options, named):
    with pytest.raises(error, match=named):
        ras.Plan(**options)


def test_counts_and_speedup_of_a_plan():
    plan = ras.Plan((1, 0, 0.5, 0.001, 0.999, 1))
    assert plan.counts(64) == (64, 0, 32, 1, 64, 64)
    assert plan.speedup(100) == pytest.approx(600 / (100 + 50 + 1 + 100 + 100))
    plan = ras.Plan((1, 0, 0.5, 1))
    assert plan.speedup(100, 20) == pytest.approx(480 / (250 + 60))
    assert plan.speedup(100, 20, reuse_text=True) == pytest.approx(480 / (250 + 40))


@pytest.mark.parametrize(
    "plan",
    [
        ras.Plan((1, 0, 1)),
        ras.Plan((1, 1 / 3, 0, 1e-9, 0.9999999), (0, 0.1 + 0.2, -0.5, 3, 0), 'two "lines"\n×'),
        planned(ras.RASConfig(2.2), levels(28), 1000, 77)[0],
    ],
)
def test_a_saved_plan_is_the_same(tmp_path, plan):
    path = tmp_path / "plan.json"
    plan.save(path)
    assert ras.Plan.load(path) == plan == ras.Plan.load(str(path))
    found = json.loads(path.read_text())
    assert found["shares"] == list(plan.shares) and found["note"] == plan.note


def test_a_plan_written_by_hand_is_read(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('{"shares": [1, 0, 0.5], "ras_plan": 1}')
    assert ras.Plan.load(path) == ras.Plan((1, 0, 0.5))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "shares: 1",
        "[1, 0, 1]",
        "\xff\xfe",
        '{"shares": [1, 0]}',
        '{"ras_plan": 2, "shares": [1, 0]}',
        '{"ras_plan": 1}',
        '{"ras_plan": 1, "shares": []}',
        '{"ras_plan": 1, "shares": {"1": 1}}',
        '{"ras_plan": 1, "shares": [1, "0"]}',
        '{"ras_plan": 1, "shares": [1, null]}',
        '{"ras_plan": 1, "shares": [1, NaN]}',
        '{"ras_plan": 1, "shares": [0, 1]}',
        '{"ras_plan": 1, "shares": [1, 0], "extrapolation": [0]}',
        '{"ras_plan": 1, "shares": [1, 0], "extrapolations": [0, 0]}',
        '{"ras_plan": 1, "shares": [1, 0], "note": 5}',
    ],
)
def test_a_file_that_is_no_plan_is_named(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"plan\.json is no plan"):
        ras.Plan.load(path)
    with pytest.raises(ValueError, match=r"plan\.json is no plan"):
        ras.RASConfig(plan=path)


def test_a_plan_shows_a_line_per_step():
    shown = str(ras.Plan((1, 0, 0.125), (0, 0.62, 0.5), "mine")).splitlines()
    assert shown[0] == "mine" and len(shown) == 4
    assert "all tokens" in shown[1] and "extrapolation" not in shown[1]
    assert "nothing" in shown[2] and shown[2].endswith("extrapolation 0.62")
    assert "12.5%" in shown[3] and shown[3].split()[1] == "2"


def test_what_may_be_given_for_a_plan(tmp_path):
    plan = ras.Plan((1, 0, 1))
    plan.save(tmp_path / "plan")
    for given in (plan, [1, 0, 1], (1.0, 0.0, 1.0), tmp_path / "plan", str(tmp_path / "plan")):
        assert ras.RASConfig(plan=given).plan == plan
    with pytest.raises(TypeError, match="7"):
        ras.RASConfig(plan=7)
    with pytest.raises(OSError):
        ras.RASConfig(plan=tmp_path / "none")
    for other in (dict(speedup=2), dict(sample_ratio=0.5)):
        with pytest.raises(ValueError, match="leave out"):
            ras.RASConfig(plan=plan, **other)


def test_a_plan_takes_the_place_of_the_settings():
    pipe = pipelines.sd3()
    config = ras.RASConfig(speedup=3)
    ras.enable(pipe, config, plan=[1, 0, 1])
    assert ras.stats(pipe).config.plan == ras.Plan((1, 0, 1))
    ras.enable(pipe, ras.stats(pipe).config, speedup=4)
    assert ras.stats(pipe).config == ras.RASConfig(speedup=4)


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
