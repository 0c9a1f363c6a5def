"""`ras` with every scheduler, and in runs that start late."""

import copy
import gc

import pytest
import torch
from diffusers import (
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from support import pipelines
from support.oracle import relative_error
from support.pipelines import Recorder, normal, random_rows, sd3_inputs
from support.runs import (
    CONFIG,
    SCHEDULERS,
    SPARSE,
    STEPS,
    check,
    check_run,
    fresh,
    run,
    run_noting_warnings,
    steps_of,
)

import ras

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]


# --- schedulers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(monkeypatch, name):
    """Sparse by solver steps, dense to the bit at ratio 1; the noise is the oracle's."""
    plain = pipelines.sd3(scheduler=SCHEDULERS[name]())
    inputs = sd3_inputs(plain, 2)
    expected = run(plain, inputs)

    pipe = pipelines.sd3(scheduler=SCHEDULERS[name]())
    with ras.enabled(pipe, CONFIG, sample_ratio=1.0):
        assert torch.equal(run(pipe, inputs), expected)
    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, CONFIG):
        result = run(pipe, inputs)
        assert steps_of(pipe) == (3, 5)
    assert len(record.calls) == len(pipe.scheduler.timesteps)
    check(record, pipe.transformer, order=pipe.scheduler.order)
    assert result.isfinite().all() and not torch.allclose(result, expected)
    assert torch.equal(run(pipe, inputs), expected)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_lumina_scheduler(monkeypatch, name):
    pipe = pipelines.lumina(scheduler=SCHEDULERS[name]())
    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, CONFIG):
        run(pipe, pipelines.lumina_inputs(pipe, 2))
        assert steps_of(pipe) == (3, 5)
    check(record, pipe.transformer, order=pipe.scheduler.order)


def test_both_stages_of_a_heun_step_use_the_same_rows(monkeypatch):
    pipe = pipelines.sd3(scheduler=SCHEDULERS["heun"]())
    record = Recorder(monkeypatch, pipe, choose=random_rows)
    with ras.enabled(pipe, CONFIG):
        run(pipe, sd3_inputs(pipe, 2))
    assert len(record.calls) == 2 * STEPS - 1 and len(record.rows) == len(SPARSE)
    check(record, pipe.transformer, order=2)


def test_custom_sigmas(monkeypatch):
    pipe = pipelines.sd3()
    sigmas = [1.0, 0.95, 0.8, 0.6, 0.5, 0.3, 0.2, 0.1]
    check_run(monkeypatch, pipe, sd3_inputs(pipe), sigmas=sigmas)


def test_scheduler_swapped_while_enabled(monkeypatch):
    """`ras` follows `pipe.scheduler`; the one taken out is as if it had never been watched."""
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe, 2)
    plain = [SCHEDULERS[name]() for name in ("euler", "heun")]
    for scheduler in plain:
        pipe.scheduler = scheduler
        run(pipe, inputs)

    first, second = (SCHEDULERS[name]() for name in ("euler", "heun"))
    pipe.scheduler = first
    record = Recorder(monkeypatch, pipe, second)
    model = copy.deepcopy(pipe.transformer)
    with ras.enabled(pipe, CONFIG):
        for scheduler in (first, second, first):
            pipe.scheduler = scheduler
            record.clear()
            run(pipe, inputs)
            assert steps_of(pipe) == (3, 5)
            check(record, model, order=scheduler.order)
    assert vars(first).keys() == vars(plain[0]).keys()
    assert vars(second).keys() == vars(plain[1]).keys()


