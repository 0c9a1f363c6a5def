"""`ras` in real diffusers pipelines: shapes, guidance, selection, ControlNet, bare models."""

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from support import pipelines
from support.oracle import relative_error
from support.pipelines import Recorder, normal, random_rows, sd3_inputs, sparse_steps
from support.runs import (
    CONFIG,
    RESETS,
    SPARSE,
    START,
    STEPS,
    by_oracle,
    check,
    check_run,
    patches,
    rows_of,
    run,
    steps_of,
)

import ras
import ras_kernels

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]


def test_the_steps_of_these_tests():
    assert sparse_steps(STEPS, START, None, RESETS) == SPARSE


# --- batches, shapes, patches ---------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", [{}, dict(qk_norm="rms_norm", dual_attention_layers=(0, 1))])
def test_batch(monkeypatch, sizes, batch):
    pipe = pipelines.sd3(**sizes)
    record = check_run(monkeypatch, pipe, sd3_inputs(pipe, batch))
    for rows in record.rows:
        assert rows.shape == (batch, 32) and rows.dtype == torch.int32
    if batch > 1:
        assert not torch.equal(record.rows[0][0], record.rows[0][1])


def test_num_images_per_prompt(monkeypatch):
    """Two prompts, two images each: four samples, each with its own regions."""
    pipe = pipelines.sd3(parts=pipelines.text_encoders(), vae=pipelines.autoencoder())
    inputs = dict(
        prompt=["a red ring", "nine lives"],
        negative_prompt=["", ""],
        num_images_per_prompt=2,
        max_sequence_length=4,
        output_type="latent",
        **pipelines.size(16, 16),
    )
    record = check_run(monkeypatch, pipe, inputs)
    rows = record.rows[0].tolist()
    assert len(rows) == 4 and len(set(map(tuple, rows))) == 4


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("height, width", [(16, 8), (8, 24)])
def test_shape_and_patch(monkeypatch, patch, height, width):
    pipe = pipelines.sd3(patch_size=patch)
    record = check_run(monkeypatch, pipe, sd3_inputs(pipe, 2, height, width))
    tokens = height * width // patch**2
    assert record.rows[0].shape == (2, tokens - tokens // 2)


@pytest.mark.parametrize("ratio", [0.9, 0.25, 0.1])
def test_ratio_that_does_not_divide(monkeypatch, ratio):
    pipe = pipelines.sd3()
    config = ras.RASConfig.paper(
        sample_ratio=ratio, scheduler_start_step=START, error_reset_steps=RESETS
    )
    record = check_run(monkeypatch, pipe, sd3_inputs(pipe, height=12, width=20), config=config)
    assert record.rows[0].shape == (1, 60 - int((1 - ratio) * 60))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("patch, height, width", [(1, 8, 12), (2, 8, 24), (2, 16, 16), (4, 32, 16)])
def test_lumina(monkeypatch, patch, height, width, guidance):
    pipe = pipelines.lumina(patch_size=patch)
    inputs = pipelines.lumina_inputs(pipe, 3, height, width)
    check_run(monkeypatch, pipe, inputs, guidance=guidance)


def test_lumina_without_proportional_attention(monkeypatch):
    pipe = pipelines.lumina()
    check_run(monkeypatch, pipe, pipelines.lumina_inputs(pipe, 2), proportional_attn=False)


def test_lumina_attends_without_a_mask(monkeypatch):
    """Diffusers' counts all tokens, which is known by whose it is; another one's runs are dense."""
    attend, given, masks = ras_kernels.sparse_attention, [], []

    def noted(*args, **kwargs):
        given.append(kwargs.get("key_mask"))
        return attend(*args, **kwargs)

    monkeypatch.setattr(ras_kernels, "sparse_attention", noted)
    pipe = pipelines.lumina()
    embedder, inputs = pipe.transformer.patch_embedder, pipelines.lumina_inputs(pipe)
    with ras.enabled(pipe, CONFIG):
        run(pipe, inputs)
        expected = ras.stats(pipe).steps_sparse
    assert expected
    found = embedder.register_forward_hook(lambda module, args, output: masks.append(output[1]))
    run(pipe, inputs)
    found.remove()
    assert masks and all(mask.all() for mask in masks)
    assert given and all(mask is None for mask in given)

    add_hook_to_module(embedder, ModelHook())  # as offloading does
    with ras.enabled(pipe, CONFIG):
        run(pipe, inputs)
        assert ras.stats(pipe).steps_sparse == expected


@pytest.mark.parametrize("way", ["class", "forward", "forward beneath a hook", "hook"])
def test_lumina_with_a_mask_of_somebodys(way):
    """It is dense, whatever has the patch embedder mask tokens."""
    pipe = pipelines.lumina()
    embedder, inputs = pipe.transformer.patch_embedder, pipelines.lumina_inputs(pipe)
    kind = type(embedder)

    def masked(rows, mask, *others):
        return rows, mask * (torch.arange(mask.shape[1]) < 9), *others

    class Masking(kind):
        def forward(self, *args):
            return masked(*super().forward(*args))

    if way == "class":
        embedder.__class__ = Masking
    elif way == "hook":
        embedder.register_forward_hook(lambda module, args, output: masked(*output))
    else:
        embedder.forward = lambda *args: masked(*kind.forward(embedder, *args))
    if "beneath" in way:
        add_hook_to_module(embedder, ModelHook())
    dense = run(pipe, inputs, 4)
    with ras.enabled(pipe, CONFIG), pytest.warns(ras.RASWarning) as told:
        assert torch.equal(run(pipe, inputs, 4), dense)
    assert "may mask tokens" in str(told[0].message)


def test_lumina_changes_its_rotary_table_once(monkeypatch):
    """The step with another table than the one before it is dense: old K were turned otherwise."""
    pipe = pipelines.lumina()
    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, CONFIG):
        run(pipe, pipelines.lumina_inputs(pipe), scaling_watershed=0.5)
        assert steps_of(pipe) == (4, 4)
    times = [call["timestep"][0].item() for call in record.calls]
    switch = next(s for s in range(STEPS) if times[s] >= 0.5)
    assert switch in SPARSE
    sparse = [s for s in SPARSE if s != switch]
    check(record, pipe.transformer, sparse, planned=SPARSE)


