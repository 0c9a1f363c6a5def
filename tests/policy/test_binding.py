"""What is kept in files is bound to what it was made for, and the files are read with care."""

import copy
import json
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from peft import LoraConfig
from PIL import Image
from support import pipelines
from support.pipelines import sd3_inputs
from support.runs import SCHEDULERS, run
from support.snapshot import Snapshot, check_undone

import ras
from ras import cli, files, fingerprint
from ras.policy import calibration

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]

STEPS = 4
CALL = dict(guidance_scale=4.0, max_sequence_length=4, **pipelines.size(16, 16))


@pytest.fixture(autouse=True)
def few_runs(monkeypatch):
    monkeypatch.setattr(calibration, "ROUNDS", 0)


def build(**options):
    parts = pipelines.text_encoders()
    return pipelines.sd3(vae=pipelines.autoencoder(), parts=parts, **options)


def calibrate(pipe, prompts=("a red ring", "a star"), **options):
    return ras.calibrate(pipe, prompts, **{**dict(num_inference_steps=STEPS), **CALL, **options})


# --- a calibration's checkpoint -------------------------------------------------------------------


def other_weights(pipe):
    pipe.transformer.transformer_blocks[0].attn.to_q.weight.mul_(0.7)


def other_shift(pipe):
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=12.0)


def other_scheduler(pipe):
    pipe.scheduler = FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)


def other_words(pipe):
    pipe.text_encoder.text_projection.weight.mul_(0.7)


def set_shift(pipe):
    pipe.scheduler.set_shift(12.0)


OTHERS = {
    other_weights: "weights.transformer: ",
    other_words: "weights.text_encoder: ",
    set_shift: "scheduler.shift: 3.0 there, 12.0 here",
    other_shift: "scheduler.shift: 3.0 there, 12.0 here",
    other_scheduler: "scheduler.class: 'FlowMatchEulerDiscreteScheduler' there, 'FlowMatchHeun",
}
ARGUMENTS = [
    (dict(prompts=["another", "a star"]), "prompts: "),
    (dict(speedup=1.9), "speedup: 2.0 there, 1.9 here"),
    (dict(num_inference_steps=5), "num_inference_steps: 4 there, 5 here"),
    (dict(seed=1), "seed: 0 there, 1 here"),
    (dict(shares=(0.5,)), "shares: "),
    (dict(batch_size=2), "batch_size: 8 there, 2 here"),
    (dict(guidance_scale=3.0), "call.guidance_scale: 4.0 there, 3.0 here"),
    (dict(height=96), "call.height: 128 there, 96 here"),
    (dict(config=ras.RASConfig(reuse_text=True)), "config.reuse_text: False there, True here"),
    (dict(negative_prompt="blue"), "call.negative_prompt: nothing there, 'blue' here"),
]


@pytest.mark.parametrize("change", OTHERS)
def test_a_checkpoint_of_another_model(tmp_path, change):
    pipe, path = build(), tmp_path / "log.json"
    expected = calibrate(pipe, checkpoint=path)
    kept = path.read_bytes()
    assert calibrate(build(), checkpoint=path) == expected  # the same weights, elsewhere
    change(pipe)
    with pytest.raises(ValueError, match="is of another calibration") as raised:
        calibrate(pipe, checkpoint=path)
    assert OTHERS[change] in str(raised.value) and str(raised.value).count(" there, ") == 1
    assert path.read_bytes() == kept and not ras.is_enabled(pipe)


@pytest.mark.parametrize("options, told", ARGUMENTS)
def test_a_checkpoint_of_other_arguments(tmp_path, options, told):
    pipe, path = build(), tmp_path / "log.json"
    calibrate(pipe, checkpoint=path)
    with pytest.raises(ValueError, match="is of another calibration") as raised:
        calibrate(pipe, checkpoint=path, **options)
    assert told in str(raised.value)