# --- runs that start late -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["euler", "heun", "lcm"])  # those that can add noise halfway
@pytest.mark.parametrize("cls", [StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline])
def test_image_to_image_and_inpainting(monkeypatch, cls, name):
    """Steps are counted from the first executed one."""
    scheduler = SCHEDULERS[name]()
    pipe = pipelines.sd3(cls, scheduler, vae=pipelines.autoencoder())
    inputs = sd3_inputs(
        pipe, 2, latents=False, strength=0.6, image=normal(2, 3, 128, 128).sigmoid()
    )
    if cls is StableDiffusion3InpaintPipeline:
        inputs["mask_image"] = (normal(2, 1, 128, 128, seed=1) > 0).float()
    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, CONFIG, mask=False, error_reset_steps=(3,)):
        run(pipe, inputs, steps=10)
        assert steps_of(pipe) == (3, 3)
    order = pipe.scheduler.order
    assert len(record.calls) == 6 * order - (order - 1)
    check(record, pipe.transformer, sparse=[2, 4, 5], order=order)


def test_other_pipeline_with_the_same_parts(monkeypatch):
    """Image-to-image made with `from_pipe` shares the enabled transformer and scheduler."""
    pipe = pipelines.sd3(vae=pipelines.autoencoder())
    other = pipelines.quiet(StableDiffusion3Img2ImgPipeline.from_pipe(pipe))
    assert other.transformer is pipe.transformer and other.scheduler is pipe.scheduler
    record = Recorder(monkeypatch, pipe)
    inputs = sd3_inputs(other, latents=False, strength=0.6, image=normal(1, 3, 128, 128).sigmoid())
    with ras.enabled(pipe, CONFIG, error_reset_steps=()):
        run(other, inputs, steps=10)
        assert steps_of(pipe) == (2, 4)
    check(record, pipe.transformer, sparse=[2, 3, 4, 5])


def test_enabled_pipeline_replaced_by_another_made_of_it():
    """What users write: `pipe = Other.from_pipe(pipe)`: the first object goes, its parts stay."""
    pipe = ras.enable(pipelines.sd3(vae=pipelines.autoencoder()), CONFIG, error_reset_steps=())
    pipe = pipelines.quiet(StableDiffusion3Img2ImgPipeline.from_pipe(pipe))
    gc.collect()
    inputs = sd3_inputs(pipe, latents=False, strength=0.6, image=normal(1, 3, 128, 128).sigmoid())
    run(pipe, inputs, steps=10)
    assert steps_of(pipe) == (2, 4)
    ras.disable(pipe)
    assert "step" not in vars(pipe.scheduler)


def test_other_pipeline_with_its_own_scheduler():
    """The scheduler of another pipeline is not watched: its runs are dense, with one warning."""
    pipe = pipelines.sd3(vae=pipelines.autoencoder())
    parts = {**pipe.components, "scheduler": pipelines.euler()}
    other = pipelines.quiet(StableDiffusion3Img2ImgPipeline(**parts))
    inputs = sd3_inputs(other, latents=False, strength=0.8, image=normal(1, 3, 128, 128).sigmoid())
    expected = run(other, inputs)
    ras.enable(pipe, CONFIG)
    run(pipe, sd3_inputs(pipe))
    told = []
    for _ in range(2):
        result, warned = run_noting_warnings(other, inputs)
        told += warned
        assert relative_error(result, expected) < 1e-5
    assert len(told) == 1
    assert torch.equal(run(pipe, sd3_inputs(pipe)), fresh(sd3_inputs))


def test_two_pipelines_around_one_transformer(monkeypatch):
    """Enabled through both: the later call holds, and nothing is done twice."""
    pipe = pipelines.sd3()
    parts = {**pipe.components, "scheduler": pipelines.euler()}
    other = pipelines.quiet(StableDiffusion3Pipeline(**parts))
    inputs = sd3_inputs(pipe, 2)
    plain = run(pipe, inputs)
    record = Recorder(monkeypatch, pipe)
    ras.enable(pipe, CONFIG, sample_ratio=0.25)
    ras.enable(other, CONFIG)
    run(other, inputs)
    ras.disable(other)
    ras.disable(pipe)
    check(record, pipe.transformer)
    assert record.rows[0].shape == (2, 32)
    assert torch.equal(run(pipe, inputs), plain)
    assert "step" not in vars(pipe.scheduler) | vars(other.scheduler)
