"""Every argument of every public function meets nonsense: one clear error, and nothing changes.

What there is to be tried is found by walking through the signatures; a function or an argument
that is not told of here fails.
"""

import contextlib
import copy
import functools
import inspect
import math
import warnings
from operator import attrgetter

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from support import pipelines
from support.operands import by_three, calls
from support.pipelines import sd3_inputs
from support.snapshot import Snapshot

import ras
import ras_kernels
from ras.denoisers import families_of

pytestmark = pytest.mark.usefixtures("no_gradients")


def deep():
    """A list in a list, more often than Python follows."""
    found = []
    for _ in range(50_000):
        found = [found]
    return found


NONSENSE = {
    "text": lambda: "abc",
    "no text": lambda: "",
    "bytes": lambda: b"\xff\xfe",
    "empty": lambda: [],
    "one thing": lambda: [object()],
    "mixed": lambda: [1, "a", None],
    "generator": lambda: (i for i in range(3)),
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "-1": lambda: -1,
    "0": lambda: 0,
    "half": lambda: 2.5,
    "huge": lambda: 10**400,
    "1e308": lambda: 1e308,
    "true": lambda: True,
    "none": lambda: None,
    "deep": deep,
    "object": object,
    "class": lambda: int,
    "array": lambda: np.zeros(3),
    "tensor": lambda: torch.ones(2, 2),
    "mapping": lambda: {"a": 1},
}
ERRORS = TypeError, ValueError, OSError


@functools.cache
def pipe():
    """One for all, as nothing changes it."""
    parts = pipelines.text_encoders()
    found = pipelines.sd3(vae=pipelines.autoencoder(), parts=parts)
    copy.deepcopy(found.scheduler)  # which leaves a mark on its class
    return found


@functools.cache
def enabled_pipe():
    return ras.enable(pipelines.sd3(), plan=(1, 0, 0.5, 1))


def family():
    return families_of(pipe())[0][1]


def flat():
    return Image.new("RGB", (8, 8))


