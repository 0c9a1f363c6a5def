"""Learning: from one call of a pipeline, for all later ones like it."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3InpaintPipeline
from support import pipelines
from support.pipelines import normal
from support.snapshot import Snapshot, check_undone

import ras
from ras.clock import Clock
from ras.policy import trials
from ras.policy.error_model import covariance
from ras.policy.trials import Trials, covariances, mean_of, mixed

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]
STEPS, SAMPLES = 12, 3
CALL = dict(
    num_inference_steps=STEPS,
    guidance_scale=4.0,
    max_sequence_length=4,
    num_images_per_prompt=SAMPLES,
    output_type="np",
    **pipelines.size(16, 16),
)


@pytest.fixture
def pipe():
    return pipelines.sd3(vae=pipelines.autoencoder(), parts=pipelines.text_encoders())


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(pipe, seed=0, **call):
    return pipe("a red ring", generator=noise(seed), **{**CALL, **call}).images


def finals(pipe, config):
    """What a run ends with, a row for each sample."""
    with ras.enabled(pipe, config):
        return torch.as_tensor(draw(pipe, output_type="latent")).flatten(1).double()


def gained(monkeypatch, decibels):
    """Plans but the default gain so many dB on each sample; the plans that were tried."""
    tried = []

    def errors(trials, config, tick):
        tried.append(config.plan)
        better = 10 ** (-0.1 * np.array(decibels)) if len(tried) > 1 else np.ones(SAMPLES)
        return (1e-3 * better).tolist()

    monkeypatch.setattr(Trials, "errors", errors)
    return tried


def test_the_call_is_the_dense_one_and_later_ones_go_by_it(pipe, monkeypatch, tmp_path):
    before, expected, file = Snapshot(pipe), draw(pipe), tmp_path / "plan.json"
    ras.enable(pipe, speedup=2)
    draw(pipe)
    usual = ras.stats(pipe).plan
    tried = gained(monkeypatch, (9, 8, 7))
    generator = noise()
    images = ras.learn(pipe, "a red ring", file=file, generator=generator, **CALL).images
    assert np.array_equal(images, expected)
    assert tried[0] == usual and 1 < len(tried) <= 4 and len(set(tried)) == len(tried)
    best = tried[1]
    draw(pipe, seed=3)
    ours = ras.stats(pipe).plan
    assert ours.shares == best.shares and ours.extrapolation == best.extrapolation
    mean, spread = 8, (2 + 16) / 3
    told = f"surely {mean - 2 * math.sqrt(spread / 3):.1f} dB nearer than the default plan"
    note = f"2x in {STEPS} steps, learnt from 3 samples: {told}"
    assert ras.stats(pipe).learnt == ours.note == note and note in str(ras.stats(pipe))
    ras.disable(pipe)
    check_undone(before, pipe)
    with ras.enabled(pipe, plan=file):
        draw(pipe)
        assert ras.stats(pipe).plan == ours
    assert json.loads(file.read_text())["note"] == note


@pytest.mark.parametrize("gains", [(2, 2, 2), (30, 0, -9), (-9, -9, -9)])
def test_the_default_stays_where_nothing_is_surely_nearer(pipe, monkeypatch, tmp_path, gains):
    ras.enable(pipe, speedup=2)
    draw(pipe)
    usual, file = ras.stats(pipe).plan, tmp_path / "plan.json"
    gained(monkeypatch, gains)
    ras.learn(pipe, "a red ring", file=file, generator=noise(), **CALL)
    assert "the default plan" in ras.stats(pipe).learnt
    assert ras.stats(pipe).config.plan is None and ras.Plan.load(file).shares == usual.shares
    draw(pipe)
    assert ras.stats(pipe).plan == usual


@pytest.mark.parametrize("seeded", [True, False])
def test_plans_are_tried_on_the_noise_of_the_call(pipe, monkeypatch, seeded, capsys):
    """The errors are those of runs by hand; afterwards noise goes on as if there had been one.

    A bar counts the calls.
    """
    found, errors = {}, Trials.errors

    def noted(trials, config, tick):
        found[config.plan] = errors(trials, config, tick)
        return found[config.plan]

    monkeypatch.setattr(Trials, "errors", noted)
    torch.manual_seed(5)
    call = dict(generator=noise()) if seeded else {}
    with ras.enabled(pipe, speedup=1):
        pipe("a red ring", **CALL, **call)
    expected = torch.randn(3), torch.randn(3, generator=call.get("generator"))
    torch.manual_seed(5)
    call = dict(generator=noise()) if seeded else {}
    ras.enable(pipe, speedup=2, kv_correction=False)
    ras.learn(pipe, "a red ring", **CALL, **call)
    drawn = torch.randn(3), torch.randn(3, generator=call.get("generator"))
    assert all(map(torch.equal, drawn, expected))
    ras.disable(pipe)
    assert len(found) > 1
    calls = 1 + len(found)
    bar = capsys.readouterr().err.rpartition("\r")[2]
    assert bar.startswith("learning: 100%") and f"| {calls}/{calls} [" in bar
    if not seeded:
        return
    dense = finals(pipe, ras.RASConfig(speedup=1))
    for plan, wrong in found.items():
        off = finals(pipe, ras.RASConfig(plan=plan, kv_correction=False)) - dense
        by_hand = off.square().sum(1) / dense.square().sum(1)
        assert wrong == pytest.approx(by_hand.tolist(), rel=1e-4)


def test_a_call_that_breaks_off_leaves_the_settings(pipe, monkeypatch):
    ras.enable(pipe, speedup=2)
    draw(pipe)
    usual, made = ras.stats(pipe).plan, []

    def errors(trials, config, tick):
        with trials._using(config):
            made.append(config)
            raise KeyboardInterrupt

    monkeypatch.setattr(Trials, "errors", errors)
    with pytest.raises(KeyboardInterrupt):
        ras.learn(pipe, "a red ring", generator=noise(), **CALL)
    assert made[0].plan == usual and ras.stats(pipe).config == ras.RASConfig(speedup=2)
    assert ras.stats(pipe).learnt is None
    draw(pipe)
    assert ras.stats(pipe).plan == usual


def test_what_other_runs_are_planned_by(pipe, monkeypatch):
    """Another guidance or number of steps has a plan of its own, with one warning."""
    ras.enable(pipe, speedup=2)
    gained(monkeypatch, (9, 8, 7))
    ras.learn(pipe, "a red ring", generator=noise(), **CALL)
    learnt = ras.stats(pipe).config
    draw(pipe, **pipelines.size(16, 32))  # whatever the size
    assert ras.stats(pipe).plan == learnt.plan
    for other in (dict(guidance_scale=2.0), dict(num_inference_steps=STEPS - 1)):
        ras.enable(pipe, learnt)
        with pytest.warns(ras.RASWarning, match="another is made"):
            draw(pipe, **other)
        assert ras.stats(pipe).plan != learnt.plan


def not_finite(pipe, monkeypatch):
    pipe.transformer.proj_out.bias.data.fill_(float("nan"))
    return {}


def breaks_off(pipe, monkeypatch):
    def stop(pipe, step, timestep, state):
        pipe._interrupt = step >= 5
        return {}

    return dict(callback_on_step_end=stop)


def unseen(pipe, monkeypatch):
    monkeypatch.setattr(Trials, "_see", lambda *_: None)
    return {}


def in_no_file(pipe, monkeypatch):
    def save(plan, path):
        raise OSError("the disk is full")

    monkeypatch.setattr(ras.Plan, "save", save)
    return dict(file="plan.json")


@pytest.mark.parametrize(
    "fault, told",
    [
        (not_finite, "not finite"),
        (breaks_off, "leaves out steps"),
        (unseen, "without steps"),
        (in_no_file, "disk is full"),
    ],
)
def test_what_goes_wrong_after_the_call_costs_no_image(pipe, monkeypatch, tmp_path, fault, told):
    monkeypatch.chdir(tmp_path)
    more = fault(pipe, monkeypatch)
    call = {name: value for name, value in more.items() if name != "file"}
    expected = draw(pipe, **call)
    ras.enable(pipe, speedup=2)
    with pytest.warns(ras.RASWarning, match=f"ras.learn: .*{told}"):
        images = ras.learn(pipe, "a red ring", generator=noise(), **CALL, **more).images
    assert np.array_equal(images, expected, equal_nan=True)
    assert ras.stats(pipe).config == ras.RASConfig(speedup=2)


def test_noise_that_a_model_writes_to_one_place(pipe, monkeypatch):
    """As captured and compiled ones do: each step's is another one."""
    place, seen = [], []

    def hook(module, args, output):
        place[:] = place or [output[0].clone()]
        place[0].copy_(output[0])
        return (place[0],)

    def noted(noises):
        seen.extend(noises)
        return covariances(noises)

    pipe.transformer.register_forward_hook(hook)
    monkeypatch.setattr(trials, "covariances", noted)
    ras.enable(pipe, speedup=2)
    ras.learn(pipe, "a red ring", generator=noise(), **{**CALL, "guidance_scale": 1.0})
    assert len(seen) == STEPS and all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