def test_arguments_count_by_value():
    """Whatever they are; each is the same as its copy and unlike the others of its kind."""
    generator = torch.Generator().manual_seed(1)
    values = [
        *(1, 2.5, "a", None, [1, 2], (1, 3), {"a": 1}, {"a": 2}),
        *(torch.zeros(3), torch.ones(3), torch.zeros(3, 1), torch.tensor([np.nan] * 3)),
        *(torch.float16, torch.bfloat16, {1, 2}, {1, 3}, np.zeros((3, 1)), np.zeros(3, int)),
        *(np.zeros(3), np.ones(3), Image.new("L", (2, 2)), Image.new("L", (2, 2), 9)),
        *(generator, torch.Generator().manual_seed(2), object()),
    ]
    plain = [fingerprint.plain(value) for value in values]
    assert len(set(plain)) == len(plain)  # hashable, too
    for value, one in zip(values, plain):
        if value is not generator:  # which is told by its state, as is its twin
            try:
                assert fingerprint.plain(copy.deepcopy(value)) == one
            except TypeError:
                assert isinstance(value, torch.Generator)
    assert fingerprint.plain(torch.Generator().manual_seed(1)) == fingerprint.plain(generator)


def test_weights_are_told_by_their_values():
    def digest(module):
        return fingerprint.of_weights({"a": module})["weights.a"]

    layer = torch.nn.Linear(8, 64)
    first = digest(layer)
    assert digest(copy.deepcopy(layer)) == digest(pickle.loads(pickle.dumps(layer))) == first
    assert digest(copy.deepcopy(layer).bfloat16()) != first
    layer.weight[0, 0] += 1e-3
    assert digest(layer) != first
    meta = torch.nn.Linear(8, 64, device="meta")
    assert digest(meta) == digest(torch.nn.Linear(8, 64, device="meta")) != first
    assert digest(torch.nn.Linear(0, 4)) and digest(torch.nn.Linear(1, 1))


# --- a plan ---------------------------------------------------------------------------------------


def test_a_plan_says_what_it_was_made_for(tmp_path):
    """In its file, too, and it is the same plan when that is read."""
    pipe = build()
    plan = calibrate(pipe)
    made_for = dict(plan.made_for)
    assert made_for["transformer.class"] == "SD3Transformer2DModel"
    assert made_for["scheduler.shift"] == 3.0 and made_for["run.guidance_scale"] == 4.0
    assert made_for["run.grid"] == (8, 8) and not [name for name in made_for if "weights" in name]
    plan.save(tmp_path / "plan.json")
    found = ras.Plan.load(tmp_path / "plan.json")
    assert found == plan and hash(found) == hash(plan)
    assert json.loads((tmp_path / "plan.json").read_text())["made_for"]["scheduler.shift"] == 3.0
    for model in (pipe, build()):
        ras.enable(model, plan=found)
    other_weights(pipe)  # as LoRA and fine-tuning leave them
    ras.enable(pipe, plan=found)
    ras.enable(pipe.transformer, plan=found, scheduler=pipe.scheduler)


@pytest.mark.parametrize("change", [other_shift, set_shift, other_scheduler, "transformer"])
def test_a_plan_of_another_model(tmp_path, change):
    plan = calibrate(build())
    path = tmp_path / "plan.json"
    plan.save(path)
    pipe = build(num_layers=4) if change == "transformer" else build()
    if change != "transformer":
        change(pipe)
    before = Snapshot(pipe)
    told = OTHERS.get(change, "transformer.num_layers: ")
    for settings in (dict(plan=plan), dict(plan=path), dict(config=ras.RASConfig(plan=path))):
        for model, more in ((pipe, {}), (pipe.transformer, dict(scheduler=pipe.scheduler))):
            with pytest.raises(ValueError, match="made for another model") as raised:
                ras.enable(model, **settings, **more)
            assert told in str(raised.value)
            check_undone(before, pipe, ran=False)
    ras.enable(pipe, plan=ras.Plan(plan.shares, plan.extrapolation))  # one for all