BARE = {"scheduler": FlowMatchEulerDiscreteScheduler}
SENSE = {
    "Family": lambda: vars(family()),
    "Layout": lambda: dict(grid=(8, 8), text=4, references=2, pictures=((1, 2),)),
    "Plan": lambda: dict(shares=(1, 0), extrapolation=(0, 0.5), note="", made_for={"a.b": 1}),
    "RASConfig": lambda: vars(ras.RASConfig()),
    "calibrate": lambda: dict(
        pipe=pipe(),
        prompts=["a", "b"],
        speedup=2.0,
        num_inference_steps=2,
        config=None,
        shares=(),
        batch_size=1,
        seed=0,
        checkpoint=None,
    ),
    "check": lambda: dict(pipe=pipe(), family=None),
    "compile_repeated_blocks": lambda: dict(model=pipe()),
    "disable": lambda: dict(model=pipe()),
    "enable": lambda: dict(model=pipe(), config=None, mask=None, scheduler=None, family=None),
    "enabled": lambda: dict(model=pipe(), config=None, mask=None, scheduler=None, family=None),
    "is_enabled": lambda: dict(model=pipe()),
    "learn": lambda: dict(pipe=ras.enable(pipelines.sd3(), speedup=2), file=None),
    "pictures.animated": lambda: dict(pipe=enabled_pipe(), file="walk.gif"),
    "pictures.difference_map": lambda: dict(image=flat(), other=flat()),
    "pictures.heat_map": lambda: dict(regions=np.eye(3), size=(4, 4)),
    "pictures.plan_strip": lambda: dict(plan=(1, 0)),
    "pictures.psnr": lambda: dict(image=flat(), other=flat()),
    "pictures.region_map": lambda: dict(image=flat(), regions=np.eye(3)),
    "plan": lambda: dict(
        model=pipe(), num_inference_steps=4, height=None, width=None, text_tokens=None
    ),
    "put_back": lambda: dict(
        image=flat(),
        picture=flat(),
        edited=torch.ones(2, 2, dtype=torch.bool),
    ),
    "settings": lambda: dict(model=enabled_pipe(), config=None),
    "stats": lambda: dict(model=enabled_pipe()),
}
"""What each takes where all is well; an option of `**call` and the like is none."""
GIVEN = {"RASWarning", "Rows", "RunPlan", "Stats", "bundled_model", "__version__"}
GIVEN |= {"generate"}  # which draws images: tests/cli/test_prompts.py
"""What users are given, or call without an argument."""
WELCOME = {
    # what else makes sense, and is taken
    "Family.leave": {"text", "no text"},
    "Family.leaves": set(),
    "Family.latents": {"text", "no text"},
    "Family.output": {"text", "no text"},
    "Family.tested": {"text", "no text"},
    "Family.note": {"text", "no text"},
    "Family.model": {"text"},
    "Family.pipelines": {"empty"},
    "Family.blocks": {"empty"},
    "Family.text": {"mapping"},
    "Family.whole": {"text", "no text", "none"},
    "Family.processor": {"none", "class"},
    **{
        f"Family.{name}": {"true"}
        for name in ("image_first", "lists", "references", "skips", "parallel")
    },
    **{
        f"Family.{name}": {"class"}
        for name in ("layout", "patch", "obstacle", "usual_text", "lengths", "rotary")
    },
    "Layout.grid": {"empty"},
    "Layout.text": {"0"},
    "Layout.references": set(),
    "Layout.pictures": {"empty"},
    "Plan.extrapolation": {"none"},
    "Plan.note": {"text", "no text"},
    "Plan.made_for": {"mapping", "empty"},
    "RASConfig.speedup": {"none", "half", "1e308"},
    "RASConfig.plan": {"none"},
    "RASConfig.sample_ratio": {"none"},
    "RASConfig.error_reset_steps": {"none", "empty", "generator"},
    "RASConfig.scheduler_start_step": {"none", "0"},
    "RASConfig.scheduler_end_step": {"none", "0"},
    "RASConfig.starvation_scale": {"0", "half", "1e308"},
    "RASConfig.high_ratio": {"0"},
    "RASConfig.extrapolation": {"0", "none"},
    "RASConfig.kv_correction": {"true"},
    "RASConfig.reuse_text": {"true"},
    "RASConfig.keep_caches": {"true"},
    "RASConfig.cache_dtype": {"none"},
    "RASConfig.preserve": {"true"},
    "RASConfig.max_cache_bytes": {"none", "0"},
    "RASConfig.mask_margin": {"0"},
    "RASConfig.skip_num_step": {"0"},
    "RASConfig.skip_num_step_length": {"0"},
    "learn.file": {"none", "text"},
    "pictures.heat_map.regions": {"tensor"},
    "pictures.region_map.regions": {"tensor"},
    "plan.height": {"none"},
    "plan.width": {"none"},
    "plan.text_tokens": {"none", "0"},
    "calibrate.config": {"none"},
    "calibrate.checkpoint": {"none", "text"},
    "calibrate.speedup": {"half", "1e308"},
    "calibrate.shares": {"empty"},
    "calibrate.seed": {"0"},
    "check.family": {"none"},
    "settings.config": {"none"},
    "enable.config": {"none"},
    "enable.mask": {"none", "tensor"},
    "enable.scheduler": {"none"},
    "enable.family": {"none"},
}
WELCOME |= {
    name.replace("enable.", "enabled."): ok for name, ok in WELCOME.items() if "enable." in name
}


def parameters(function):
    kinds = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind not in kinds]


def all_cases():
    for name in SENSE:
        for parameter in parameters(attrgetter(name)(ras)):
            yield f"{name}.{parameter}"


def test_every_public_function_is_told_of():
    drawing = {f"pictures.{name}" for name in ras.pictures.__all__}
    assert set(ras.__all__) - {"pictures"} | drawing == SENSE.keys() | GIVEN
    for name, sense in SENSE.items():
        assert list(sense()) == parameters(attrgetter(name)(ras)), name
    assert set(WELCOME) <= set(all_cases())


def call(name, arguments):
    if name in ("calibrate", "check"):
        arguments |= dict(height=64, width=64, max_sequence_length=4)
    if name == "check":
        arguments |= dict(prompt="a", num_inference_steps=1)
    if name == "learn":
        arguments |= dict(sd3_inputs(pipelines.sd3()), num_inference_steps=1, output_type="latent")
    found = attrgetter(name)(ras)(**arguments)
    if isinstance(found, contextlib.AbstractContextManager):
        with found:
            pass


