"""`ras` with layers that are not the usual ones: LoRA, fused projections, other processors."""

import copy

import pytest
import torch
from diffusers import StableDiffusion3PAGPipeline
from support import pipelines
from support.oracle import relative_error
from support.pipelines import Recorder, normal, sd3_inputs
from support.runs import (
    CONFIG,
    SPARSE,
    STEPS,
    check,
    fresh,
    load_lora,
    lora,
    run,
    run_noting_warnings,
    steps_of,
)

import ras

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]


# --- LoRA -----------------------------------------------------------------------------------------


def adapted(model, deltas, scale=1.0):
    """A copy of the model with a LoRA's deltas added to its weights."""
    model = copy.deepcopy(model)
    for name, delta in deltas.items():
        model.get_parameter(name).add_(scale * delta)
    return model


@pytest.mark.parametrize("loaded", ["before", "after"])
def test_lora(monkeypatch, loaded):
    """Loaded before or after, scaled, swapped for another in place, and unloaded."""
    pipe = pipelines.sd3()
    plain = copy.deepcopy(pipe.transformer)
    (one, one_deltas), (two, two_deltas) = (lora(pipe.transformer, seed) for seed in (1000, 2000))
    record = Recorder(monkeypatch, pipe)
    inputs = sd3_inputs(pipe, 2)

    def checked(model, **call):
        record.clear()
        run(pipe, inputs, **call)
        check(record, model)

    if loaded == "before":
        load_lora(pipe, one)
    with ras.enabled(pipe, CONFIG):
        if loaded == "after":
            checked(adapted(plain, {}))
            load_lora(pipe, one)
        checked(adapted(plain, one_deltas))
        checked(adapted(plain, one_deltas, 0.5), joint_attention_kwargs={"scale": 0.5})
        load_lora(pipe, two, hotswap=True)
        checked(adapted(plain, two_deltas))
        load_lora(pipe, one, "other")
        pipe.set_adapters(["other"])
        checked(adapted(plain, one_deltas))
        pipe.unload_lora_weights()
        checked(adapted(plain, {}))


def test_lora_fused_while_enabled(monkeypatch):
    pipe = pipelines.sd3()
    plain = copy.deepcopy(pipe.transformer)
    state, deltas = lora(pipe.transformer, 1000)
    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, CONFIG):
        load_lora(pipe, state)
        pipe.fuse_lora()
        run(pipe, sd3_inputs(pipe))
    check(record, adapted(plain, deltas))


# --- other processors -----------------------------------------------------------------------------


def test_fused_projections_after_enable(monkeypatch):
    """Either sparse and right, or dense with one warning; and dense again at the end."""
    pipe = pipelines.sd3()
    model = copy.deepcopy(pipe.transformer)
    inputs = sd3_inputs(pipe, 2)
    plain = run(pipe, inputs)
    record = Recorder(monkeypatch, pipe)
    ras.enable(pipe, CONFIG)
    pipe.transformer.fuse_qkv_projections()
    told = []
    for _ in range(2):
        record.clear()
        told += run_noting_warnings(pipe, inputs)[1]
        check(record, model, [] if told else SPARSE, planned=SPARSE[: len(record.rows)])
        assert steps_of(pipe) == ((8, 0) if told else (3, 5))
    assert len(told) <= 1
    ras.disable(pipe)
    pipe.transformer.unfuse_qkv_projections()
    for name, processor in pipe.transformer.attn_processors.items():
        assert type(processor).__module__.startswith("diffusers."), name
    assert relative_error(run(pipe, inputs), plain) < 1e-6


def test_fused_projections_before_enable(monkeypatch):
    pipe = pipelines.sd3()
    model = copy.deepcopy(pipe.transformer)
    pipe.transformer.fuse_qkv_projections()
    record = Recorder(monkeypatch, pipe)
    ras.enable(pipe, CONFIG)
    _, told = run_noting_warnings(pipe, sd3_inputs(pipe, 2))
    check(record, model, [] if told else SPARSE, planned=SPARSE[: len(record.rows)])
    assert len(told) <= 1


def ip_adapter_call(pipe):
    return sd3_inputs(pipe, ip_adapter_image_embeds=normal(2, 3, 8, seed=9))


def test_ip_adapter_is_refused():
    pipe = pipelines.sd3()
    pipe.load_ip_adapter(pipelines.ip_adapter(pipe.transformer), image_encoder_folder=None)
    with pytest.raises(ValueError, match=r"SD3IPAdapterJointAttnProcessor2_0|IP-Adapter"):
        ras.enable(pipe, CONFIG)
    assert not ras.is_enabled(pipe)


