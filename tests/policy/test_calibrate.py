"""`ras.calibrate`, which measures a plan."""

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
from support.runs import Stop
from support.snapshot import Snapshot, check_undone
from support.zoo import ENTRIES
from torch.utils._pytree import tree_leaves

import ras
from ras import cli
from ras.clock import Clock
from ras.layout import Layout
from ras.policy import calibration
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
