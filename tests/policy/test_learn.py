"""Learning: from one dense run, for all later ones like it."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from support import pipelines
from support.pipelines import normal, sd3_inputs
from support.runs import run

import ras
from ras.clock import Clock
from ras.layout import Layout
from ras.plan import dense_steps
from ras.policy import learning, planner
from ras.policy.error_model import ErrorModel, covariance
from ras.policy.learning import DOUBT, Learned, covariances, mean_of, mixed

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]
STEPS = 10


@pytest.fixture
def pipe():
    return pipelines.sd3()


@pytest.fixture
def trusting(monkeypatch):
    """One sample is believed, however little it says, so that a plan by it is another one."""
    monkeypatch.setattr(learning, "DOUBT", 0.1)
    monkeypatch.setattr(planner, "WORTH", 1e-9)


def guided_noise(pipe, **call):
    """What the scheduler got in each step of a run."""
    noises, step = [], pipe.scheduler.step

    def seen(noise, *args, **kwargs):
        noises.append(noise.clone())
        return step(noise, *args, **kwargs)

    pipe.scheduler.step = seen
    try:
        run(pipe, sd3_inputs(pipe, 2), STEPS, **call)
    finally:
        del pipe.scheduler.step
    return noises


def learnt(pipe):
    return ras.stats(pipe).config.learned


def test_the_next_run_is_dense_and_later_ones_are_planned_by_it(pipe, trusting):
    expected, inputs = run(pipe, sd3_inputs(pipe), STEPS), sd3_inputs(pipe)
    ras.enable(pipe, speedup=2)
    run(pipe, inputs, STEPS)
    usual = ras.stats(pipe).plan
    ras.learn(pipe)
    assert torch.equal(run(pipe, inputs, STEPS), expected)
    assert ras.stats(pipe).steps_dense == STEPS and learnt(pipe).samples == 1
    run(pipe, inputs, STEPS, seed=3)
    ours = ras.stats(pipe).plan
    assert ours.shares.count(1) == usual.shares.count(1) and ours != usual
    for other in (dict(guidance=2.0), dict(steps=STEPS - 1)):  # which nothing was learnt of
        call = {"steps": STEPS, **other}
        run(pipe, inputs, **call)
        found = ras.stats(pipe).plan
        with ras.enabled(pipelines.sd3(), speedup=2) as plain:
            run(plain, inputs, **call)
            assert ras.stats(plain).plan == found


def test_what_is_learnt_by_hand(pipe):
    """The mean of two samples' covariances, each scaled to the prior's change in mid-run."""
    noises = [noise.double() for noise in guided_noise(pipe)]
    ras.enable(pipe)
    ras.learn(pipe)
    run(pipe, sd3_inputs(pipe, 2), STEPS)
    found = learnt(pipe)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas]
    prior, expected = covariance(Clock(tuple(sigmas)), 0.625), 0
    pairs = [i for i in range(STEPS - 1) if sigmas[i] <= 0.97 and sigmas[i + 1] >= 0.1]
    change = np.mean([prior[i, i] + prior[i + 1, i + 1] - 2 * prior[i, i + 1] for i in pairs])
    for sample in range(2):
        flat = torch.stack([noise[sample].flatten() for noise in noises])
        own = (flat.diff(dim=0) ** 2).sum(1)[pairs].mean().item()
        expected = expected + (flat @ flat.T).numpy() * change / own / 2
    for i, row in enumerate(found.kernel):
        np.testing.assert_allclose(row, expected[i, : i + 1], rtol=1e-4)
    assert found.samples == 2
    weight = 2 / (2 + DOUBT)
    np.testing.assert_allclose(
        found.covariances(prior)[0], weight * expected + (1 - weight) * prior, rtol=1e-4
    )


def test_samples_count_for_more_together():
    shares = [mixed(np.ones(1), samples, np.zeros(1)).item() for samples in (1, 6, 90)]
    np.testing.assert_allclose(shares, [0.1, 0.4, 10 / 11])


def test_samples_count_alike():
    """However much their noise changes, and what does not change at all is of no account."""
    clock = Clock((1.0, 0.9, 0.7, 0.4, 0.0))
    prior = covariance(clock, 0.625)
    kernels = covariances([normal(3, 2, 5, seed=seed) for seed in range(4)])
    many = [kernels[0], 1e6 * kernels[1], kernels[2]]
    np.testing.assert_allclose(mean_of(many, prior, clock), mean_of(kernels, prior, clock))
    still = [*kernels, np.ones((4, 4))]
    np.testing.assert_allclose(mean_of(still, prior, clock), mean_of(kernels, prior, clock))
    np.testing.assert_allclose(mean_of([np.ones((4, 4))], prior, clock), prior)


def test_learning_again_adds_to_it(pipe):
    ras.enable(pipe)
    for seed in range(2):
        ras.learn(pipe)
        run(pipe, sd3_inputs(pipe), STEPS, seed=seed)
    both = learnt(pipe)
    kernels = []
    for seed in range(2):
        ras.enable(pipe)
        ras.learn(pipe)
        run(pipe, sd3_inputs(pipe), STEPS, seed=seed)
        kernels.append(learnt(pipe).kernel)
    assert both.samples == 2
    for row, *rows in zip(both.kernel, *kernels):
        np.testing.assert_allclose(row, np.mean(rows, axis=0), rtol=1e-6)


def test_a_file_for_another_process(pipe, tmp_path):
    file = tmp_path / "learned.json"
    ras.enable(pipe, speedup=2)
    ras.learn(pipe, file)
    assert not file.exists()
    run(pipe, sd3_inputs(pipe), STEPS)
    planned = ras.plan(pipe, STEPS)
    told = str(learnt(pipe))
    assert "1 sample of 10 steps" in told and "dB at 1.5x" in told
    other = pipelines.sd3()
    ras.enable(other, speedup=2, learned=file)
    run(other, sd3_inputs(other), STEPS)
    assert ras.stats(other).plan == planned.plan and learnt(other).samples == 1
    for row, kept in zip(learnt(pipe).kernel, learnt(other).kernel):
        np.testing.assert_allclose(row, kept, rtol=1e-5)
    with pytest.raises(ValueError, match="another model"):
        ras.enable(pipelines.lumina(), learned=file)


def test_a_run_that_breaks_off_teaches_nothing(pipe):
    class Stop(Exception):
        pass

    def stop(pipe, step, t, tensors):
        raise Stop

    ras.enable(pipe)
    ras.learn(pipe)
    with pytest.raises(Stop):
        run(pipe, sd3_inputs(pipe), STEPS, callback_on_step_end=stop)
    assert learnt(pipe) is None
    run(pipe, sd3_inputs(pipe), STEPS)
    assert learnt(pipe).samples == 1 and ras.stats(pipe).steps_dense == STEPS


@pytest.mark.filterwarnings("default::ras.RASWarning")
def test_noise_that_is_not_finite_teaches_nothing(pipe):
    ras.enable(pipe)
    ras.learn(pipe)
    broken = {
        name: value * float("nan") if torch.is_tensor(value) else value
        for name, value in sd3_inputs(pipe).items()
    }
    with pytest.warns(ras.RASWarning, match="nothing to learn"):
        run(pipe, broken, STEPS)
    assert learnt(pipe) is None


def test_it_gains_by_its_own_measure(pipe, monkeypatch):
    monkeypatch.setattr(learning, "WORTH", 0.0)
    ras.enable(pipe)
    ras.learn(pipe)
    run(pipe, sd3_inputs(pipe), STEPS)
    gains = [learnt(pipe).gain(speedup) for speedup in (1.25, 1.5, 2, 3, STEPS)]
    assert min(gains) >= -1e-9 and max(gains) > 0


def still_but_for(step, size):
    """What noise teaches that wanders as by the prior, but for a jump at one step."""
    clock = Clock(tuple(np.linspace(1, 0, 13)))
    prior = covariance(clock, 0.625)
    jump = np.zeros_like(prior)
    jump[step:, step:] = size * np.abs(prior).max()
    return clock, Learned.of(clock, (prior + jump)[None], {})


@pytest.mark.parametrize("size", [0.02, 0.05])
def test_a_plan_that_gains_little_is_the_defaults(size, monkeypatch):
    """Below half a dB; the text tells of nothing else."""
    clock, learned = still_but_for(9, size)
    config = ras.RASConfig(speedup=3)
    monkeypatch.setattr(learning, "DOUBT", 1.0)
    usual = planner.plan_run(config, clock, Layout()).plan
    taught = dataclasses.replace(config, learned=learned)
    ours = planner.plan_run(taught, clock, Layout()).plan
    prior = covariance(clock, 0.625)
    models = [ErrorModel(clock.weights, k, hold=False) for k in learned.covariances(prior)]
    free = models[0].best(4)
    gain = min(model.gain(free, dense_steps(usual.shares)) for model in models)
    assert free != tuple(dense_steps(usual.shares)) and gain > 0
    if size == 0.02:
        assert gain < 0.5 and ours == usual and learned.gain(3) == 0
        assert "dB at 3x" not in str(learned)
        assert "default plans are kept" in str(still_but_for(9, 0)[1])
    else:
        assert gain > 0.5 and tuple(dense_steps(ours.shares)) == free
        assert learned.gain(3) == pytest.approx(gain) and f"{gain:.1f} dB at 3x" in str(learned)


def test_who_cannot_learn(pipe, tmp_path):
    with pytest.raises(ValueError, match="not enabled"):
        ras.learn(pipe)
    for settings in (dict(plan=[1, 0]), dict(sample_ratio=0.5)):
        with ras.enabled(pipe, **settings), pytest.raises(ValueError, match="speedup="):
            ras.learn(pipe)
    with ras.enabled(pipe), pytest.raises(TypeError, match="file"):
        ras.learn(pipe, 3)
    for file in (tmp_path, tmp_path / "nowhere" / "learned.json"):
        with ras.enabled(pipe), pytest.raises(ValueError, match="folder"):
            ras.learn(pipe, file)


@pytest.mark.filterwarnings("default::ras.RASWarning")
def test_a_file_that_cannot_be_written_costs_no_image(pipe, tmp_path):
    expected = run(pipe, sd3_inputs(pipe), STEPS)
    folder = tmp_path / "gone"
    folder.mkdir()
    ras.enable(pipe)
    ras.learn(pipe, folder / "learned.json")
    folder.rmdir()
    with pytest.warns(ras.RASWarning, match="in no file"):
        assert torch.equal(run(pipe, sd3_inputs(pipe), STEPS), expected)
    assert learnt(pipe).samples == 1


@pytest.mark.parametrize(
    "change",
    [
        dict(ras_learned=2),
        dict(kernel=[[1.0]]),
        dict(kernel=3),
        dict(samples=0),
        dict(samples="many"),
        dict(stages=[1.0]),
        dict(made_for=3),
    ],
    ids=str,
)
def test_files_that_are_something_else(tmp_path, change):
    file = tmp_path / "learned.json"
    clock = Clock((1.0, 0.5, 0.0))
    learned = Learned.of(clock, covariances([normal(1, 4), normal(1, 4, seed=1)]), {"a.b": 1})
    learned.save(file)
    for row, kept in zip(Learned.load(file).kernel, learned.kernel):
        assert row == pytest.approx(kept, rel=1e-5)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match="nothing that ras"):
        ras.RASConfig(learned=file)
    with pytest.raises(TypeError, match="learned"):
        ras.RASConfig(learned=3)