# --- the published dimensions ---------------------------------------------------------------------

# The latents of the Lumina run are not square, its batch is 2, and each sample has its own rows.
PUBLISHED = {
    "sd3-medium": ("sd3", pipelines.SD3_MEDIUM, dict(text=pipelines.SD3_TEXT), 28, 0.5),
    "sd3.5-medium": ("sd3", pipelines.SD35_MEDIUM, dict(text=pipelines.SD3_TEXT), 28, 0.5),
    "sd3.5-large": (
        "sd3",
        dict(pipelines.SD35_LARGE, num_layers=1),
        dict(text=pipelines.SD3_TEXT),
        8,
        0.5,
    ),
    "lumina-next": (
        "lumina",
        pipelines.LUMINA_NEXT,
        dict(text=pipelines.LUMINA_TEXT, batch=2, height=12, width=16),
        28,
        0.25,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_run_equals_that_of_the_oracle(name, monkeypatch):
    """With a few layers. Each goes its own way from the first step to the last."""
    family, sizes, shape, steps, ratio = PUBLISHED[name]
    pipe = getattr(pipelines, family)(**sizes)
    inputs = getattr(pipelines, f"{family}_inputs")(pipe, **shape)
    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, ras.RASConfig.paper(sample_ratio=ratio)):
        result = run(pipe, inputs, steps)

    batch, _, height, width = inputs["latents"].shape
    tokens = height * width // 4
    rows = rows_of(record, sparse_steps(steps))
    for active in rows.values():
        assert active.shape == (batch, tokens - int((1 - ratio) * tokens))
        assert (active.diff(dim=1) > 0).all()
    if batch > 1:
        assert any(not torch.equal(active[0], active[1]) for active in rows.values())
    check_inactive_rows(record, rows)

    noises = record.noises
    record.clear()
    latents = run(by_oracle(pipe, [rows.get(s) for s in range(steps)]), inputs, steps)
    assert len(record.noises) == len(noises) == steps
    for s in range(steps):
        assert relative_error(noises[s], record.noises[s]) <= 1e-5, f"noise of step {s}"
    assert relative_error(result, latents) <= 1e-5


def check_inactive_rows(record, rows):
    """The noise of the inactive rows is the last step's to the bit, and of no other row."""
    assert rows
    for step, active in rows.items():
        tokens, before = (patches(record.calls[s]["noise"]) for s in (step, step - 1))
        same = (tokens == before).all(-1)
        inactive = torch.ones_like(same)
        copies = len(same) // len(active)
        inactive.scatter_(1, active.repeat(copies, 1).long(), False)
        assert torch.equal(same, inactive), f"step {step}"


# --- what the selection sees ----------------------------------------------------------------------


def scores_of(noise, metric, p=2):
    """Per region: the mean over its pixels of the noise's spread over the channels."""
    pixels = noise.std(1) if metric == "std" else noise.norm(dim=1)
    batch, height, width = pixels.shape
    return pixels.reshape(batch, height // p, p, width // p, p).mean((2, 4)).flatten(1)


@pytest.mark.parametrize("metric", ["std", "l2norm"])
@pytest.mark.parametrize("family", ["sd3", "lumina"])
def test_selection_sees_the_guided_noise(monkeypatch, family, metric):
    """The scores are those of what the scheduler got in the step before, up to a constant."""
    pipe = getattr(pipelines, family)()
    inputs = getattr(pipelines, f"{family}_inputs")(pipe, 2)
    record = Recorder(monkeypatch, pipe)
    config = ras.RASConfig.paper(
        metric=metric, scheduler_start_step=START, error_reset_steps=RESETS
    )
    with ras.enabled(pipe, config):
        run(pipe, inputs)
    assert len(record.selections) == len(SPARSE)
    for step, selection in zip(SPARSE, record.selections):
        expected = scores_of(record.noises[step - 1], metric)
        ratio = selection.scores / expected
        assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-4)


def test_ages_count_the_steps_since_a_region_was_computed(monkeypatch):
    """Ages go from one selection to the next, and a dense step sets them all to zero."""
    pipe = pipelines.sd3()
    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, CONFIG):
        run(pipe, sd3_inputs(pipe, 2))
    before = None
    for step, selection in zip(SPARSE, record.selections):
        if step - 1 in SPARSE:
            assert torch.equal(selection.ages, before.next)
            dropped = torch.ones_like(selection.ages, dtype=torch.bool)
            dropped.scatter_(1, before.active.long(), False)
            assert (selection.ages[dropped] > 0).all() and (selection.ages[~dropped] == 0).all()
        else:
            assert (selection.ages == 0).all()
        before = selection