def test_ip_adapter_with_whole_steps():
    """Which is what a speed-up alone gets, as they need nothing of a processor."""
    pipe = pipelines.sd3()
    pipe.load_ip_adapter(pipelines.ip_adapter(pipe.transformer), image_encoder_folder=None)
    plain = run(pipe, ip_adapter_call(pipe))
    with ras.enabled(pipe, speedup=2):
        result, told = run_noting_warnings(pipe, ip_adapter_call(pipe))
        stats = ras.stats(pipe)
    assert not told and (stats.steps_dense, stats.steps_sparse, stats.steps_skipped) == (4, 0, 4)
    assert result.isfinite().all() and not torch.equal(result, plain)
    assert torch.equal(run(pipe, ip_adapter_call(pipe)), plain)


def test_ip_adapter_loaded_after_enable():
    """Its runs are dense, to the bit, and one warning names it."""
    plain, pipe = pipelines.sd3(), pipelines.sd3()
    state = pipelines.ip_adapter(pipe.transformer)
    plain.load_ip_adapter(state, image_encoder_folder=None)
    expected = run(plain, ip_adapter_call(plain))
    ras.enable(pipe, CONFIG)
    pipe.load_ip_adapter(state, image_encoder_folder=None)
    result, told = run_noting_warnings(pipe, ip_adapter_call(pipe))
    again, told_again = run_noting_warnings(pipe, ip_adapter_call(pipe))
    assert torch.equal(result, expected) and torch.equal(again, expected)
    assert len(told) == 1 and "SD3IPAdapterJointAttnProcessor2_0" in told[0] and not told_again
    assert ras.stats(pipe).warnings == tuple(told) and steps_of(pipe) == (STEPS, 0)
    ras.disable(pipe)
    assert torch.equal(run(pipe, ip_adapter_call(pipe)), expected)


def test_pag_pipeline_is_refused():
    pipe = pipelines.sd3(StableDiffusion3PAGPipeline)
    with pytest.raises(ValueError, match="PAG"):
        ras.enable(pipe, CONFIG)
    assert not ras.is_enabled(pipe)


def test_pag_pipeline_with_whole_steps():
    pipe = pipelines.sd3(StableDiffusion3PAGPipeline)
    inputs = sd3_inputs(pipe)
    plain = run(pipe, inputs, pag_scale=2.0)
    with ras.enabled(pipe, speedup=2):
        result, told = run_noting_warnings(pipe, inputs, pag_scale=2.0)
        stats = ras.stats(pipe)
    assert not told and (stats.calls_computed, stats.calls_total) == (4, 8)
    assert result.isfinite().all() and not torch.equal(result, plain)
    assert torch.equal(run(pipe, inputs, pag_scale=2.0), plain)


def test_pag_pipeline_with_an_enabled_transformer():
    """Made from an enabled pipeline's parts: dense, one warning; the first goes on as before."""
    plain = pipelines.sd3(StableDiffusion3PAGPipeline)
    inputs = sd3_inputs(plain)
    expected = run(plain, inputs, pag_scale=2.0)
    pipe = pipelines.sd3()
    pag = pipelines.quiet(
        StableDiffusion3PAGPipeline(
            transformer=pipe.transformer,
            scheduler=pipe.scheduler,
            vae=None,
            **pipelines.NO_TEXT_ENCODERS,
        )
    )
    ras.enable(pipe, CONFIG)
    result, told = run_noting_warnings(pag, inputs, pag_scale=2.0)
    assert relative_error(result, expected) < 1e-5
    assert len(told) == 1 and "PAG" in told[0]
    assert torch.equal(run(pipe, inputs), fresh(sd3_inputs))


def test_processor_of_the_users_own():
    """A processor set in one layer while enabled: dense, one warning that names its class."""

    class OwnProcessor:
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
            image, text = self.inner(attn, hidden_states, encoder_hidden_states)
            return 2 * image, text

    plain, pipe = pipelines.sd3(), pipelines.sd3()
    for p in (plain, pipe):
        if p is pipe:
            ras.enable(pipe, CONFIG)
        attn = p.transformer.transformer_blocks[1].attn
        own = OwnProcessor(plain.transformer.transformer_blocks[0].attn.processor)
        attn.set_processor(own)
    inputs = sd3_inputs(plain)
    result, told = run_noting_warnings(pipe, inputs)
    assert relative_error(result, run(plain, inputs)) < 1e-5
    assert len(told) == 1 and "OwnProcessor" in told[0]
    ras.disable(pipe)
    assert attn.processor is own
