"""`ras.calibrate`, which measures a plan, and `ras.plan`, which shows one before a run."""

import functools
import itertools
import json
import math
import re
import statistics

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, StableDiffusion3Pipeline
from support import pipelines
from support.oracle import relative_error
from support.pipelines import normal
from support.runs import Stop, held_like, merged, planned, predicted
from support.snapshot import Snapshot, check_undone
from support.zoo import ENTRIES
from torch.utils._pytree import tree_leaves

import ras
from ras import cli
from ras.clock import Clock
from ras.layout import Layout
from ras.policy import calibration, candidates
from ras.policy.error_model import ErrorModel, covariance
from ras.policy.planner import plan_run, plan_speedup
from ras.policy.trials import Trials, mixed, sure_gain

pytestmark = pytest.mark.filterwarnings("error::ras.RASWarning")

PROMPTS = ["a red ring", "nine lives"]
CALL = dict(guidance_scale=4.0, max_sequence_length=4, **pipelines.size(16, 16))
STEPS = 8


@pytest.fixture(autouse=True)
def few_runs(monkeypatch):
    monkeypatch.setattr(calibration, "ROUNDS", 2)
    monkeypatch.setattr(calibration, "TRIED", 3)
    with torch.no_grad():
        yield


def build(**options):
    parts = pipelines.text_encoders()
    return pipelines.sd3(vae=pipelines.autoencoder(), parts=parts, **options)


def calibrate(pipe, speedup=2.0, **options):
    options = {**dict(num_inference_steps=STEPS, **CALL), **options}
    return ras.calibrate(pipe, PROMPTS, speedup=speedup, **options)


def latents(pipe, seed=0):
    """The final latents of the prompts, as calibration draws them."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(PROMPTS))]
    call = dict(CALL, num_inference_steps=STEPS, output_type="latent", generator=generators)
    return pipe(PROMPTS, **call).images


class Calls:
    """Counts a pipeline's calls, and stops at the one of number `stop_at`."""

    def __init__(self, monkeypatch):
        self.made, self.stop_at, call = 0, None, StableDiffusion3Pipeline.__call__

        def counted(pipe, *args, **kwargs):
            if self.made == self.stop_at:
                raise Stop
            self.made += 1
            return call(pipe, *args, **kwargs)

        monkeypatch.setattr(StableDiffusion3Pipeline, "__call__", counted)


# --- calibrate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, dict(reuse_text=True), dict(extrapolation=0)])
@pytest.mark.parametrize("speedup", [1.6, 2.5])
def test_the_plan_is_the_one_that_is_surest_to_be_nearer(tmp_path, speedup, settings):
    """Than the default's, at the asked cost; what its note says is what a run of it gives."""
    pipe, config = build(), ras.RASConfig(**settings)
    before, expected = Snapshot(pipe), latents(pipe)
    path = tmp_path / "log.json"
    plan = calibrate(pipe, speedup, config=config, checkpoint=path)
    check_undone(before, pipe)
    assert torch.equal(latents(pipe), expected)

    reuse_text = config.reuse_text
    assert len(plan.shares) == STEPS
    assert plan.speedup(64, 12, reuse_text=reuse_text) == pytest.approx(speedup, rel=0.03)
    with ras.enabled(pipe, config, plan=plan):
        found = latents(pipe)
        assert ras.stats(pipe).speedup_ceiling == pytest.approx(speedup, rel=0.03)
        assert ras.stats(pipe).plan == plan
    squares = [(found - expected).square(), expected.square()]
    wrong, size = (square.flatten(1).sum(1) for square in squares)
    error = (wrong / size).mean().sqrt().item()
    assert float(re.search(r"latents ([\d.]+)", plan.note)[1]) == pytest.approx(error, abs=1e-4)
    measured = json.loads(path.read_text())
    tried = {n: e for n, e in measured.items() if n not in ("calibration", "noise")}
    most = 4 + calibration.ROUNDS * calibration.TRIED  # two plans, each in two forms, and rounds
    assert 1 < len(tried) <= most
    usual = next(iter(tried.values()))  # the default plan, which is tried first

    def surely(name):
        gains = [10 * math.log10(before / now) for before, now in zip(usual, tried[name])]
        squares = [(gain - statistics.mean(gains)) ** 2 for gain in gains]
        spread = (sum(squares) + 16) / len(gains) if any(gains) else 0
        return statistics.mean(gains) - 2 * math.sqrt(spread / len(gains))

    best = max(tried, key=surely)
    assert tried[best] == pytest.approx((wrong / size).tolist(), rel=1e-3)
    shares, factors = json.loads(best)
    assert tuple(shares) == plan.shares and (factors and tuple(factors)) == plan.extrapolation
    assert (": the default plan;" in plan.note) == (surely(best) <= 0)


