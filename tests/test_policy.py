"""What a run computes and what it reuses: plans, their error model, extrapolation and drift.

Each part is held against its definition written down naively: explicit vectors for the error
model, Python loops per token for reuse and drift, and for whole runs a stand-in for the plain
transformer that answers the skipped steps itself.
"""

import copy
import itertools
import json
import math
import warnings
from types import SimpleNamespace

import naive
import numpy as np
import pipelines
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from naive import relative_error
from pipelines import Recorder, normal, sd3_inputs
from test_models import check, loop, lumina_oracle, run, run_noting_warnings

import ras
import ras_kernels
from ras.controller import Controller
from ras.planner import ErrorModel, covariance, gains, plan_run, plan_speedup, position
from ras.reuse import HeldNoise
from ras.scheduler import noise_levels
from ras.selection import Selection

pytestmark = pytest.mark.filterwarnings("error::ras.RASWarning")  # none but where one is expected


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def levels(steps, shift=3.0):
    """A run's noise levels, that of the end included."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return tuple(scheduler.sigmas.tolist())


def gain(ahead, behind, extrapolation):
    """g of one token: the formula at the top of `ras/reuse.py`."""
    if not ahead or not behind:
        return 0.0
    h = 1 + math.log2(1 + extrapolation)
    return ((ahead + behind) ** h - ahead**h - behind**h) / (2 * behind**h)


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
    model = ErrorModel(sigmas, noise @ noise.T, hold=hold)
    for dense in ([0], [0, 1], [0, 3], [0, 2, 3, 7], [0, 1, 5], list(range(8))):
        assert model.error(dense) == pytest.approx(direct_error(noise, sigmas, dense, hold))
    for before, last in ((0, 1), (0, 4), (2, 3)):
        stretch = model.stretch(before, last, 8)
        assert len(stretch) == 8 - last and stretch[0] == 0
        for i, error in enumerate(stretch):
            end = last + 1 + i  # dense from there on: nothing but this stretch is in error
            dense = [*range(before + 1), last, *range(end, 8)]
            between = [*range(before + 1), *range(last, 8)]
            alone = direct_error(noise, sigmas, dense, hold)
            alone -= direct_error(noise, sigmas, between, hold)
            assert error == pytest.approx(alone, abs=1e-9)


@pytest.mark.parametrize("pinned", [(), (5,), (1, 2, 7)])
@pytest.mark.parametrize("hold", [False, True])
def test_the_search_is_exact(hold, pinned):
    """Of all subsets, for every count and several kinds of noise."""
    for seed in range(3):
        noise, sigmas = vectors(seed=seed)
        model = ErrorModel(sigmas, noise @ noise.T, hold=hold)
        for count in range(1, 9):
            size = max(count, len({0, *pinned}))
            subsets = [
                {0, *more}
                for more in itertools.combinations(range(1, 8), size - 1)
                if {*pinned} <= {*more}
            ]
            least = min(subsets, key=lambda s: direct_error(noise, sigmas, s, hold))
            assert model.best(count, pinned) == tuple(sorted(least))


def test_the_search_is_exact_where_few_steps_reach_far():
    noise, sigmas = vectors(n=40)
    model = ErrorModel(sigmas, noise @ noise.T, hold=False)
    least = min(range(1, 40), key=lambda s: direct_error(noise, sigmas, [0, s], False))
    assert model.best(2) == (0, least)
    assert model.best(1) == (0,)


@pytest.mark.parametrize("steps, pinned", [(28, range(10)), (100, range(20)), (50, range(30, 50))])
def test_pinned_steps_may_leave_a_long_way_to_go(steps, pinned):
    sigmas = levels(steps)
    model = ErrorModel(sigmas, covariance(sigmas[:-1], 0.6), hold=False)
    for count in (1, len({0, *pinned})):
        assert model.best(count, pinned) == tuple(sorted({0, *pinned}))


@pytest.mark.parametrize("extrapolation", [0.3, 0.62, 1.0])
def test_gains_are_the_closed_form(extrapolation):
    """The best linear prediction on the model's covariance is the formula of `ras/reuse.py`."""
    sigmas = levels(12)[:-1]
    kernel = covariance(sigmas, extrapolation)
    at = [position(sigma) for sigma in sigmas]
    for before, last in ((0, 1), (1, 4), (3, 9)):
        steps = np.arange(last + 1, 12)
        expected = [
            gain(abs(at[s] - at[last]), abs(at[last] - at[before]), extrapolation) for s in steps
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
        model = AnyPlace([1 - i / steps for i in range(steps + 1)], np.eye(steps), hold=False)
        for target in TARGETS:
            plan = plan_speedup(model, target, tokens, text, reuse_text=reuse_text)
            assert len(plan.shares) == steps and plan.shares[0] == 1
            reached = steps * (tokens + text) / cost(plan, tokens, text, reuse_text)
            assert reached == pytest.approx(target, rel=0.03), (steps, plan)
            assert plan.speedup(tokens, text, reuse_text=reuse_text) == pytest.approx(reached)


@pytest.mark.parametrize("reuse_text", [False, True])
@pytest.mark.parametrize("tokens, text", SIZES)
@pytest.mark.parametrize("steps, target", [(8, 4), (9, 1.25), (11, 3), (28, 2.5), (50, 2)])
def test_a_runs_plan_meets_its_speedup(steps, target, tokens, text, reuse_text):
    config = ras.RASConfig(target, reuse_text=reuse_text)
    plan, complaint = plan_run(config, levels(steps), tokens, text)
    reached = steps * (tokens + text) / cost(plan, tokens, text, reuse_text)
    assert complaint is None and reached == pytest.approx(target, rel=0.03)


def test_the_default_is_a_speedup_of_two():
    default = plan_run(ras.RASConfig(), levels(28), 1024, 333)[0]
    assert default == plan_run(ras.RASConfig(2), levels(28), 1024, 333)[0]
    assert plan_run(ras.RASConfig(1), levels(28), 1024, 333)[0].shares == (1,) * 28


def test_one_partial_step_for_what_is_left():
    """By hand: 8 steps at a half of 1.6 are 2.5 dense ones; of text there are 20 tokens."""
    plan, _ = plan_run(ras.RASConfig(3.2), levels(8), 100, 20)
    shares = [share for share in plan.shares if share not in (0, 1)]
    assert plan.shares.count(1) == 2 and shares == [pytest.approx((0.5 * 120 - 20) / 100)]
    plan, _ = plan_run(ras.RASConfig(3.2, reuse_text=True), levels(8), 100, 20)
    shares = [share for share in plan.shares if share not in (0, 1)]
    assert plan.shares.count(1) == 2 and shares == [pytest.approx(0.6)]


@pytest.mark.parametrize("speedup, dense", [(1.5, 19), (2, 14), (2.5, 11), (2.472, 11)])
def test_no_partial_step_where_whole_ones_come_near_enough(speedup, dense):
    plan, _ = plan_run(ras.RASConfig(speedup), levels(28), 1024, 333)
    assert plan.shares.count(1) == dense and set(plan.shares) == {0, 1}
    plan, _ = plan_run(ras.RASConfig(speedup, sample_ratio=0.05), levels(28), 1024, 333)
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
    plan, complaint = plan_run(config, levels(28), 1024, 333)
    assert complaint is None
    assert all(plan.shares[s] == 1 for s in (0, 1, 2, 9, 14, 25, 26, 27))
    assert min(plan.shares) == 0


@pytest.mark.parametrize("speedup", [2.1, 2.9])
def test_partial_steps_are_of_the_asked_ratio(speedup):
    config = ras.RASConfig(speedup, sample_ratio=0.125)
    plan, complaint = plan_run(config, levels(28), 1024, 333)
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
        stages = noise_levels(heun)
        assert len(stages) == 40 and stages[1] == stages[2] > stages[3]
        sigmas = (*stages[:-1:2], stages[-1])
        assert len(sigmas) == 21 and all(a > b for a, b in itertools.pairwise(sigmas))
    plan, complaint = plan_run(ras.RASConfig(2.5), sigmas, 1024, 333)
    assert complaint is None and len(plan.shares) == len(sigmas) - 1
    assert plan.speedup(1024, 333) == pytest.approx(2.5, rel=0.03)


def test_image_to_image_is_planned_from_where_it_begins():
    scheduler = pipelines.euler()
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(8)
    assert noise_levels(scheduler) == tuple(scheduler.sigmas.tolist()[8:])


# --- plans and their files ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, options, named",
    [
        (ValueError, dict(shares=()), "begins with"),
        (ValueError, dict(shares=(0, 1)), "begins with"),
        (ValueError, dict(shares=(0.5, 1)), "begins with"),
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
        plan_run(ras.RASConfig(2.2), levels(28), 1000, 77)[0],
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


# --- reuse ----------------------------------------------------------------------------------------


def held_run(held, updates, extrapolation):
    """Merge `(sigma, rows, noise of all tokens)` one after another: what comes out each time."""
    merged = []
    for sigma, rows, noise in updates:
        fresh = noise if rows is None else ras_kernels.gather_tokens(noise, rows)
        merged.append(held.merge(fresh, rows, sigma, extrapolation).clone())
    return merged


def token_by_token(updates, extrapolation):
    """The same, token by token: each one's last two predictions and when they were."""
    batch, tokens, _ = updates[0][2].shape
    latest, merged = {}, []
    for sigma, rows, noise in updates:
        t, out = position(sigma), torch.zeros_like(noise)
        for b, n in itertools.product(range(batch), range(tokens)):
            if rows is None or n in rows[b].tolist():
                _, past = latest.get((b, n), (None, None))
                latest[b, n] = (noise[b, n], t), latest.get((b, n), (None, None))[0] or past
            (v1, t1), past = latest[b, n]
            out[b, n] = v1
            if past is not None:
                v0, t0 = past
                out[b, n] += gain(abs(t - t1), abs(t1 - t0), extrapolation) * (v1 - v0)
        merged.append(out)
    return merged


def some_updates(batch=2, tokens=5, channels=3):
    """Two dense updates, then tokens of their own for each sample, one of them never again."""
    rows = [None, None, [[0, 3], [1, 2]], [[0, 1], [2, 3]], [[2, 3], [0, 1]], None, [[0], [4]]]
    sigmas = (0.97, 0.9, 0.74, 0.6, 0.35, 0.3, 0.1)
    return [
        (sigma, None if row is None else torch.tensor(row), normal(batch, tokens, channels, seed=i))
        for i, (sigma, row) in enumerate(zip(sigmas, rows))
    ]


@pytest.mark.parametrize("extrapolation", [-0.5, 0.3, 0.62, 1.0, 3.0])
def test_reuse_is_the_formula_token_by_token(extrapolation):
    updates = some_updates()
    held = HeldNoise(updates[0][2], extrapolates=True)
    for merged, expected in zip(
        held_run(held, updates, extrapolation), token_by_token(updates, extrapolation)
    ):
        assert relative_error(merged, expected) < 1e-5
    for (sigma, rows, noise), merged in zip(updates, held_run(held, updates, extrapolation)):
        if rows is not None:  # what was computed comes out as it was
            fresh = [ras_kernels.gather_tokens(each, rows) for each in (noise, merged)]
            assert torch.equal(*fresh), sigma


def test_reuse_between_updates():
    """`predict` alone changes nothing that is kept."""
    updates = some_updates()[:4]
    held = HeldNoise(updates[0][2], extrapolates=True)
    held_run(held, updates, 0.62)
    nobody = torch.zeros(2, 0, dtype=torch.int64)
    for sigma in (0.5, 0.2, 0.5):
        at = [*updates, (sigma, nobody, updates[0][2])]
        expected = token_by_token(at, 0.62)[-1]
        assert relative_error(held.predict(sigma, 0.62), expected) < 1e-5


@pytest.mark.parametrize("extrapolates", [False, True])
def test_held_noise_is_a_copy_to_the_bit(extrapolates):
    updates = some_updates()
    held = HeldNoise(updates[0][2], extrapolates=extrapolates)
    latest = torch.zeros_like(updates[0][2])
    for (_, rows, noise), merged in zip(updates, held_run(held, updates, 0.0)):
        for b in range(2):
            at = slice(None) if rows is None else rows[b]
            latest[b, at] = noise[b, at]
        assert torch.equal(merged, latest)
    assert torch.equal(held.predict(0.05, 0.0), latest)
    assert held.predict(0.05, 0.0) is not held.noise


def test_a_straight_line_is_predicted_exactly():
    base, slope = normal(2, 4, 3, seed=1), normal(2, 4, 3, seed=2)

    def noise(sigma):
        return base + slope * position(sigma)

    held = HeldNoise(base, extrapolates=True)
    rows = torch.tensor([[0, 2], [1, 3]])
    held_run(held, [(s, r, noise(s)) for s, r in ((0.95, None), (0.8, None), (0.7, rows))], 1.0)
    for sigma in (0.6, 0.4, 0.1):
        assert relative_error(held.predict(sigma, 1.0), noise(sigma)) < 1e-5


def test_a_second_prediction_at_the_same_level():
    """As of Heun's scheduler: the change is from the last one before; until then, none is known."""
    v = normal(4, 1, 4, 3)
    held = HeldNoise(v[0], extrapolates=True)
    held_run(held, [(0.95, None, v[3]), (0.9, None, v[0]), (0.9, None, v[1])], 0.62)
    assert torch.equal(held.predict(0.4, 0.62), v[1])
    held.merge(v[2], None, 0.7, 0.62)
    t0, t1, t = (position(sigma) for sigma in (0.9, 0.7, 0.4))
    expected = v[2] + gain(abs(t - t1), abs(t1 - t0), 0.62) * (v[2] - v[1])
    assert relative_error(held.predict(0.4, 0.62), expected) < 1e-5


def test_one_prediction_is_all_there_is_to_reuse():
    held = HeldNoise(normal(1, 4, 3), extrapolates=True)
    held.merge(normal(1, 4, 3), None, 1.0, 0.62)
    assert torch.equal(held.predict(0.5, 0.62), normal(1, 4, 3))


# --- drift ----------------------------------------------------------------------------------------


def patch_of(noise, sample, region, width, p=2):
    y, x = divmod(region, width // p)
    return noise[sample, :, y * p : (y + 1) * p, x * p : (x + 1) * p]


def drift_scores(updates, sigma, width=6):
    """Each region's last two guided noises: how much they differ, at that pace until now."""
    samples, regions = len(updates[0][2]), updates[0][2][0, 0].numel() // 4
    scores = torch.zeros(samples, regions)
    for s, r in itertools.product(range(samples), range(regions)):
        seen = [
            (position(level), patch_of(noise, s, r, width))
            for level, rows, noise in updates
            if rows is None or r in rows[s].tolist()
        ]
        if len(seen) > 1:
            (t0, v0), (t1, v1) = seen[-2:]
            pace = (v1 - v0).square().mean().sqrt() / abs(t1 - t0)
            scores[s, r] = pace * abs(position(sigma) - t1)
    return scores


def guided(seed):
    return normal(2, 3, 4, 6, seed=seed)  # of 2 x 3 regions of 2 x 2 pixels


def test_drift_against_its_definition(monkeypatch):
    rows = torch.tensor([[0, 4], [2, 3]])
    updates = [(0.95, None, guided(0)), (0.8, None, guided(1)), (0.6, rows, guided(2))]
    seen = []
    select = ras_kernels.select_regions

    def recorded(scores, ages, count, **options):
        seen.append(scores.clone())
        return select(scores, ages, count, **options)

    monkeypatch.setattr(ras_kernels, "select_regions", recorded)
    selection = Selection(ras.RASConfig(), 2)
    for done in range(1, 4):
        level, active, noise = updates[done - 1]
        selection.observe(noise, active, level)
        for sigma in (0.5, 0.1):
            for count in (1, 2, 5, 6):
                chosen = selection.choose(noise, count, sigma)
                expected = drift_scores(updates[:done], sigma)
                assert torch.allclose(seen[-1], expected, rtol=1e-4)
                assert chosen.dtype == torch.int32 and chosen.shape == (2, count)
                assert (chosen.diff(dim=1) > 0).all()
                if done > 1:  # the highest scores, ascending by place
                    best = expected.argsort(dim=1, descending=True)[:, :count]
                    assert torch.equal(chosen, best.sort(dim=1).values)


def test_masked_regions_come_first():
    selection = Selection(ras.RASConfig(), 2)
    selection.observe(guided(0), None, 0.9)
    selection.observe(guided(1), None, 0.8)
    scores = drift_scores([(0.9, None, guided(0)), (0.8, None, guided(1))], 0.5)
    low = scores.argsort(dim=1)[:, :2].sort(dim=1).values
    chosen = selection.choose(guided(1), 3, 0.5, low)
    for s in range(2):
        best = scores[s].argmax().item()
        assert set(chosen[s].tolist()) == {*low[s].tolist(), best}
    assert torch.equal(selection.choose(guided(1), 2, 0.5, low), low)


# --- whole runs: steps that compute nothing -------------------------------------------------------

SHARES = (1, 1, 0, 1, 0, 0, 1, 0)
DENSE_STEPS = (0, 1, 3, 6)
HEUN = FlowMatchHeunDiscreteScheduler


class ByHand:
    """The plain transformer in the dense steps; else what its last two answers lead to."""

    def __init__(self, transformer, scheduler, shares, extrapolation=0.62):
        self.compute, self.scheduler = transformer.forward, scheduler
        self.shares, self.factor = shares, extrapolation
        self.stage, self.computed, self.seen = 0, 0, []  # (position, noise) of two levels

    def __call__(self, *args, **kwargs):
        step = self.stage // self.scheduler.order
        t = position(noise_levels(self.scheduler)[self.stage])
        self.stage += 1
        if self.shares[step]:
            noise = self.compute(*args, **{**kwargs, "return_dict": False})[0]
            self.computed += 1
            if self.seen and self.seen[-1][0] == t:
                self.seen.pop()
            self.seen = [*self.seen, (t, noise)][-2:]
        else:
            (t1, noise) = self.seen[-1]
            if len(self.seen) > 1:
                t0, v0 = self.seen[0]
                noise = noise + gain(abs(t - t1), abs(t1 - t0), self.factor) * (noise - v0)
        if kwargs.get("return_dict", True):
            return Transformer2DModelOutput(sample=noise)
        return (noise,)


def skipping(family="sd3", batch=1, scheduler=pipelines.euler, shares=SHARES, **call):
    """What a run with the plan gives, what it gives by hand, and the statistics."""
    pipe = getattr(pipelines, family)(scheduler=scheduler())
    inputs = getattr(pipelines, f"{family}_inputs")(pipe, batch)
    plain = getattr(pipelines, family)(scheduler=scheduler())
    hand = ByHand(plain.transformer, plain.scheduler, shares)
    plain.transformer.forward = hand
    expected = run(plain, inputs, len(shares), **call)
    with ras.enabled(pipe, plan=shares, extrapolation=0.62):
        result = run(pipe, inputs, len(shares), **call)
        stats = ras.stats(pipe)
    return result, expected, stats, hand


@pytest.mark.parametrize("scheduler", [pipelines.euler, HEUN])
@pytest.mark.parametrize("family, batch, guidance", [("sd3", 1, 1.0), ("sd3", 2, 4.0)])
def test_skipped_steps(family, batch, guidance, scheduler):
    result, expected, stats, hand = skipping(family, batch, scheduler, guidance=guidance)
    assert relative_error(result, expected) < 1e-5
    order, copies = scheduler().order, batch * (2 if guidance > 1 else 1)
    calls = 8 * order - (order - 1)
    assert hand.stage == calls and hand.computed == 4 * order
    assert (stats.steps_dense, stats.steps_sparse, stats.steps_skipped) == (4, 0, 4)
    assert (stats.tokens_computed, stats.tokens_total) == (
        copies * 64 * hand.computed,
        copies * 64 * calls,
    )
    assert (stats.text_tokens, stats.text_tokens_total) == (
        copies * 12 * hand.computed,
        copies * 12 * calls,
    )
    assert stats.speedup_ceiling == calls / hand.computed
    assert torch.equal(stats.region_counts, torch.full((batch, 8, 8), hand.computed))
    assert stats.plan.shares == SHARES and stats.steps_planned == 8 and stats.warnings == ()


@pytest.mark.parametrize("batch, guidance", [(1, 1.0), (3, 4.0)])
@pytest.mark.parametrize("scheduler", [pipelines.euler, HEUN])
def test_skipped_steps_of_lumina(scheduler, batch, guidance):
    result, expected, stats, hand = skipping("lumina", batch, scheduler, guidance=guidance)
    assert relative_error(result, expected) < 1e-5
    assert (stats.steps_dense, stats.steps_skipped) == (4, 4)
    copies = batch * (2 if guidance > 1 else 1)
    assert stats.tokens_computed == copies * 64 * hand.computed
    assert (stats.text_tokens, stats.text_tokens_total) == (0, 0)


@pytest.mark.parametrize("return_dict", [True, False])
def test_skipped_steps_in_a_loop_by_hand(return_dict):
    """No pipeline at all: the transformer is called with and without a dict to return."""

    def call(transformer, latents, text, pooled, t):
        output = transformer(latents, text, pooled, t, return_dict=return_dict)
        assert isinstance(output, Transformer2DModelOutput if return_dict else tuple)
        return output.sample if return_dict else output[0]

    pipe = pipelines.sd3()
    inputs, scheduler = sd3_inputs(pipe, 2), pipelines.euler()
    hand = ByHand(pipe.transformer, scheduler, SHARES)
    expected = loop(hand, scheduler, inputs, call=call)
    ras.enable(pipe.transformer, plan=SHARES, extrapolation=0.62, scheduler=scheduler)
    result = loop(pipe.transformer, scheduler, inputs, call=call)
    stats = ras.stats(pipe.transformer)
    ras.disable(pipe.transformer)
    assert relative_error(result, expected) < 1e-5
    assert (stats.steps_dense, stats.steps_skipped) == (4, 4)


def test_factors_of_a_plan_count_for_their_steps():
    shares, factors = (1, 1, 0, 0, 1, 0), (0, 0, 0.3, 1.0, 0, 0)
    pipe, plain = pipelines.sd3(), pipelines.sd3()
    inputs = sd3_inputs(pipe)
    hand = ByHand(plain.transformer, plain.scheduler, shares)

    def forward(*args, **kwargs):
        hand.factor = factors[hand.stage]
        return hand(*args, **kwargs)

    plain.transformer.forward = forward
    with ras.enabled(pipe, plan=ras.Plan(shares, factors)):
        assert relative_error(run(pipe, inputs, 6), run(plain, inputs, 6)) < 1e-5


def test_held_noise_in_skipped_steps():
    pipe, plain = pipelines.sd3(), pipelines.sd3()
    inputs = sd3_inputs(pipe)
    plain.transformer.forward = ByHand(plain.transformer, plain.scheduler, SHARES, 0.0)
    with ras.enabled(pipe, plan=SHARES, extrapolation=0):
        assert torch.equal(run(pipe, inputs), run(plain, inputs))


def test_skipped_steps_do_not_run_the_model():
    pipe = pipelines.sd3()
    entered, seen = [], []
    pipe.transformer.pos_embed.register_forward_hook(lambda *_: entered.append(len(seen)))
    pipe.transformer.register_forward_hook(lambda *_: seen.append(0))
    with ras.enabled(pipe, plan=SHARES):
        run(pipe, sd3_inputs(pipe))
    assert entered == list(DENSE_STEPS) and len(seen) == 8


def test_guidance_cut_off_at_a_skipped_step():
    """There is no noise of half the batch to reuse: the step is dense instead."""
    pipe = pipelines.sd3()

    def cut(pipe, step, t, tensors):
        if step == 3:
            pipe._guidance_scale = 0.0
            tensors = {name: value.chunk(2)[-1] for name, value in tensors.items()}
        return tensors

    names = ["prompt_embeds", "pooled_prompt_embeds"]
    with ras.enabled(pipe, plan=SHARES):
        run(
            pipe,
            sd3_inputs(pipe, 2),
            callback_on_step_end=cut,
            callback_on_step_end_tensor_inputs=names,
        )
        stats = ras.stats(pipe)
    assert (stats.steps_dense, stats.steps_skipped) == (5, 3)


@pytest.mark.parametrize("partial", [0.0, 0.25])
def test_skip_layer_guidance_with_skipped_steps(partial):
    """Its branch reuses its own noise, and computes where it has none yet."""
    pipe = pipelines.sd3()
    calls = []
    hook = pipe.transformer.transformer_blocks[0].register_forward_hook
    with ras.enabled(pipe, plan=(1, 1, partial, 1, 0, 0, 1, 0)):
        hook(lambda *_: calls.append(0))
        result = run(
            pipe,
            sd3_inputs(pipe),
            skip_guidance_layers=[1],
            skip_layer_guidance_start=0.01,
            skip_layer_guidance_stop=0.7,
        )
        stats = ras.stats(pipe)
    assert result.isfinite().all()
    assert (stats.steps_dense, stats.steps_sparse) == (4, int(partial > 0))
    # 1 to 5 have a second call, which is dense in a partial step
    assert len(calls) == 4 + 2 + 2 * (partial > 0)


# --- whole runs: partial steps --------------------------------------------------------------------

PARTIAL = (1, 1, 0.5, 0.5, 1, 0.25, 0.25, 0.5)
PARTIAL_STEPS = [2, 3, 5, 6, 7]


class Carried:
    """The oracle with noise, keys and values carried on, token by token, and text that stays."""

    def __init__(self, *args, extrapolation=0.62, carry=True, stay=False, **options):
        super().__init__(*args, **options)
        self.pace, self.carry, self.stay = extrapolation, carry, stay
        self.changes, self.text, self.times, self.noise_changes = {}, {}, {}, {}

    def gain(self, sample, token):
        t1, t0 = self.times[sample][token]
        return 0.0 if t0 is None else gain(abs(self.now - t1), abs(t1 - t0), self.pace)

    def again(self, sample, token):
        """Whether it was last computed at this level too: then that is what is replaced."""
        return float(sample in self.times and self.times[sample][token][0] == self.now)

    def carried(self, sample, kept, changes, rows, token_dim):
        """What is kept of each token, plus its gain times its change unless it is active."""
        out = kept.clone()
        for token in set(range(kept.shape[token_dim])) - set(rows.tolist()):
            at = (slice(None),) * token_dim + (token,)
            out[at] += self.gain(sample, token) * changes[at]
        return out

    def remember(self, layer, sample, rows, k, v):
        old = self.cache.get((layer, sample))
        new = super().remember(layer, sample, rows, k, v)
        last = self.changes.get((layer, sample), (torch.zeros_like(new[0]),) * 2)
        if old is not None:
            changes = tuple(change.clone() for change in last)
            for token in range(new[0].shape[1]) if rows is None else rows.tolist():
                again = self.again(sample, token)
                for change, a, b in zip(changes, new, old):
                    change[:, token] = a[:, token] - b[:, token] + again * change[:, token]
            last = changes
        self.changes[layer, sample] = last
        if rows is None or not self.carry:
            return new
        return tuple(self.carried(sample, a, c, rows, 1) for a, c in zip(new, last))

    def linear(self, name, x):
        if not name.endswith(("add_k_proj", "add_v_proj")):
            return super().linear(name, x)
        if not (self.stay and self.partial):
            self.text[name, self.at] = super().linear(name, x)
        return self.text[name, self.at]

    def __call__(self, latents, rows=None, skip_layers=(), **inputs):
        out = []
        for i in range(len(latents)):
            self.now, self.at = position(self.sigma(inputs["timestep"][i].item())), i
            active = None if rows is None else rows[i]
            self.partial = active is not None
            tokens = self.sample(i, latents, active, **inputs)
            old = self.noise.get(i)
            self.noise[i] = self.merge(old, tokens, active)
            change = self.noise_changes.get(i, torch.zeros_like(self.noise[i]))
            if old is not None:
                again = torch.tensor([self.again(i, token) for token in range(len(old))])
                fresh = self.noise[i] - old + again[:, None] * change
                change = fresh if active is None else self.merge(change, fresh[active], active)
            self.noise_changes[i] = change
            given = self.noise[i]
            if active is not None:
                given = self.carried(i, self.noise[i], change, active, 0)
            count = len(given)
            times = self.times.setdefault(i, [(None, None)] * count)
            for token in range(count) if active is None else active.tolist():
                if not self.again(i, token):
                    times[token] = self.now, times[token][0]
            out.append(self.image(given, latents.shape[-2:]))
        return torch.stack(out)


class CarriedSD3(Carried, naive.NaiveSD3):
    def sigma(self, timestep):
        return timestep / 1000


class CarriedLumina(Carried, naive.NaiveLumina):
    def sigma(self, timestep):
        return 1 - timestep


@pytest.mark.parametrize("stay", [False, True])
@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("sizes", [{}, dict(qk_norm="rms_norm", dual_attention_layers=(0, 1))])
def test_partial_steps(monkeypatch, sizes, carry, stay):
    """With keys and values carried on and without, with text that walks and that stays."""
    pipe = pipelines.sd3(**sizes)
    record = Recorder(monkeypatch, pipe)
    oracle = CarriedSD3(pipe.transformer, carry=carry, stay=stay)
    settings = dict(extrapolation=0.62, kv_correction=carry, reuse_text=stay)
    with ras.enabled(pipe, plan=PARTIAL, **settings):
        run(pipe, sd3_inputs(pipe, 2))
        stats = ras.stats(pipe)
    check(record, oracle, PARTIAL_STEPS)
    assert [rows.shape[1] for rows in record.rows] == [32, 32, 16, 16, 32]
    tokens = 3 * 64 + 32 + 32 + 16 + 16 + 32
    walks = 3 if stay else 8
    assert (stats.steps_dense, stats.steps_sparse, stats.steps_skipped) == (3, 5, 0)
    assert (stats.tokens_computed, stats.tokens_total) == (4 * tokens, 4 * 8 * 64)
    assert (stats.text_tokens, stats.text_tokens_total) == (4 * 12 * walks, 4 * 12 * 8)
    assert stats.speedup_ceiling == 8 * 76 / (tokens + 12 * walks)
    assert stats.speedup_ceiling == stats.plan.speedup(64, 12, reuse_text=stay)
    assert stats.region_counts.flatten(1).sum(dim=1).tolist() == [tokens, tokens]


@pytest.mark.parametrize("carry", [False, True])
def test_partial_steps_of_a_second_order_run(monkeypatch, carry):
    pipe = pipelines.sd3(scheduler=HEUN())
    record = Recorder(monkeypatch, pipe)
    oracle = CarriedSD3(pipe.transformer, carry=carry)
    with ras.enabled(pipe, plan=PARTIAL, extrapolation=0.62, kv_correction=carry):
        run(pipe, sd3_inputs(pipe, 2))
    check(record, oracle, PARTIAL_STEPS, order=2)


@pytest.mark.parametrize("carry", [False, True])
def test_partial_steps_of_lumina(monkeypatch, carry):
    pipe = pipelines.lumina()
    record = Recorder(monkeypatch, pipe)
    plain = lumina_oracle(pipe, 16, 16)
    oracle = CarriedLumina(
        pipe.transformer, carry=carry, base_length=plain.base_length, factor=plain.factor
    )
    with ras.enabled(pipe, plan=PARTIAL, extrapolation=0.62, kv_correction=carry):
        run(pipe, pipelines.lumina_inputs(pipe, 2))
    check(record, oracle, PARTIAL_STEPS)


def test_the_active_rows_are_those_that_drift(monkeypatch):
    """From the guided noise that the scheduler got, also across a skipped step."""
    pipe = pipelines.sd3()
    record = Recorder(monkeypatch, pipe)
    shares = (1, 1, 0.5, 0, 0.25, 1, 0.5, 0.5)
    with ras.enabled(pipe, plan=shares):
        run(pipe, sd3_inputs(pipe, 2))
    sigmas, rows, updates = levels(8), iter(record.rows), []
    for step, share in enumerate(shares):
        active = None
        if 0 < share < 1:
            active = next(rows)
            scores = drift_scores(updates, sigmas[step], 16)
            best = scores.argsort(dim=1, descending=True)[:, : int(share * 64)]
            assert torch.equal(active, best.sort(dim=1).values), step
        if share:
            updates.append((sigmas[step], active, record.noises[step]))
    assert len(record.rows) == 4


def text_rows(pipe):
    """The text's keys in each layer's cache."""
    caches = [layer._ours.cache for layer in Controller.of(pipe.transformer)._layers]
    return torch.stack([cache._kept[0][:, cache._image_tokens :] for cache in caches])


@pytest.mark.parametrize("stays", [False, True])
def test_text_rows_stay_as_they_are(stays):
    pipe = pipelines.sd3()
    seen = []

    def look(pipe, step, t, tensors):
        if step < 7:  # after the last one nothing is kept
            seen.append(text_rows(pipe).clone())
        return tensors

    with ras.enabled(pipe, plan=PARTIAL, reuse_text=stays):
        run(pipe, sd3_inputs(pipe, 2), callback_on_step_end=look)
    same = [torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert same == [stays and share < 1 for share in PARTIAL[1:7]]


@pytest.mark.parametrize("stays", [False, True])
def test_control_net_with_partial_and_skipped_steps(stays):
    pipe = pipelines.sd3_controlnet()
    inputs = sd3_inputs(pipe, control_image=normal(1, 3, 128, 128).sigmoid())
    with ras.enabled(pipe, plan=(1, 1, 0.5, 0, 1, 0.25, 0, 0.5), reuse_text=stays):
        assert run(pipe, inputs).isfinite().all()
        stats = ras.stats(pipe)
    assert (stats.steps_dense, stats.steps_sparse, stats.steps_skipped) == (3, 3, 2)


def test_nothing_is_kept_when_a_run_ends(monkeypatch):
    """Neither caches nor what drift is measured by; interrupted or not."""
    pipe = pipelines.sd3()

    def interrupt(pipe, step, t, tensors):
        pipe._interrupt = step == 3
        return tensors

    with ras.enabled(pipe, plan=(1, 1, 0.5, 0, 1, 0.25, 0, 0.5)):
        for call in ({}, dict(callback_on_step_end=interrupt)):
            run(pipe, sd3_inputs(pipe), **call)
            state = Controller.of(pipe.transformer)._run
            assert state.selection is None and not state.noise
            assert ras.stats(pipe).cache_bytes > 0


@pytest.mark.parametrize("family", ["sd3", "lumina"])
def test_half_precision(family):
    pipe = getattr(pipelines, family)()
    pipe.to(torch.bfloat16)
    inputs = {
        k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in getattr(pipelines, f"{family}_inputs")(pipe, 2).items()
    }
    with ras.enabled(pipe, plan=(1, 1, 0.5, 0, 1, 0.25, 0, 0.5), reuse_text=True):
        result = run(pipe, inputs)
        assert ras.stats(pipe).steps_skipped == 2
    assert result.dtype == torch.bfloat16 and result.isfinite().all()


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
    assert stats.plan == plan_run(ras.RASConfig(), levels(20), 64, 12)[0]


def test_image_to_image_follows_its_own_plan():
    pipe = pipelines.sd3(StableDiffusion3Img2ImgPipeline, vae=pipelines.autoencoder())
    inputs = sd3_inputs(pipe, latents=False, strength=0.5, image=normal(1, 3, 128, 128).sigmoid())
    with ras.enabled(pipe, speedup=2.5):
        run(pipe, inputs, steps=20)
        stats = ras.stats(pipe)
    assert stats.plan == plan_run(ras.RASConfig(2.5), levels(20)[10:], 64, 12)[0]
    assert stats.steps_dense + stats.steps_sparse + stats.steps_skipped == 10


# --- the method on the transformer ----------------------------------------------------------------


def test_forward_is_back():
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe)
    expected = run(pipe, inputs)
    with ras.enabled(pipe, plan=SHARES):
        assert not torch.equal(run(pipe, inputs), expected)
        ras.enable(pipe, plan=SHARES)  # again, without a disable between
    assert "forward" not in vars(pipe.transformer)
    assert torch.equal(run(pipe, inputs), expected)


def wrap(transformer):
    """What offloading does: a function in the place of `forward`, which calls what was there."""
    inner, calls = transformer.forward, []

    def forward(*args, **kwargs):
        calls.append(0)
        return inner(*args, **kwargs)

    transformer.forward = forward
    return SimpleNamespace(forward=forward, calls=calls)


def test_a_wrapper_that_was_there_before():
    """It runs where something is computed, and is back after `disable`."""
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe)
    wrapper = wrap(pipe.transformer)
    expected = run(pipe, inputs)
    wrapper.calls.clear()
    with ras.enabled(pipe, plan=SHARES):
        run(pipe, inputs)
        assert len(wrapper.calls) == len(DENSE_STEPS)
    assert pipe.transformer.forward is wrapper.forward
    assert torch.equal(run(pipe, inputs), expected)


def test_a_wrapper_put_on_top():
    """It stays when `ras` goes, and reaches the plain model; taken off, it leaves that."""
    pipe, plain = pipelines.sd3(), pipelines.sd3()
    inputs = sd3_inputs(pipe)
    expected = run(plain, inputs)
    ras.enable(pipe, plan=SHARES)
    ours = pipe.transformer.forward
    wrapper = wrap(pipe.transformer)
    with ras.enabled(plain, plan=SHARES):
        assert torch.equal(run(pipe, inputs), run(plain, inputs))
    assert len(wrapper.calls) == 8
    ras.disable(pipe)
    assert pipe.transformer.forward is wrapper.forward
    assert torch.equal(run(pipe, inputs), expected)
    pipe.transformer.forward = ours
    assert torch.equal(run(pipe, inputs), expected)
    with ras.enabled(pipe, plan=SHARES):
        run(pipe, inputs)
        assert ras.stats(pipe).steps_skipped == 4
    assert torch.equal(run(pipe, inputs), expected)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("ran", [False, True])
def test_copy_of_an_enabled_transformer(ran, wrapped):
    """It runs by itself, also where the one it was copied from has been disabled."""
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe, 2)
    call = dict(
        hidden_states=inputs["latents"],
        encoder_hidden_states=inputs["prompt_embeds"],
        pooled_projections=inputs["pooled_prompt_embeds"],
        timestep=torch.full((2,), 500.0),
        return_dict=False,
    )
    expected = pipe.transformer(**call)[0]
    if wrapped:
        wrap(pipe.transformer)
    ras.enable(pipe, plan=SHARES)
    if ran:
        run(pipe, inputs)
    twin = copy.deepcopy(pipe.transformer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ras.RASWarning)
        assert relative_error(twin(**call)[0], expected) < 1e-5
        before = run(pipe, inputs)
        ras.disable(pipe)
        assert relative_error(twin(**call)[0], expected) < 1e-5
    with torch.no_grad():
        twin.proj_out.weight.zero_()  # the copy has weights of its own
    assert torch.equal(pipe.transformer(**call)[0], expected)
    with ras.enabled(pipe, plan=SHARES):
        assert torch.equal(run(pipe, inputs), before)
