"""Wrong options and unsupported models are errors, before anything is changed."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from support import pipelines
from support.pipelines import normal, sd3_inputs
from support.runs import CONFIG, run
from support.snapshot import Snapshot, check_undone

import ras


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def with_inputs(pipe):
    return pipe, sd3_inputs(pipe, 2)


@pytest.mark.parametrize(
    "options, value",
    [
        (dict(sample_ratio=0.0), "0.0"),
        (dict(sample_ratio=-0.5), "-0.5"),
        (dict(sample_ratio=1.5), "1.5"),
        (dict(sample_ratio=float("nan")), "nan"),
        (dict(sample_ratio="half"), "half"),
        (dict(metric="entropy"), "entropy"),
        (dict(high_ratio=1.5), "1.5"),
        (dict(high_ratio=-0.1), "-0.1"),
        (dict(error_reset_steps=(1.5,)), "1.5"),
        (dict(error_reset_steps=(-1,)), "-1"),
        (dict(scheduler_start_step=-1), "-1"),
        (dict(sample_rate=0.5), "sample_rate"),
    ],
)
def test_wrong_options_change_nothing(options, value):
    pipe, _ = with_inputs(pipelines.sd3())
    before = Snapshot(pipe)
    with pytest.raises((ValueError, TypeError), match=value):
        ras.enable(pipe, **options)
    check_undone(before, pipe, ran=False)
    with pytest.raises((ValueError, TypeError), match=value):
        ras.RASConfig(**options)


def test_wrong_options_leave_the_earlier_configuration():
    pipe, inputs = with_inputs(pipelines.sd3())
    ras.enable(pipe, CONFIG)
    expected = run(pipe, inputs)
    with pytest.raises(ValueError, match="entropy"):
        ras.enable(pipe, metric="entropy")
    assert ras.is_enabled(pipe)
    assert torch.equal(run(pipe, inputs), expected)


def test_bare_transformer_needs_a_scheduler():
    pipe, _ = with_inputs(pipelines.sd3())
    before = Snapshot(pipe)
    with pytest.raises((ValueError, TypeError), match="scheduler"):
        ras.enable(pipe.transformer, CONFIG)
    assert not ras.is_enabled(pipe.transformer)
    check_undone(before, pipe, ran=False)


def test_unsupported_models_are_named():
    unet = UNet2DModel(
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=1,
        attention_head_dim=4,
    )
    with pytest.raises((ValueError, TypeError), match="UNet2DModel"):
        ras.enable(unet, CONFIG, scheduler=pipelines.euler())
    with pytest.raises((ValueError, TypeError), match=r"UNet2DModel|DDPMPipeline"):
        ras.enable(DDPMPipeline(unet, DDPMScheduler()), CONFIG)
    with pytest.raises((ValueError, TypeError), match="Linear"):
        ras.enable(torch.nn.Linear(1, 1), CONFIG, scheduler=pipelines.euler())
    with pytest.raises((ValueError, TypeError), match="str"):
        ras.enable("stable-diffusion-3", CONFIG)


def test_latents_that_patches_do_not_divide():
    """A `ValueError` with the numbers, and the next run is a good one."""
    pipe, inputs = with_inputs(pipelines.sd3())
    ras.enable(pipe, CONFIG)
    expected = run(pipe, inputs)
    with pytest.raises(ValueError, match="15"):
        run(pipe, {**inputs, "latents": normal(2, 16, 15, 16)})
    assert torch.equal(run(pipe, inputs), expected)
