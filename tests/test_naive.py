"""Whole runs against the oracle of `naive.py`, which replays the rows that `ras` chose.

First the oracle itself: with all rows active it is the plain diffusers run. Then `ras`, on models
of the published dimensions with a few layers.
"""

import math

import pytest
import torch
from support import naive, pipelines
from support.naive import relative_error
from support.pipelines import Recorder, sparse_steps

import ras

GUIDANCE = 4.0


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def sd3(sizes, **config):
    pipe = pipelines.sd3(**sizes, **config)
    return pipe, pipelines.sd3_inputs, lambda: naive.NaiveSD3(pipe.transformer)


def lumina(sizes, base_length=64**2, pixels=12 * 16):
    """The pipeline scales positions by the share that its latents have of the default size."""
    pipe = pipelines.lumina(**sizes)
    factor = math.sqrt(pixels / pipe.transformer.config.sample_size**2)
    return (
        pipe,
        pipelines.lumina_inputs,
        lambda: naive.NaiveLumina(pipe.transformer, base_length, factor),
    )


def oracle_run(oracle, inputs, steps, rows):
    guided = naive.sd3_guided if isinstance(oracle, naive.NaiveSD3) else naive.lumina_guided
    scheduler = pipelines.euler()
    scheduler.set_timesteps(steps)
    return naive.euler_run(
        guided(oracle, inputs, GUIDANCE),
        inputs["latents"],
        scheduler.timesteps,
        scheduler.sigmas,
        rows,
    )


# --- the oracle by itself -------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 2, 4])
@pytest.mark.parametrize("sizes", [{}, dict(qk_norm="rms_norm", dual_attention_layers=(0, 2))])
def test_oracle_is_plain_sd3_when_all_rows_are_active(sizes, patch):
    pipe, inputs, oracle = sd3(sizes, patch_size=patch)
    inputs = inputs(pipe, batch=2, height=8, width=16)
    plain = pipe(**inputs, num_inference_steps=8, guidance_scale=GUIDANCE).images
    _, latents = oracle_run(oracle(), inputs, 8, [None] * 8)
    assert relative_error(latents, plain) < 1e-5


@pytest.mark.parametrize("proportional", [False, True])
def test_oracle_is_plain_lumina_when_all_rows_are_active(proportional):
    base = (32 * 8 // 16) ** 2 if proportional else None
    pipe, inputs, oracle = lumina({}, base, pixels=8 * 16)
    inputs = inputs(pipe, batch=2, height=8, width=16)
    plain = pipe(
        **inputs,
        num_inference_steps=8,
        guidance_scale=GUIDANCE,
        proportional_attn=proportional,
    ).images
    _, latents = oracle_run(oracle(), inputs, 8, [None] * 8)
    assert relative_error(latents, plain) < 1e-5


def test_oracle_with_every_row_listed_is_the_oracle_with_none():
    pipe, inputs, oracle = sd3({})
    inputs = inputs(pipe, height=8, width=8)
    rows = [None] + [torch.arange(16)[None]] * 5
    assert torch.equal(
        oracle_run(oracle(), inputs, 6, rows)[1], oracle_run(oracle(), inputs, 6, [None] * 6)[1]
    )


# --- ras on the published dimensions --------------------------------------------------------------

# The latents of the Lumina run are not square, its batch is 2, and each sample has its own rows.
RUNS = {
    "sd3-medium": (sd3, pipelines.SD3_MEDIUM, dict(text=pipelines.SD3_TEXT), 28, 0.5),
    "sd3.5-medium": (sd3, pipelines.SD35_MEDIUM, dict(text=pipelines.SD3_TEXT), 28, 0.5),
    "sd3.5-large": (
        sd3,
        dict(pipelines.SD35_LARGE, num_layers=1),
        dict(text=pipelines.SD3_TEXT),
        8,
        0.5,
    ),
    "lumina-next": (
        lumina,
        pipelines.LUMINA_NEXT,
        dict(text=pipelines.LUMINA_TEXT, batch=2, height=12, width=16),
        28,
        0.25,
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_run_equals_the_oracle(name, monkeypatch):
    build, sizes, shape, steps, ratio = RUNS[name]
    pipe, inputs, oracle = build(sizes)
    inputs = inputs(pipe, **shape)
    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, ras.RASConfig.paper(sample_ratio=ratio)):
        result = pipe(**inputs, num_inference_steps=steps, guidance_scale=GUIDANCE).images

    batch, _, height, width = inputs["latents"].shape
    tokens = height * width // 4
    sparse = sparse_steps(steps)
    assert len(record.rows) == len(sparse)
    rows = dict(zip(sparse, record.rows))
    for active in rows.values():
        assert active.shape == (batch, tokens - int((1 - ratio) * tokens))
        assert (active.diff(dim=1) > 0).all()
    if batch > 1:
        assert any(not torch.equal(active[0], active[1]) for active in rows.values())

    noises, latents = oracle_run(oracle(), inputs, steps, [rows.get(s) for s in range(steps)])
    assert len(record.noises) == steps
    for s in range(steps):
        assert relative_error(record.noises[s], noises[s]) <= 1e-5, f"noise of step {s}"
    assert relative_error(result, latents) <= 1e-5
    check_inactive_rows(record, rows)


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


def patches(noise, p=2):
    """(batch, tokens, numbers of a patch)."""
    batch, channels, height, width = noise.shape
    noise = noise.reshape(batch, channels, height // p, p, width // p, p)
    return noise.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // p**2, -1)