@pytest.mark.parametrize("case", all_cases())
def test_nonsense(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, parameter = case.rsplit(".", 1)
    before = Snapshot(pipe())
    faults = []
    for kind, make in NONSENSE.items():
        arguments = {**SENSE[name](), parameter: make()}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", ras.RASWarning)
                call(name, arguments)
        except ERRORS as error:
            others = dict(model="ipeline", pipe="ipeline")
            if kind in WELCOME.get(case, ()):
                faults.append(f"{kind} is refused: {error!r}"[:300])
            elif isinstance(error, OSError):  # which has the file's name
                assert str(make()) in str(error)
            elif parameter not in str(error) and others.get(parameter, "\0") not in str(error):
                faults.append(f"{kind} is not named: {error!r}"[:300])
            elif len(str(error)) > 1000:
                faults.append(f"{kind} has a text of {len(str(error))}")
        except BaseException as error:
            faults.append(f"{kind} ends in {error!r}"[:300])
        else:
            if kind not in WELCOME.get(case, ()):
                faults.append(f"{kind} is taken")
        if name == "enable":
            ras.disable(pipe())
    before.same_as(Snapshot(pipe()), ignoring=("scheduler", "pipe"))
    assert not ras.is_enabled(pipe())
    assert not faults, "\n" + "\n".join(faults)


def test_an_option_that_does_not_exist():
    for name in ("enable", "enabled"):
        with pytest.raises(TypeError, match="'speed' is no option of RASConfig"):
            call(name, dict(model=pipe(), speed=2))
    assert not ras.is_enabled(pipe())


# --- ops ------------------------------------------------------------------------------------------

TAKEN = {
    # of what is no tensor, what an op computes with, even so
    "sparse_attention.scale": {"-1", "0", "half", "true"},
    "sparse_attention.return_lse": {"true"},
    "region_scores.pixels": {"true"},
    "update_drift_.position": {"-1", "0", "half", "true"},
    "drift_scores.position": {"-1", "0", "half", "true"},
    "select_regions.num_active": {"true"},
    "select_regions.high_ratio": {"0", "true"},
    "select_regions.starvation_scale": {"0", "half", "true"},
    "norm_rotary.eps": {"0", "half", "true"},
    "norm_rotary_scatter_.eps": {"0", "half", "true"},
}


ONE_OF_TWO = {"norm_rotary.norm", "norm_rotary_scatter_.norm"} | {
    f"{op}.{name}"
    for op, names in {
        "linear_scatter_": ("key_bias", "value_bias", "key_changes", "value_changes"),
        "quantize_tokens_": ("change_codes", "change_scales"),
        "qkv_scatter_": (
            "key_changes",
            "value_changes",
            "biases",
            "text",
            "text_weights",
            "text_biases",
        ),
        "dequantize_tokens": ("change_codes", "change_scales", "gain"),
    }.items()
    for name in names
}
"""Where None is right, but not beside the other one."""


def op_cases():
    for name in sorted(
        set(ras_kernels.__all__) - {"CODES", "METRICS", "NORMS", "backend", "supports"}
    ):
        for parameter in parameters(getattr(ras_kernels, name)):
            yield f"{name}.{parameter}"


def of_op(name):
    """What it takes, which an op that is not told of has not."""
    function, tensors = calls()[name]
    if name == "qkv_scatter_":
        tensors = by_three(tensors)
    return {**getattr(function, "keywords", {}), **tensors}


@pytest.mark.parametrize("case", op_cases())
def test_nonsense_for_an_op(case):
    name, parameter = case.split(".")
    declared = inspect.signature(getattr(ras_kernels, name)).parameters[parameter]
    taken = TAKEN.get(case, set()) | (
        {"none"} if "None" in str(declared.annotation) and case not in ONE_OF_TWO else set()
    )
    faults = []
    for kind, make in NONSENSE.items():
        arguments = {**of_op(name), parameter: make()}
        tensors = {key: value for key, value in of_op(name).items() if torch.is_tensor(value)}
        before = {key: value.clone() for key, value in tensors.items() if key != parameter}
        try:
            getattr(ras_kernels, name)(**{**arguments, **{key: tensors[key] for key in before}})
        except (TypeError, ValueError) as error:
            if not any(word in str(error) for word in parameters(getattr(ras_kernels, name))):
                faults.append(f"{kind} is not named: {error!r}"[:300])
            if kind in taken:
                faults.append(f"{kind} is refused: {error!r}"[:300])
            for key, value in before.items():
                assert torch.equal(tensors[key], value), (kind, key)
        except BaseException as error:
            faults.append(f"{kind} ends in {error!r}"[:300])
        else:
            if kind not in taken:
                faults.append(f"{kind} is taken")
    assert not faults, "\n" + "\n".join(faults)