def test_a_plan_that_is_nearer_by_chance_is_not_taken():
    """One of two prompts much nearer, the other farther: nothing is sure. Both nearer: it is."""
    assert sure_gain([1e-6, 2e-3], [1e-3, 1e-3]) < 0
    assert sure_gain([3e-4, 4e-4], [1e-3, 1e-3]) > 0
    assert sure_gain([1e-3, 1e-3], [1e-3, 1e-3]) == 0
    assert sure_gain([0.0, 0.0], [1e-3, 1e-3]) > 100
    assert sure_gain([1e-3, 1e-3], None) == math.inf
    # of one sample 8 dB is what chance may do
    assert sure_gain([1.5e-4], [1e-3]) == pytest.approx(10 * math.log10(1 / 0.15) - 8)


@pytest.mark.parametrize("gains, taken", [((12, 11), True), ((12, -1), False)])
def test_the_default_plan_comes_back_where_no_other_is_surely_nearer(monkeypatch, gains, taken):
    """All other plans gain as much, on two prompts."""
    usual = None

    def errors(trials, config, tick):
        nonlocal usual
        usual = plan_run(ras.RASConfig(speedup=2), trials.run.clock, Layout((8, 8), 12)).plan
        return [1e-3 * 10 ** (-0.1 * gain * (config.plan != usual)) for gain in gains]

    monkeypatch.setattr(Trials, "errors", errors)
    plan = calibrate(build())
    assert (plan.shares != usual.shares or plan.extrapolation is not None) == taken
    assert ("surely" in plan.note) == taken


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("scheduler", [pipelines.euler, FlowMatchHeunDiscreteScheduler])
def test_the_kernel_is_that_of_the_guided_noise(monkeypatch, tmp_path, scheduler, batch_size):
    """Of the first stage of each step, the mean over the prompts, each scaled to mid-run change."""
    pipe = build(scheduler=scheduler())
    cls = type(pipe.scheduler)
    noises, step = [], cls.step

    @functools.wraps(step)
    def recorded(scheduler, noise, *args, **kwargs):
        noises.append(noise.clone())
        return step(scheduler, noise, *args, **kwargs)

    monkeypatch.setattr(cls, "step", recorded)
    latents(pipe)
    order = pipe.scheduler.order
    stages = torch.stack(noises[::order]).double()  # (step, prompt, ...)
    assert len(stages) == STEPS and stages.shape[1] == 2
    sigmas = pipe.scheduler.sigmas.tolist()
    clock = Clock(tuple(sigmas), order)
    levels, prior = clock.sigmas, covariance(clock, 0.625)
    pairs = [i for i in range(STEPS - 1) if levels[i] <= 0.97 and levels[i + 1] >= 0.1]
    change = sum(prior[i, i] + prior[i + 1, i + 1] - 2 * prior[i, i + 1] for i in pairs)
    expected = np.zeros((STEPS, STEPS))
    for sample in stages.unbind(1):
        own = (sample.flatten(1).diff(dim=0) ** 2).sum(1)[pairs].sum().item()
        for i, j in itertools.product(range(STEPS), repeat=2):
            expected[i, j] += (sample[i] * sample[j]).sum().item() * change / own / 2

    monkeypatch.setattr(calibration, "ROUNDS", 0)
    path = tmp_path / "log.json"
    plan = calibrate(pipe, 2.2, batch_size=batch_size, checkpoint=path)
    measured = json.loads(path.read_text())["noise"]
    assert np.array(measured["kernel"]) == pytest.approx(expected, rel=1e-4)
    assert measured["clock"] == [pytest.approx(sigmas), order, "flow"]
    assert (measured["grid"], measured["text"]) == ([8, 8], 12)
    # without rounds the plan is the default's or the best by what was measured and the prior
    model = ErrorModel(clock.weights, mixed(expected, 2, prior), hold=False)
    best = plan_speedup(model, 2.2, Layout((8, 8), 12), reuse_text=False).shares
    usual = plan_run(ras.RASConfig(speedup=2.2), clock, Layout((8, 8), 12)).plan.shares
    tried = [json.loads(name)[0] for name in json.loads(path.read_text()) if name[0] == "["]
    assert {*map(tuple, tried)} == {best, usual} and plan.shares in (best, usual)


