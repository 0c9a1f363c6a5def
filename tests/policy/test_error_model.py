"""The error model, held against explicit vectors, and the search on it."""

import itertools
from functools import partial

import numpy as np
import pytest
from support.oracle import gain
from support.runs import levels, planned

import ras
from ras.clock import Clock, position, roughness
from ras.layout import Layout
from ras.policy import error_model
from ras.policy.error_model import JUMP, SHAKE, ErrorModel, covariance, gains
from ras.policy.planner import add_partial, plan_run

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]


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
