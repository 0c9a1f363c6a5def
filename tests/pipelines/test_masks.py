"""Runs that compute the regions under a mask, and those of inpainting pipelines."""

import functools
import inspect

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3InpaintPipeline, StableDiffusion3Pipeline
from PIL import Image
from support import pipelines
from support.boxes import box, rows_and_columns
from support.pipelines import Recorder, normal, sd3_inputs
from support.runs import SCHEDULERS, check_rows, run, steps_of
from support.snapshot import Snapshot, check_undone
from support.zoo import ENTRIES

import ras
from ras.masks import as_mask, masked_regions

pytestmark = pytest.mark.filterwarnings("error::ras.RASWarning")

PLAN = (1, 1, 0.25, 0, 1, 0.25, 0.25, 0)  # 16 of 64 regions in the partial steps


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# --- runs -----------------------------------------------------------------------------------------


def counted(pipe):
    """How often each region was computed, and how often all were."""
    stats = ras.stats(pipe)
    return stats.region_counts, stats.steps_dense, stats.steps_sparse


def check_counts(pipe, *regions):
    """The partial steps computed those regions of each sample, and no others."""
    counts, dense, sparse = counted(pipe)
    assert sparse > 0 and len(counts) == len(regions)
    for count, chosen in zip(counts, regions):
        expected = torch.full((count.numel(),), dense)
        expected[chosen] += sparse
        assert torch.equal(count.flatten(), expected)


@pytest.mark.parametrize("margin, regions", [(0, range(32, 40)), (1, range(24, 48))])
def test_partial_steps_compute_what_is_under_the_mask(margin, regions):
    pipe = pipelines.sd3()
    with ras.enabled(pipe, mask=box(64, 0, 16, 128), mask_margin=margin, plan=(1, 1, 0.1, 0, 1)):
        run(pipe, sd3_inputs(pipe, 2), steps=5)
        check_counts(pipe, list(regions), list(regions))
        stats = ras.stats(pipe)
    assert stats.plan.shares[2] * 64 == len(regions)


@pytest.mark.parametrize(
    "settings",
    [{}, dict(speedup=3), dict(sample_ratio=0.1), dict(reuse_text=True), dict(extrapolation=0)],
)
def test_a_mask_with_any_settings(settings):
    """No other region is computed in a partial step, and the speed-up is the asked one."""
    pipe = pipelines.sd3()
    regions = rows_and_columns((8, 8), range(2, 4), range(4, 8))
    with ras.enabled(pipe, mask=box(32, 64, 32, 64), mask_margin=0, **settings):
        run(pipe, sd3_inputs(pipe, 1), steps=20)
        check_counts(pipe, regions)
        stats = ras.stats(pipe)
    if "sample_ratio" not in settings:
        target = settings.get("speedup", 2)
        assert stats.speedup_ceiling == pytest.approx(target, rel=0.03)
        assert stats.plan.speedup(64, 12, reuse_text="reuse_text" in settings) == pytest.approx(
            stats.speedup_ceiling
        )
    assert stats.warnings == ()


def test_each_samples_mask_is_its_own():
    pipe = pipelines.sd3()
    masks = np.stack([box(0, 0, 16, 128), box(0, 16, 128, 16)])[:, None]
    row, column = list(range(8)), list(range(1, 64, 8))
    with ras.enabled(pipe, mask=masks, mask_margin=0, plan=(1, 1, 0.1, 1)):
        run(pipe, sd3_inputs(pipe, 2), steps=4)
        check_counts(pipe, row, column)
        run(pipe, sd3_inputs(pipe, 4), steps=4)  # two images of each, as inpainting has them
        check_counts(pipe, row, column, row, column)
        with pytest.raises(ValueError, match="2 samples"):
            run(pipe, sd3_inputs(pipe, 3), steps=4)


def test_a_plan_with_more_room_adds_others_by_drift(monkeypatch):
    """The masked regions in each partial step, and those whose noise drifts most."""
    pipe = pipelines.sd3()
    record = Recorder(monkeypatch, pipe)
    regions = rows_and_columns((8, 8), range(2), range(4))
    with ras.enabled(pipe, mask=box(0, 0, 32, 64), mask_margin=0, plan=PLAN):
        run(pipe, sd3_inputs(pipe, 2))
        assert ras.stats(pipe).plan.shares == PLAN
    assert len(record.rows) == 3
    for selection in record.selections:
        assert selection.active.shape == (2, 16)
        for chosen, scores in zip(selection.active.tolist(), selection.scores):
            scores[regions] = float("-inf")
            others = scores.argsort(descending=True)[:8].tolist()
            assert set(chosen) == {*regions, *others}
    with ras.enabled(pipe, mask=box(0, 0, 32, 64), mask_margin=0, plan=PLAN, metric="std"):
        run(pipe, sd3_inputs(pipe, 1))
        check_counts(pipe, regions)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_masks_for_more_samples_than_there_are(guidance):
    """Told before anything is computed, and the next run is as if it had not been."""
    masks = np.stack([box(0, 0, 16, 128)] * 3)[:, None]
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe, 2)
    with ras.enabled(pipe, mask=masks, plan=(1, 1, 0.1, 1)):
        with pytest.raises(ValueError, match="mask is of 3 samples and the run of"):
            run(pipe, inputs, steps=4, guidance=guidance)
        assert ras.stats(pipe).runs == 0