def test_forced_rows_are_the_rows_that_are_used(monkeypatch):
    """What `select_regions` gives is what is computed, whatever the scores were."""
    pipe = pipelines.sd3()
    record = Recorder(monkeypatch, pipe, choose=random_rows)
    with ras.enabled(pipe, CONFIG):
        run(pipe, sd3_inputs(pipe, 2))
    check(record, pipe.transformer)


def test_statistics_count_what_was_computed(monkeypatch):
    pipe = pipelines.sd3()
    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, CONFIG):
        run(pipe, sd3_inputs(pipe, 2, height=12, width=16))
        stats = ras.stats(pipe)
    counts = torch.full((2, 48), STEPS - len(SPARSE))
    for rows in record.rows:
        counts.scatter_add_(1, rows.long(), torch.ones_like(counts))
    assert torch.equal(stats.region_counts.to(counts), counts.reshape(2, 6, 8))
    share = counts.sum().item() / (2 * 48 * STEPS)
    assert stats.tokens_computed / stats.tokens_total == pytest.approx(share)
    assert (stats.steps_dense, stats.steps_sparse) == (3, 5)
    assert 1 < stats.speedup_ceiling < STEPS / 3
    assert stats.warnings == ()
    assert str(stats)


def test_fractions_of_the_run_and_an_end_step(monkeypatch):
    pipe = pipelines.sd3()
    record = Recorder(monkeypatch, pipe)
    config = ras.RASConfig.paper(
        scheduler_start_step=3, scheduler_end_step=8, error_reset_steps=(0.5, 0.76, 40)
    )
    with ras.enabled(pipe, config):
        run(pipe, sd3_inputs(pipe), steps=12)
        assert steps_of(pipe) == (7, 5)
    check(record, pipe.transformer, sparse=[3, 4, 5, 7, 8])
    assert sparse_steps(12, 3, 8, (0.5, 0.76, 40)) == [3, 4, 5, 7, 8]


# --- ControlNet -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [2, 5])
def test_controlnet(monkeypatch, layers):
    """The residuals are full-length; the active rows' share of them is added."""
    pipe = pipelines.sd3_controlnet(num_layers=layers)
    inputs = sd3_inputs(pipe, 2, control_image=normal(2, 3, 128, 128).sigmoid())
    record = check_run(monkeypatch, pipe, inputs)
    for call in record.calls:
        assert all(r.shape[1] == 64 for r in call["block_controlnet_hidden_states"])
    assert record.calls[0]["block_controlnet_hidden_states"][0].std() > 0.1


def test_controlnet_for_part_of_the_run(monkeypatch):
    pipe = pipelines.sd3_controlnet()
    inputs = sd3_inputs(pipe, control_image=normal(1, 3, 128, 128).sigmoid())
    check_run(monkeypatch, pipe, inputs, control_guidance_start=0.2, control_guidance_end=0.6)