def test_factors_amount_to_the_models_gains():
    """What a run makes of a factor is the best prediction from the measured covariance."""
    generator = np.random.default_rng(0)
    sigmas = [1, 0.9, 0.8, 0.65, 0.5, 0.3, 0.1, 0]
    wander = generator.normal(size=(7, 7)) * 0.1
    kernel = covariance(Clock(tuple(sigmas)), 0.5) + wander @ wander.T
    model = ErrorModel(Clock(tuple(sigmas)).weights, kernel, hold=False)
    shares = (1, 0, 1, 1, 0, 0.5, 0)
    found = candidates.factors(model, sigmas, shares)
    assert [found[s] for s in (0, 1, 2, 3)] == [0, 0, 0, 0]
    held = held_like(torch.zeros(1, 1, 1))
    for step, noise in ((2, 0.0), (3, 1.0)):
        merged(held, torch.full((1, 1, 1), noise), None, sigmas[step], 0.0)
    gains = model.gains(2, 3, np.arange(4, 7))
    for step, gain in zip((4, 5, 6), gains):
        low, high = candidates.FACTORS
        if low < found[step] < high:
            assert predicted(held, sigmas[step], found[step]).item() - 1 == pytest.approx(
                gain, abs=1e-3
            )
    assert any(candidates.FACTORS[0] < found[s] < candidates.FACTORS[1] for s in (4, 5, 6))


def test_a_move_costs_what_it_saves(monkeypatch):
    """Round after round of plans that seem better: the speed-up stays the asked one."""
    monkeypatch.setattr(calibration, "ROUNDS", 6)
    monkeypatch.setattr(calibration, "TRIED", 8)
    errors = itertools.count(1000, -1)
    monkeypatch.setattr(Trials, "errors", lambda *args: [float(next(errors))] * 2)
    pipe = build()
    for speedup in (1.6, 2.0):
        plan = calibrate(pipe, speedup)
        assert plan.speedup(64, 12) == pytest.approx(speedup, rel=0.03)


@pytest.mark.parametrize("tokens, text", [(64, 12), (4096, 333), (4096, 0)])
def test_neighbours_are_one_move_away(tokens, text):
    shares = (1, 1, 0, 1, 0, 0.5, 0, 1, 0, 0)
    model = ErrorModel([0.1] * 10, np.eye(10), hold=False)
    layout = Layout((tokens,), text)
    near = candidates.neighbours(model, shares, (0.25, 0.5), layout, reuse_text=False)
    assert len(near) == len(set(near)) and shares not in near
    for plan in near:
        ras.Plan(plan)
        changed = [s for s in range(10) if plan[s] != shares[s]]
        if sorted(plan) == sorted(shares):  # a step went elsewhere
            a, b = changed
            assert abs(a - b) <= 3 and {plan[a], plan[b]} == {shares[a], shares[b]}
            assert 0 in (plan[a], plan[b])
        else:  # a dense step became partial ones
            (split,) = [s for s in changed if shares[s] == 1]
            assert all(shares[s] == 0 for s in changed if s != split)
            (size,) = {plan[s] for s in changed}
            assert size in (0.25, 0.5)
            spent = len(changed) * (size * tokens + text)
            assert abs(spent - tokens - text) <= (size * tokens + text) / 2