@pytest.mark.parametrize(
    "other, told",
    [
        (dict(guidance_scale=2.0), "run.guidance_scale: 4.0 there, 2.0 here"),
        (dict(height=96), "run.grid: (8, 8) there, (6, 8) here"),
        (dict(num_inference_steps=5), "one of 4 steps and the run has 5"),
    ],
)
def test_a_plan_of_another_run(other, told):
    """Another one is made for its speed-up, and that is said once; where it fits it is taken."""
    pipe = build()
    plan = calibrate(pipe)
    ras.enable(pipe, plan=plan)
    call = dict(CALL, num_inference_steps=STEPS, output_type="latent")
    pipe("a", **call)
    assert ras.stats(pipe).plan == plan and ras.stats(pipe).warnings == ()
    with pytest.warns(ras.RASWarning, match="so that another is made for its speed-up") as warned:
        pipe("a", **{**call, **other})
    assert told in str(warned[0].message) and len(ras.stats(pipe).warnings) == 1
    pipe("a", **call)
    assert ras.stats(pipe).plan == plan


def test_a_scheduler_that_is_replaced_later():
    """Another plan is made, with one warning, and the first one is back with its scheduler."""
    pipe = build()
    plan = calibrate(pipe)
    ras.enable(pipe, plan=plan)
    first, call = pipe.scheduler, dict(CALL, num_inference_steps=STEPS, output_type="latent")
    other_shift(pipe)
    with pytest.warns(ras.RASWarning, match=r"scheduler\.shift: 3\.0 there, 12\.0 here"):
        pipe("a", **call)
    assert ras.stats(pipe).plan != plan
    pipe.scheduler = first
    pipe("a", **call)
    assert ras.stats(pipe).plan == plan


def test_offloaded_weights_are_the_same():
    """As accelerate leaves them, on the meta device with a map to where they are."""
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
    before = fingerprint.of_weights({"a": layer})
    plain = copy.deepcopy(layer)
    cpu_offload(layer, execution_device="cpu")
    assert all(weight.is_meta for weight in layer.parameters())
    assert fingerprint.of_weights({"a": layer}) == before
    plain[1].running_mean.add_(1)  # buffers count
    assert fingerprint.of_weights({"a": plain}) != before


def test_adapters_count():
    pipe = pipelines.sd3()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    before = fingerprint.of_weights({"a": pipe.transformer})
    pipe.transformer.disable_adapters()
    assert fingerprint.of_weights({"a": pipe.transformer}) != before
    pipe.transformer.enable_adapters()
    assert fingerprint.of_weights({"a": pipe.transformer}) == before
    pipe.transformer.set_adapters("default", 0.5)
    assert fingerprint.of_weights({"a": pipe.transformer}) != before


def test_a_quantised_model_takes_the_plan():
    pipe = build()
    plan = calibrate(pipe)
    pipe.transformer.register_to_config(quantization_config={"bits": 8})
    ras.enable(pipe, plan=plan)


# --- files ----------------------------------------------------------------------------------------