def test_what_the_pipeline_refuses_is_its_own_error(pipe):
    ras.enable(pipe, speedup=2)
    with pytest.raises(ValueError, match="divisible"):
        ras.learn(pipe, "a red ring", **{**CALL, "height": 17})


def test_the_usual_speed_up_of_few_steps(pipe):
    ras.enable(pipe)
    ras.learn(pipe, "a red ring", generator=noise(), **{**CALL, "num_inference_steps": 4})
    assert ras.stats(pipe).learnt.startswith("1x in 4 steps")


def test_who_cannot_learn(pipe, tmp_path):
    with pytest.raises(ValueError, match="not enabled"):
        ras.learn(pipe)
    with pytest.raises(TypeError, match="takes a pipeline"):
        ras.learn(pipe.transformer)
    for settings in (
        dict(plan=[1, 0]),
        dict(sample_ratio=0.5),
        dict(sample_ratio="edited", speedup=2),
        dict(mask=torch.ones(16, 16)),
        dict(speedup=2, error_reset_steps=(7,)),
        dict(speedup=2, scheduler_end_step=9),
    ):
        with ras.enabled(pipe, **settings), pytest.raises(ValueError, match="speedup= alone"):
            ras.learn(pipe)
    painting = ras.enable(pipelines.sd3(StableDiffusion3InpaintPipeline))
    with pytest.raises(ValueError, match="mask=False"):
        ras.learn(painting)
    with ras.enabled(pipe), pytest.raises(TypeError, match="file"):
        ras.learn(pipe, file=3)
    for file in (tmp_path, tmp_path / "nowhere" / "plan.json"):
        with ras.enabled(pipe), pytest.raises(ValueError, match="folder"):
            ras.learn(pipe, file=file)


# --- what dense runs show -------------------------------------------------------------------------


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