def test_goes_on_from_a_checkpoint(monkeypatch, tmp_path):
    """No run that was measured is run again, but for the dense one that all are compared with."""
    pipe, calls = build(), Calls(monkeypatch)
    expected = calibrate(pipe, checkpoint=tmp_path / "whole.json")
    whole, path = calls.made, tmp_path / "log.json"
    assert whole > 4
    calls.made, calls.stop_at = 0, 3
    with pytest.raises(Stop):
        calibrate(pipe, checkpoint=path)
    assert not ras.is_enabled(pipe)
    calls.made, calls.stop_at = 0, None
    assert calibrate(pipe, checkpoint=path) == expected
    assert calls.made == whole - 3 + 1
    calls.made = 0
    assert calibrate(pipe, checkpoint=path) == expected
    assert calls.made == 0
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["log.json", "whole.json"]


@pytest.mark.parametrize(
    "other",
    [
        dict(speedup=1.9),
        dict(num_inference_steps=9),
        dict(seed=1),
        dict(shares=(0.5,)),
        dict(guidance_scale=3.0),
        dict(config=ras.RASConfig(reuse_text=True)),
    ],
)
def test_another_calibrations_checkpoint_is_refused(monkeypatch, tmp_path, other):
    monkeypatch.setattr(calibration, "ROUNDS", 0)
    pipe, path = build(), tmp_path / "log.json"
    calibrate(pipe, checkpoint=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"log\.json is of another calibration"):
        calibrate(pipe, checkpoint=path, **other)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", '{"ras_plan": 1, "shares": [1]}', "no JSON"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, text):
    path = tmp_path / "log.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"log\.json is"):
        calibrate(build(), checkpoint=path)
    assert path.read_text() == text


def test_what_calibrate_refuses():
    pipe = build()
    with pytest.raises(ValueError, match="prompt"):
        ras.calibrate(pipe, [])
    with pytest.raises(ValueError, match=r"1\.0"):
        calibrate(pipe, shares=(1.0,))
    with ras.enabled(pipe), pytest.raises(ValueError, match="disable"):
        calibrate(pipe)


def test_an_error_in_a_run_leaves_the_pipeline_as_it_was(monkeypatch):
    pipe, calls = build(), Calls(monkeypatch)
    latents(pipe)
    before = Snapshot(pipe)
    for stop_at in (1, 2):
        calls.stop_at = calls.made + stop_at - 1
        with pytest.raises(Stop):
            calibrate(pipe)
        check_undone(before, pipe)
        assert "step" not in vars(pipe.scheduler)


