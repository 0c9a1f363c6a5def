"""`ras.plan`, which shows a plan before a run."""

import math
import re

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from support import pipelines
from support.pipelines import normal
from support.runs import planned

import ras

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]
PROMPTS = ["a red ring", "nine lives"]
CALL = dict(guidance_scale=4.0, max_sequence_length=4, **pipelines.size(16, 16))
STEPS = 8


def build(**options):
    parts = pipelines.text_encoders()
    return pipelines.sd3(vae=pipelines.autoencoder(), parts=parts, **options)


def latents(pipe, seed=0):
    """The final latents of the prompts, as calibration draws them."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(PROMPTS))]
    call = dict(CALL, num_inference_steps=STEPS, output_type="latent", generator=generators)
    return pipe(PROMPTS, **call).images


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