def test_a_mask_of_the_whole_image():
    """Nothing is left out: every step that computes anything is dense."""
    pipe = pipelines.sd3()
    with ras.enabled(pipe, mask=np.ones((8, 8)), plan=PLAN):
        run(pipe, sd3_inputs(pipe))
        stats = ras.stats(pipe)
    assert (stats.steps_dense, stats.steps_sparse, stats.steps_skipped) == (6, 0, 2)


def test_a_bare_transformer_and_lumina_take_a_mask():
    pipe = pipelines.lumina()
    regions = rows_and_columns((8, 8), range(2), range(4))
    options = dict(mask=box(0, 0, 32, 64), mask_margin=0, plan=(1, 1, 0.1, 1))
    for model in (dict(model=pipe), dict(model=pipe.transformer, scheduler=pipe.scheduler)):
        with ras.enabled(**model, **options):
            run(pipe, pipelines.lumina_inputs(pipe, 1), steps=4)
            check_counts(model["model"], regions)


# --- inpainting -----------------------------------------------------------------------------------


def inpainting(mask, batch=1, scheduler="euler", **call):
    pipe = pipelines.sd3(
        StableDiffusion3InpaintPipeline, SCHEDULERS[scheduler](), vae=pipelines.autoencoder()
    )
    call = dict(image=normal(batch, 3, 128, 128).sigmoid(), mask_image=mask, **call)
    return pipe, sd3_inputs(pipe, batch, latents=False, **call)


@pytest.mark.parametrize("scheduler", ["euler", "heun", "lcm"])  # those that can add noise halfway
def test_inpainting_against_the_oracle(monkeypatch, scheduler):
    """The mask is the call's own; steps are counted from the first executed one."""
    mask = torch.from_numpy(box(32, 0, 32, 64))[None, None]
    pipe, inputs = inpainting(mask, 2, scheduler, strength=0.6)
    record = Recorder(monkeypatch, pipe)
    regions = torch.tensor(rows_and_columns((8, 8), range(1, 5), range(5)))
    config = ras.RASConfig.paper(scheduler_start_step=2, error_reset_steps=(3,))
    with ras.enabled(pipe, config):
        run(pipe, inputs, steps=10)
        assert steps_of(pipe) == (3, 3)
        check_counts_of_stages(pipe, regions, pipe.scheduler.order)
    order = pipe.scheduler.order
    assert len(record.calls) == 6 * order - (order - 1) and not record.selections
    rows = dict.fromkeys((2, 4, 5), regions[None])
    check_rows(record, pipe.transformer, rows, order)


def check_counts_of_stages(pipe, regions, order):
    """Dense in steps 0, 1 and 3 of 6; a second-order run has one call less at its end."""
    expected = torch.full((64,), 3 * order)
    expected[regions] += 3 * order - (order - 1)
    for counts in ras.stats(pipe).region_counts:
        assert torch.equal(counts.flatten(), expected)


def test_inpainting_follows_each_calls_mask():
    """Another mask in the next call, of another size and form."""
    masks = {
        "upper": (Image.fromarray((255 * box(0, 0, 16, 128)).astype(np.uint8)), range(16)),
        "lower": (torch.from_numpy(box(96, 0, 32, 128))[None, None], range(40, 64)),
    }
    pipe, inputs = inpainting(None)
    with ras.enabled(pipe, plan=(1, 1, 0.1, 0, 1, 0.1)):
        for name in ("upper", "lower", "upper"):
            mask, regions = masks[name]
            run(pipe, {**inputs, "mask_image": mask, "strength": 1.0}, steps=6)
            check_counts(pipe, list(regions))
            stats = ras.stats(pipe)
            assert stats.plan.counts(64) == (64, 64, len(regions), 0, 64, len(regions))


def test_inpainting_with_two_masks_and_four_images():
    parts = pipelines.text_encoders()
    pipe = pipelines.sd3(StableDiffusion3InpaintPipeline, vae=pipelines.autoencoder(), parts=parts)
    masks = np.stack([box(0, 0, 16, 128), box(112, 0, 16, 128)])[:, None]
    inputs = dict(
        prompt=["a red ring", "nine lives"],
        num_images_per_prompt=2,
        max_sequence_length=4,
        image=normal(2, 3, 128, 128).sigmoid(),
        mask_image=torch.from_numpy(masks),
        strength=1.0,
        output_type="latent",
        **pipelines.size(16, 16),
    )
    with ras.enabled(pipe, plan=(1, 1, 0.1, 1), mask_margin=0):
        run(pipe, inputs, steps=4)
        upper, lower = list(range(8)), list(range(56, 64))
        check_counts(pipe, upper, lower, upper, lower)