def test_a_calibrated_plans_file(monkeypatch, tmp_path, capsys):
    """It goes into `enable` and the command line, and does the same there."""
    pipe = build()
    plan = calibrate(pipe)
    path, out = tmp_path / "plan.json", tmp_path / "out.png"
    plan.save(path)
    with ras.enabled(pipe, plan=path):
        latents(pipe)
        assert ras.stats(pipe).plan == plan and ras.stats(pipe).warnings == ()
        ceiling = ras.stats(pipe).speedup_ceiling
    assert ceiling == pytest.approx(2, rel=0.03)

    monkeypatch.setattr(cli.generate, "load", lambda *_: pipe)
    size = ["--height", "128", "--width", "128", "--steps", str(STEPS)]
    command = ["generate", "a ring", "--out", str(out), "--plan", str(path), "--json", *size]
    capsys.readouterr()
    assert cli.main([*command, "--no-compare"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["plan"]["shares"] == list(plan.shares)
    done = (report["steps_dense"], report["steps_sparse"], report["steps_skipped"])
    assert done == (
        plan.shares.count(1),
        sum(0 < s < 1 for s in plan.shares),
        plan.shares.count(0),
    )
    assert report["warnings"] == [] and out.exists()


# --- any pipeline ---------------------------------------------------------------------------------


def prompted(name):
    """A pipeline of the zoo that takes prompts, whatever they are."""
    pipe, draw = ENTRIES[name].build()

    class Prompted(type(pipe)):
        def __call__(self, *args, prompt=None, num_inference_steps=None, return_dict=True, **call):
            if prompt is None or args:
                return super().__call__(
                    *args,
                    prompt=prompt,
                    num_inference_steps=num_inference_steps,
                    return_dict=return_dict,
                    **call,
                )
            return (draw(num_inference_steps, **call),)

    Prompted.__name__ = type(pipe).__name__
    pipe.__class__ = Prompted
    return pipe


@pytest.mark.parametrize(
    "name",
    ["flux", "flux-true-cfg", "z-image", "ltx2-three-calls", "wan22", "pixart-ddpm", "cosmos"],
)
def test_every_form_of_guidance(name):
    """One call, two, a batch, three; two transformers, noise that is predicted, double steps."""
    pipe, prompts = prompted(name), ["a", "b"]
    plan = ras.calibrate(pipe, prompts, num_inference_steps=STEPS, batch_size=1)
    assert not ras.is_enabled(pipe) and sum(plan.shares) == pytest.approx(4, rel=0.05)

    def draws(**settings):
        found = []
        for seed in range(2):
            generator = torch.Generator().manual_seed(seed)
            with ras.enabled(pipe, **settings):
                latents = pipe(prompt="a", num_inference_steps=STEPS, generator=generator)[0]
            found.append(torch.cat([leaf.flatten().double() for leaf in tree_leaves(latents)]))
        return found

    dense, usual, found = draws(speedup=1), draws(speedup=2), draws(plan=plan)
    errors = [relative_error(*pair) for pair in zip(found, dense, strict=True)]
    before = [relative_error(*pair) for pair in zip(usual, dense, strict=True)]
    assert math.prod(errors) <= math.prod(before) * (1 + 1e-6)
    error = math.sqrt(sum(error**2 for error in errors) / 2)
    assert float(re.search(r"latents ([\d.]+)", plan.note)[1]) == pytest.approx(error, abs=1e-4)


def test_references_count(tmp_path):
    """A plan's cost is that of all in the sequence, with the picture that is edited."""
    pipe, path = prompted("qwen-edit"), tmp_path / "log.json"
    ras.calibrate(pipe, ["a", "b"], num_inference_steps=STEPS, batch_size=1, checkpoint=path)
    measured = json.loads(path.read_text())["noise"]
    sides = measured["pictures"]
    assert measured["references"] == sum(map(math.prod, sides)) > 0 and len(sides) == 1


# --- plan -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [pipelines.euler, FlowMatchHeunDiscreteScheduler])
@pytest.mark.parametrize(
    "settings", [dict(speedup=2), dict(speedup=3, reuse_text=True), dict(sample_ratio=0.5)]
)
def test_plan_is_what_a_run_then_does(settings, scheduler):
    """By the model's own size and the pipeline's default arguments."""
    pipe = build(scheduler=scheduler())
    ras.enable(pipe, **settings)
    latents(pipe)
    last, timesteps = ras.stats(pipe).plan, pipe.scheduler.timesteps
    found = ras.plan(pipe, 6)
    plan, text = found.plan, str(found)
    assert ras.stats(pipe).plan == last and pipe.scheduler.timesteps is timesteps
    pipe("a red ring", num_inference_steps=6, output_type="latent")
    stats = ras.stats(pipe)
    assert plan == stats.plan
    assert str(plan) in text and "256 image and 264 text tokens" in text
    shown = float(re.search(r"speed-up ([\d.]+)", text)[1])
    assert shown == pytest.approx(found.speedup, abs=1e-3)
    reuse_text = settings.get("reuse_text", False)
    assert shown == pytest.approx(plan.speedup(256, 264, reuse_text=reuse_text), abs=1e-3)
    if scheduler is pipelines.euler:
        assert shown == pytest.approx(stats.speedup_ceiling, abs=1e-3)


def test_plan_of_a_given_size():
    pipe = build()
    plan = ras.plan(pipe, 12, height=128, width=96, text_tokens=12)
    assert "48 image and 12 text tokens" in str(plan)
    with ras.enabled(pipe):
        call = {**CALL, "width": 96}
        pipe("a", num_inference_steps=12, output_type="latent", **call)
        assert ras.stats(pipe).plan == plan.plan


def test_plan_of_lumina():
    pipe = pipelines.lumina()
    ras.enable(pipe, speedup=2.5)
    plan = ras.plan(pipe, 10, height=128, width=192)
    assert "96 image and 0 text tokens" in str(plan)
    pipe(**pipelines.lumina_inputs(pipe, height=16, width=24), num_inference_steps=10)
    assert ras.stats(pipe).plan == plan.plan


def test_plan_with_a_mask():
    mask = np.zeros((8, 8), np.float32)
    mask[:1] = 1
    pipe = build()
    ras.enable(pipe, mask=mask, mask_margin=0)
    plan = ras.plan(pipe, STEPS, height=128, width=128, text_tokens=12)
    latents(pipe)
    assert ras.stats(pipe).plan == plan.plan and 0.125 in plan.plan.shares


def test_plan_of_settings():
    config = ras.RASConfig(speedup=2.5)
    plan = ras.plan(config, 28)
    assert "4096 image and 333 text tokens" in str(plan)
    scheduler = pipelines.euler()
    scheduler.set_timesteps(28)
    assert plan.plan == planned(config, scheduler.sigmas.tolist(), 4096, 333)[0]
    assert plan.speedup == pytest.approx(2.5, rel=0.03)
    assert math.prod(plan.plan.shares) == 0


def test_plan_says_what_cannot_be_met():
    found = ras.plan(ras.RASConfig(speedup=50), 8)
    assert "50 cannot be met in 8 steps" in found.warning and found.warning in str(found)


def test_plan_takes_a_pipeline_or_settings():
    for wrong in (pipelines.sd3().transformer, 2.5, normal(1)):
        with pytest.raises((TypeError, ValueError)):
            ras.plan(wrong, 28)


@pytest.mark.parametrize(
    "error, call, named",
    [
        (ValueError, dict(num_inference_steps=0), "num_inference_steps.*0"),
        (TypeError, dict(num_inference_steps=True), "num_inference_steps.*True"),
        (TypeError, dict(num_inference_steps=8.0), "num_inference_steps.*8.0"),
        (ValueError, dict(text_tokens=-1), "text_tokens.*-1"),
        (ValueError, dict(height=-5), "height.*-5"),
        (TypeError, dict(width="64"), "width.*64"),
    ],
)
def test_what_a_plan_cannot_be_of(error, call, named):
    with pytest.raises(error, match=named):
        ras.plan(build(), **{"num_inference_steps": 8, **call})


def test_settings_have_a_size_of_their_own():
    with pytest.raises(ValueError, match="1024 x 1024"):
        ras.plan(ras.RASConfig(), 8, height=512)


@pytest.mark.parametrize(
    "error, options, named",
    [
        (TypeError, dict(prompts="ab"), "list of texts.*ab"),
        (ValueError, dict(prompts=["a"]), "prompts must be at least two"),
        (ValueError, dict(batch_size=0), "batch_size.*0"),
        (ValueError, dict(num_inference_steps=0), "num_inference_steps.*0"),
        (ValueError, dict(speedup=0.5), "speedup.*0.5"),
        (TypeError, dict(speedup="2"), "speedup.*2"),
        (TypeError, dict(config=3), "config.*3"),
        *(
            (ValueError, dict(config=ras.RASConfig(**{name: value})), f"calibrate where {name}=")
            for name, value in dict(
                plan=[1, 0],
                sample_ratio=0.5,
                error_reset_steps=(7,),
                scheduler_start_step=2,
                scheduler_end_step=9,
            ).items()
        ),
        (TypeError, dict(shares=0.5), "shares.*0.5"),
        (ValueError, dict(shares=[1.5]), "shares.*1.5"),
        (TypeError, dict(pipe=3), "pipeline.*int"),
    ],
)
def test_what_cannot_be_calibrated(monkeypatch, error, options, named):
    """Is named before anything is drawn."""
    calls = Calls(monkeypatch)
    with pytest.raises(error, match=named):
        ras.calibrate(**{"pipe": build(), "prompts": ["a", "b"], **options})
    assert not calls.made