BAD = {
    "empty": b"",
    "no JSON": b"no JSON",
    "no text": b"\xff\xfe\x00{",
    "deep": b"[" * 100_000,
    "large": b" " * 10_000_001,
    "another thing": b"[]",
    "nothing of ours": b"{}",
    "a number without end": b'{"ras_plan": 1, "shares": [1, 1' + b"0" * 400 + b"]}",
    "no number": b'{"ras_plan": 1, "shares": [1, NaN]}',
    "infinite": b'{"ras_plan": 1, "shares": [1, Infinity]}',
    "a later format": b'{"ras_plan": 2, "shares": [1]}',
    "no number in a name": b'{"ras_plan": 1, "shares": [1], "made_for": {"a": 1e999}}',
    "no names": b'{"ras_plan": 1, "shares": [1], "made_for": [3]}',
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_files_that_are_no_plans(tmp_path, content, capsys):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    pipe = pipelines.sd3()
    for use in (
        ras.Plan.load,
        lambda it: ras.RASConfig(plan=it),
        lambda it: ras.enable(pipe, plan=it),
    ):
        with pytest.raises(ValueError, match=r"plan\.json is no plan: "):
            use(path)
    with pytest.raises(ValueError, match=r"plan\.json is no checkpoint"):
        calibrate(build(), checkpoint=path)
    assert path.read_bytes() == content and not ras.is_enabled(pipe)
    command = ["generate", "a ring", "--plan", str(path), "--out", str(tmp_path / "out.png")]
    assert cli.main(command) == 2 and "is no plan" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    ras.Plan((1, 0)).save(path)
    kept = path.read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            ras.Plan((1, 1)).save(path)
    assert path.read_bytes() == kept and list(tmp_path.iterdir()) == [path]
    for folder in (tmp_path / "no", path):
        with pytest.raises(OSError, match=r"plan\.json|other"):
            ras.Plan((1, 1)).save(folder / "other.json")
    with pytest.raises(OSError, match=r"[Dd]irectory"):
        files.write_text(tmp_path, "")
    path.chmod(0o600)
    ras.Plan((1, 1)).save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    link = tmp_path / "link.json"
    link.symlink_to(path)
    ras.Plan((1, 1, 0)).save(link)
    assert link.is_symlink() and ras.Plan.load(path).shares == (1, 1, 0)
    ras.Plan((1, 0)).save("/dev/null")
    assert not Path("/dev/null").is_file()


def test_a_file_that_many_write(tmp_path):
    path = tmp_path / "plan.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: [ras.Plan((1, 0)).save(path) for _ in range(20)], range(8)))
    assert ras.Plan.load(path) == ras.Plan((1, 0)) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedulers_plan_and_checkpoint_can_be_read(tmp_path, name):
    """Some have infinities in their configurations."""
    here = fingerprint.of_model({}, SCHEDULERS[name]())
    plan = ras.Plan((1, 0), made_for=here)
    plan.save(tmp_path / "plan.json")
    found = ras.Plan.load(tmp_path / "plan.json")
    assert found == plan and hash(found) == hash(plan) and found.unfit(2, here) is None


def test_a_plan_made_for_values_of_any_kind(tmp_path):
    """Numbers of NumPy, lists, what has no end; the order of names is none."""
    made_for = {"b.c": [1, (2.5, None)], "a.b": np.float32(0.5), "a.c": math.nan, "a.d": -math.inf}
    plan = ras.Plan((1, 0), made_for=made_for)
    assert plan == ras.Plan((1, 0), made_for=dict(reversed(made_for.items())))
    assert plan == ras.Plan((1, 0), made_for=list(made_for.items()))
    plan.save(tmp_path / "plan.json")
    assert ras.Plan.load(tmp_path / "plan.json") == plan
    for wrong in ([(1, 2)], {1: 2}, [1], "ab", 3):
        with pytest.raises(TypeError, match="made_for must be names and values"):
            ras.Plan((1, 0), made_for=wrong)


def test_guidance_as_numpy_has_it(tmp_path):
    pipe, path = build(), tmp_path / "log.json"
    plan = calibrate(pipe, guidance_scale=np.float32(4), checkpoint=path)
    assert dict(plan.made_for)["run.guidance_scale"] == 4.0
    assert calibrate(pipe, guidance_scale=np.float32(4), checkpoint=path) == plan


def test_the_guidance_is_that_of_the_pipeline_that_runs():
    """Which may be another one, of the same scheduler."""
    pipe = build()
    plan = calibrate(pipe)
    other = copy.copy(pipe)
    call = dict(CALL, num_inference_steps=STEPS, output_type="latent")
    pipe("a", **{**call, "guidance_scale": 7.0})
    ras.enable(pipe, plan=plan)
    other("a", **call)
    assert ras.stats(pipe).plan == plan and ras.stats(pipe).warnings == ()
    with pytest.warns(ras.RASWarning, match=r"guidance_scale: 4\.0 there, 7\.0 here"):
        other("a", **{**call, "guidance_scale": 7.0})


def test_a_run_by_hand_knows_no_guidance():
    """What is not known is not compared."""
    pipe = build()
    plan = calibrate(pipe)
    fits = ras.Plan(plan.shares, plan.extrapolation, made_for=dict(plan.made_for))
    assert fits == ras.Plan(plan.shares, plan.extrapolation, made_for=plan.made_for)
    assert fits.unfit(STEPS, {}) is None and fits.unfit(STEPS, {"run.grid": (8, 8)}) is None
    assert "run.grid" in fits.unfit(STEPS, {"run.grid": (8, 9)})
    other = pipelines.sd3()
    with ras.enabled(other, plan=ras.Plan((1, 0, 1, 0))):
        run(other, sd3_inputs(other), steps=4)