@pytest.mark.parametrize(
    "name",
    [
        "flux-inpaint",
        "flux-control-inpaint",
        "flux-kontext-inpaint",
        "qwen-inpaint",
        "qwen-edit-inpaint",
        "z-image-inpaint",
        "chroma-inpaint",
        "sd3-inpaint",
    ],
)
def test_every_inpainting_pipelines_own_mask(monkeypatch, name):
    """The regions that it touches are what partial steps compute, and no others."""
    pipe, call = ENTRIES[name].build()
    given, prepare = [], type(pipe).prepare_mask_latents

    @functools.wraps(prepare)
    def noted(self, *args, **kwargs):
        bound = inspect.signature(prepare).bind(self, *args, **kwargs).arguments
        given.append(as_mask(bound.get("mask", bound.get("mask_image"))))
        return prepare(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "prepare_mask_latents", noted)
    ras.enable(pipe, plan=(1, 1, 0.01, 0, 1, 0.01, 0.01, 0), mask_margin=0)
    size = (96, 160) if name == "qwen-edit-inpaint" else (128, 192)
    marks = Image.fromarray((255 * box(40, 60, 30, 20, size)).astype(np.uint8))
    call(8, mask_image=marks)
    stats = ras.stats(pipe)
    counts = stats.region_counts
    rows = masked_regions(given[0], counts.shape[1:], 0)[0].tolist()
    assert stats.steps_sparse == 3 and 0 < len(rows) < counts[0].numel()
    for sample in counts.flatten(1):
        assert all((count == 6) == (row in rows) for row, count in enumerate(sample.tolist()))
        assert set(sample.tolist()) == {3, 6}


def test_a_mask_of_a_video():
    """The same regions of all frames."""
    pipe, call = ENTRIES["wan"].build()
    mask = np.zeros((64, 96), np.float32)
    mask[:16, 16:32] = 1
    ras.enable(pipe, mask=mask, mask_margin=0, plan=(1, 1, 0.01, 0, 1, 0.01, 0.01, 0))
    call(8)
    counts = ras.stats(pipe).region_counts[0]
    assert counts.ndim == 3 and ras.stats(pipe).steps_sparse == 3
    for frame in counts:
        assert [tuple(place) for place in (frame == 6).nonzero().tolist()] == [(0, 1)]


def test_a_mask_given_goes_before_the_calls_own():
    pipe, inputs = inpainting(torch.from_numpy(box(0, 0, 16, 128))[None, None], strength=1.0)
    with ras.enabled(pipe, mask=box(112, 0, 16, 128), mask_margin=0, plan=(1, 1, 0.1, 1)):
        run(pipe, inputs, steps=4)
        check_counts(pipe, list(range(56, 64)))


@pytest.mark.filterwarnings("error::ras.RASWarning")
def test_a_run_without_a_speed_up_is_dense_under_a_mask_too():
    """Of the call or given, small or large: exact to the bit."""
    own = torch.from_numpy(box(0, 0, 16, 64))[None, None]
    pipe, inputs = inpainting(own, strength=1.0)
    expected = run(pipe, inputs, steps=12)
    for mask in (None, box(0, 0, 16, 16), box(0, 0, 128, 120)):
        with ras.enabled(pipe, speedup=1, mask=mask):
            assert torch.equal(run(pipe, inputs, steps=12), expected)
            assert ras.stats(pipe).steps_dense == 12


def test_inpainting_with_nothing_under_the_mask():
    """No error, as there is none without `ras`; the regions are those that drift."""
    pipe, inputs = inpainting(torch.zeros(1, 1, 128, 128), strength=1.0)
    with ras.enabled(pipe, plan=(1, 1, 0.25, 1)):
        assert run(pipe, inputs, steps=4).isfinite().all()
        assert ras.stats(pipe).plan.counts(64) == (64, 64, 16, 64)


def test_another_pipelines_run_has_no_mask():
    """Text to image with the parts of an inpainting pipeline that has run before."""
    pipe, inputs = inpainting(torch.from_numpy(box(0, 0, 64, 128))[None, None], strength=1.0)
    other = pipelines.quiet(StableDiffusion3Pipeline.from_pipe(pipe))
    with ras.enabled(pipe, plan=(1, 1, 0.125, 1)):
        run(pipe, inputs, steps=4)
        assert ras.stats(pipe).plan.counts(64)[2] == 40
        run(other, sd3_inputs(other), steps=4)
        assert ras.stats(pipe).plan.counts(64)[2] == 8


@pytest.mark.parametrize("given", [False, True])
def test_nothing_is_left_on_an_inpainting_pipeline(given):
    mask = torch.from_numpy(box(0, 0, 64, 128))[None, None]
    pipe, inputs = inpainting(mask, strength=1.0)
    expected = run(pipe, inputs, steps=6)
    names, before = set(vars(pipe)), Snapshot(pipe)
    ras.enable(pipe, plan=(1, 1, 0.1, 0, 1, 0.1), mask=mask if given else None)
    assert not torch.equal(run(pipe, inputs, steps=6), expected)
    ras.disable(pipe)
    check_undone(before, pipe)
    assert set(vars(pipe)) == names and "prepare_mask_latents" not in names
    assert torch.equal(run(pipe, inputs, steps=6), expected)
