"""`ras` in real diffusers pipelines: every way of calling them, small models.

Most tests record a run and hand every transformer call to the oracle of `naive.py`, with the rows
that `ras` chose for the sparse steps: the noise must be the same in each call.
"""

import gc
import math
import warnings

import naive
import pipelines
import pytest
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    SASolverScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from naive import relative_error
from pipelines import Recorder, normal, random_rows, sd3_inputs, sparse_steps

import ras

pytestmark = pytest.mark.filterwarnings("error::ras.RASWarning")  # none but where one is expected

STEPS, START, RESETS = 8, 2, (5,)
SPARSE = [2, 3, 4, 6, 7]
CONFIG = ras.RASConfig.paper(scheduler_start_step=START, error_reset_steps=RESETS)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def run(pipe, inputs, steps=STEPS, guidance=4.0, seed=7, **call):
    """The latents that a call gives; whatever draws random numbers draws the same ones."""
    torch.manual_seed(seed)
    call["generator"] = torch.Generator().manual_seed(seed)
    return pipe(**inputs, num_inference_steps=steps, guidance_scale=guidance, **call).images


def check(record, oracle, sparse=SPARSE, planned=None, order=1):
    """Every call's noise is the oracle's, and the rows of each sparse step were used."""
    calls = list(naive.replay(oracle, record, sparse, planned, order))
    assert {c["after"] // order for c in record.calls} >= set(sparse)
    for n, (noise, expected) in enumerate(calls):
        assert relative_error(noise, expected) < 1e-5, f"call {n} of {len(calls)}"


def check_run(monkeypatch, pipe, inputs, oracle=None, config=CONFIG, **call):
    """A recorded run with `ras`, checked, and its statistics."""
    record = Recorder(monkeypatch, pipe)
    oracle = oracle or naive.NaiveSD3(pipe.transformer)
    with ras.enabled(pipe, config):
        run(pipe, inputs, **call)
        stats = ras.stats(pipe)
    check(record, oracle)
    assert (stats.steps_dense, stats.steps_sparse) == (STEPS - len(SPARSE), len(SPARSE))
    return record


def fresh(inputs, config=CONFIG, **call):
    """What a pipeline gives that was made and enabled for this one call."""
    pipe = pipelines.sd3()
    with ras.enabled(pipe, config):
        return run(pipe, inputs(pipe), **call)


def steps_of(pipe):
    stats = ras.stats(pipe)
    return stats.steps_dense, stats.steps_sparse


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


def lumina_oracle(pipe, height, width, watershed=1.0):
    side = pipe.transformer.config.sample_size
    return naive.NaiveLumina(
        pipe.transformer,
        base_length=(side * 8 // 16) ** 2,
        factor=math.sqrt(height * width / side**2),
        watershed=watershed,
    )


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("patch, height, width", [(1, 8, 12), (2, 8, 24), (2, 16, 16), (4, 32, 16)])
def test_lumina(monkeypatch, patch, height, width, guidance):
    pipe = pipelines.lumina(patch_size=patch)
    inputs = pipelines.lumina_inputs(pipe, 3, height, width)
    oracle = lumina_oracle(pipe, height, width)
    check_run(monkeypatch, pipe, inputs, oracle, guidance=guidance)


def test_lumina_without_proportional_attention(monkeypatch):
    pipe = pipelines.lumina()
    oracle = naive.NaiveLumina(pipe.transformer, factor=0.5)
    inputs = pipelines.lumina_inputs(pipe, 2)
    check_run(monkeypatch, pipe, inputs, oracle, proportional_attn=False)


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
    check(record, lumina_oracle(pipe, 16, 16, watershed=0.5), sparse, planned=SPARSE)


# --- guidance -------------------------------------------------------------------------------------


def test_guidance_off(monkeypatch):
    pipe = pipelines.sd3()
    record = check_run(monkeypatch, pipe, sd3_inputs(pipe, 2), guidance=1.0)
    assert all(len(call["hidden_states"]) == 2 for call in record.calls)


@pytest.mark.parametrize("at", [3, 4, 5])
def test_guidance_cut_off(monkeypatch, at):
    """The first step with half the batch is dense, in a planned sparse step and at a reset."""
    pipe = pipelines.sd3()
    record = Recorder(monkeypatch, pipe)

    def cut(pipe, step, t, tensors):
        if step == at - 1:
            pipe._guidance_scale = 0.0
            tensors = {name: value.chunk(2)[-1] for name, value in tensors.items()}
        return tensors

    with ras.enabled(pipe, CONFIG):
        run(
            pipe,
            sd3_inputs(pipe, 2),
            callback_on_step_end=cut,
            callback_on_step_end_tensor_inputs=["prompt_embeds", "pooled_prompt_embeds"],
        )
        sparse = [s for s in SPARSE if s != at]
        assert steps_of(pipe) == (STEPS - len(sparse), len(sparse))
    assert [len(call["hidden_states"]) for call in record.calls] == [4] * at + [2] * (STEPS - at)
    check(record, naive.NaiveSD3(pipe.transformer), sparse, planned=SPARSE)


def test_guidance_cut_off_in_a_second_order_run(monkeypatch):
    """The step that has to be dense is dense in both of its stages."""
    pipe = pipelines.sd3(scheduler=FlowMatchHeunDiscreteScheduler())
    record = Recorder(monkeypatch, pipe)

    def cut(pipe, call, t, tensors):
        if call == 5:  # the last call of step 2
            pipe._guidance_scale = 0.0
            tensors = {name: value.chunk(2)[-1] for name, value in tensors.items()}
        return tensors

    with ras.enabled(pipe, CONFIG):
        run(
            pipe,
            sd3_inputs(pipe, 2),
            callback_on_step_end=cut,
            callback_on_step_end_tensor_inputs=["prompt_embeds", "pooled_prompt_embeds"],
        )
        assert steps_of(pipe) == (4, 4)
    check(record, naive.NaiveSD3(pipe.transformer), [2, 4, 6, 7], planned=SPARSE, order=2)


@pytest.mark.parametrize("batch", [1, 2])
def test_skip_layer_guidance(monkeypatch, batch):
    """Its extra call is dense, merges its noise like the others, and leaves K and V alone."""
    pipe = pipelines.sd3()
    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, CONFIG):
        run(
            pipe,
            sd3_inputs(pipe, batch),
            skip_guidance_layers=[1],
            skip_layer_guidance_start=0.01,
            skip_layer_guidance_stop=0.6,
        )
        assert steps_of(pipe) == (3, 5)
    skipping = [call["after"] for call in record.calls if call.get("skip_layers")]
    assert skipping == [1, 2, 3, 4]
    check(record, naive.NaiveSD3(pipe.transformer))


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
            dropped.scatter_(1, before.active, False)
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
    check(record, naive.NaiveSD3(pipe.transformer))


def test_statistics_count_what_was_computed(monkeypatch):
    pipe = pipelines.sd3()
    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, CONFIG):
        run(pipe, sd3_inputs(pipe, 2, height=12, width=16))
        stats = ras.stats(pipe)
    counts = torch.full((2, 48), STEPS - len(SPARSE))
    for rows in record.rows:
        counts.scatter_add_(1, rows, torch.ones_like(rows))
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
    check(record, naive.NaiveSD3(pipe.transformer), sparse=[3, 4, 5, 7, 8])
    assert sparse_steps(12, 3, 8, (0.5, 0.76, 40)) == [3, 4, 5, 7, 8]


# --- LoRA -----------------------------------------------------------------------------------------

LORA_LAYERS = [
    "context_embedder",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_k",
    "transformer_blocks.0.attn.to_v",
    "transformer_blocks.1.attn.add_k_proj",
    "transformer_blocks.1.attn.to_out.0",
    "transformer_blocks.2.ff.net.0.proj",
    "norm_out.linear",
    "proj_out",
]


def lora(transformer, seed, rank=4):
    """A LoRA's state dict, and what it adds to each weight."""
    state, deltas = {}, {}
    for n, name in enumerate(LORA_LAYERS):
        layer = transformer.get_submodule(name)
        a = normal(rank, layer.in_features, seed=seed + n, scale=layer.in_features**-0.5)
        b = normal(layer.out_features, rank, seed=seed - n, scale=rank**-0.5)
        state[f"transformer.{name}.lora_A.weight"] = a
        state[f"transformer.{name}.lora_B.weight"] = b
        deltas[f"{name}.weight"] = b @ a
    return state, deltas


def load_lora(pipe, state, name="style", **options):
    """Load a copy: an in-place swap would write into the tensors that were loaded before."""
    state = {key: weight.clone() for key, weight in state.items()}
    pipe.load_lora_weights(state, adapter_name=name, **options)


def adapted(oracle, deltas, scale=1.0):
    """The oracle's model with a LoRA's deltas added to its weights."""
    other = naive.NaiveSD3.__new__(naive.NaiveSD3)
    other.config, other.cache, other.noise = oracle.config, {}, {}
    other.weights = dict(oracle.weights)
    for name, delta in deltas.items():
        other.weights[name] = other.weights[name] + scale * delta
    return other


@pytest.mark.parametrize("loaded", ["before", "after"])
def test_lora(monkeypatch, loaded):
    """Loaded before or after, scaled, swapped for another in place, and unloaded."""
    pipe = pipelines.sd3()
    plain = naive.NaiveSD3(pipe.transformer)
    (one, one_deltas), (two, two_deltas) = (lora(pipe.transformer, seed) for seed in (1000, 2000))
    record = Recorder(monkeypatch, pipe)
    inputs = sd3_inputs(pipe, 2)

    def checked(oracle, **call):
        record.clear()
        run(pipe, inputs, **call)
        check(record, oracle)

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
    plain = naive.NaiveSD3(pipe.transformer)
    plain.weights = {name: weight.clone() for name, weight in plain.weights.items()}
    state, deltas = lora(pipe.transformer, 1000)
    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, CONFIG):
        load_lora(pipe, state)
        pipe.fuse_lora()
        run(pipe, sd3_inputs(pipe))
    check(record, adapted(plain, deltas))


# --- schedulers -----------------------------------------------------------------------------------

FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "euler-dynamic": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    "euler-stochastic": lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "heun": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
    "lcm": lambda: FlowMatchLCMScheduler(shift=3.0),
    "dpm-multistep": lambda: DPMSolverMultistepScheduler(**FLOW),
    "dpm-multistep-3": lambda: DPMSolverMultistepScheduler(**FLOW, solver_order=3),
    "dpm-sde": lambda: DPMSolverMultistepScheduler(**FLOW, algorithm_type="sde-dpmsolver++"),
    "dpm-singlestep": lambda: DPMSolverSinglestepScheduler(**FLOW),
    "unipc": lambda: UniPCMultistepScheduler(**FLOW),
    "deis": lambda: DEISMultistepScheduler(**FLOW),
    "sa-solver": lambda: SASolverScheduler(**FLOW),
}


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
    check(record, naive.NaiveSD3(pipe.transformer), order=pipe.scheduler.order)
    assert result.isfinite().all() and not torch.allclose(result, expected)
    assert torch.equal(run(pipe, inputs), expected)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_lumina_scheduler(monkeypatch, name):
    pipe = pipelines.lumina(scheduler=SCHEDULERS[name]())
    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, CONFIG):
        run(pipe, pipelines.lumina_inputs(pipe, 2))
        assert steps_of(pipe) == (3, 5)
    check(record, lumina_oracle(pipe, 16, 16), order=pipe.scheduler.order)


def test_both_stages_of_a_heun_step_use_the_same_rows(monkeypatch):
    pipe = pipelines.sd3(scheduler=SCHEDULERS["heun"]())
    record = Recorder(monkeypatch, pipe, choose=random_rows)
    with ras.enabled(pipe, CONFIG):
        run(pipe, sd3_inputs(pipe, 2))
    assert len(record.calls) == 2 * STEPS - 1 and len(record.rows) == len(SPARSE)
    check(record, naive.NaiveSD3(pipe.transformer), order=2)


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
    oracle = naive.NaiveSD3(pipe.transformer)
    with ras.enabled(pipe, CONFIG):
        for scheduler in (first, second, first):
            pipe.scheduler = scheduler
            record.clear()
            run(pipe, inputs)
            assert steps_of(pipe) == (3, 5)
            check(record, oracle, order=scheduler.order)
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
    check(record, naive.NaiveSD3(pipe.transformer), sparse=[2, 4, 5], order=order)


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
    check(record, naive.NaiveSD3(pipe.transformer), sparse=[2, 3, 4, 5])


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
    check(record, naive.NaiveSD3(pipe.transformer))
    assert record.rows[0].shape == (2, 32)
    ras.disable(other)
    ras.disable(pipe)
    assert torch.equal(run(pipe, inputs), plain)
    assert "step" not in vars(pipe.scheduler) | vars(other.scheduler)


# --- from call to call ----------------------------------------------------------------------------


def test_calls_that_differ_do_not_touch_each_other():
    """Step count, batch and resolution change; each call gives what a fresh pipeline gives."""
    calls = [
        (8, dict(batch=1, height=16, width=16)),
        (6, dict(batch=1, height=16, width=16)),
        (8, dict(batch=2, height=16, width=16)),
        (8, dict(batch=2, height=8, width=24)),
        (8, dict(batch=2, height=24, width=8)),
        (9, dict(batch=1, height=16, width=16, text=20)),
        (8, dict(batch=1, height=16, width=16)),
    ]
    pipe = pipelines.sd3()
    with ras.enabled(pipe, CONFIG):
        for steps, shape in calls:
            result = run(pipe, sd3_inputs(pipe, **shape), steps)
            expected = fresh(lambda pipe, shape=shape: sd3_inputs(pipe, **shape), steps=steps)
            assert torch.equal(result, expected)


class Stop(Exception):
    pass


def stop_at(step_to_stop):
    def stop(pipe, step, t, tensors):
        if step == step_to_stop:
            raise Stop
        return tensors

    return stop


@pytest.mark.parametrize("at", [0, 2, 3, 5])
def test_exception_in_a_callback(at):
    pipe = pipelines.sd3()
    with ras.enabled(pipe, CONFIG):
        with pytest.raises(Stop):
            run(pipe, sd3_inputs(pipe, seed=5), callback_on_step_end=stop_at(at))
        assert torch.equal(run(pipe, sd3_inputs(pipe)), fresh(sd3_inputs))


@pytest.mark.parametrize("at", [0, 1, 3, 6])
def test_exception_inside_the_model(at):
    """In the middle of a walk through the blocks, on a dense and on a sparse step."""
    pipe = pipelines.sd3()
    calls = iter(range(100))

    def stop(module, args):
        if next(calls) == at:
            raise Stop

    with ras.enabled(pipe, CONFIG):
        hook = pipe.transformer.transformer_blocks[1].ff.register_forward_pre_hook(stop)
        with pytest.raises(Stop):
            run(pipe, sd3_inputs(pipe, seed=5))
        hook.remove()
        assert torch.equal(run(pipe, sd3_inputs(pipe)), fresh(sd3_inputs))


@pytest.mark.parametrize("at", [0, 3, 5])
def test_interrupt(at):
    pipe = pipelines.sd3()

    def interrupt(pipe, step, t, tensors):
        pipe._interrupt = step == at
        return tensors

    with ras.enabled(pipe, CONFIG):
        run(pipe, sd3_inputs(pipe, seed=5), callback_on_step_end=interrupt)
        assert torch.equal(run(pipe, sd3_inputs(pipe)), fresh(sd3_inputs))


def test_callback_that_replaces_the_latents(monkeypatch):
    pipe = pipelines.sd3()

    def shift(pipe, step, t, tensors):
        return {"latents": tensors["latents"].roll(4, dims=-1)}

    check_run(monkeypatch, pipe, sd3_inputs(pipe, 2), callback_on_step_end=shift)


@pytest.mark.parametrize("text", [5, 30])
def test_callback_that_replaces_the_prompt(monkeypatch, text):
    """Another prompt from a sparse step on, shorter or longer: text is always computed anew."""
    pipe = pipelines.sd3()
    other = sd3_inputs(pipe, 2, text=text, seed=50)

    def reword(pipe, step, t, tensors):
        if step == 2:
            names = "negative_prompt_embeds", "prompt_embeds"
            tensors["prompt_embeds"] = torch.cat([other[name] for name in names])
        return tensors

    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, CONFIG):
        run(pipe, sd3_inputs(pipe, 2), callback_on_step_end=reword)
        sparse = SPARSE if steps_of(pipe) == (3, 5) else [s for s in SPARSE if s != 3]
    check(record, naive.NaiveSD3(pipe.transformer), sparse, planned=SPARSE)


def test_inference_mode_and_no_grad_take_turns():
    """What one run keeps for the next must not be bound to the mode it ran in."""
    pipe = pipelines.sd3()
    expected = fresh(sd3_inputs)
    with ras.enabled(pipe, CONFIG):
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(run(pipe, sd3_inputs(pipe)), expected)


@pytest.mark.parametrize("first", [0, 1])
def test_mode_changes_in_the_middle_of_a_run(first):
    """A loop by hand that enters and leaves inference mode from call to call."""
    pipe = pipelines.sd3()
    inputs, scheduler = sd3_inputs(pipe), pipelines.euler()
    modes = iter(([torch.no_grad, torch.inference_mode] * 5)[first:])

    class Alternating(torch.nn.Module):
        def forward(self, **kwargs):
            with next(modes)():
                return pipe.transformer(**kwargs)

    ras.enable(pipe.transformer, CONFIG, scheduler=scheduler)
    result = loop(Alternating(), scheduler, inputs)
    assert steps_of(pipe.transformer) == (3, 5)
    assert torch.equal(result, fresh(lambda pipe: inputs))


def test_enabling_again_replaces_the_configuration(monkeypatch):
    pipe = pipelines.sd3()
    record = Recorder(monkeypatch, pipe)
    ras.enable(pipe, sample_ratio=0.25, scheduler_start_step=6)
    assert ras.enable(pipe, CONFIG) is pipe
    run(pipe, sd3_inputs(pipe))
    assert steps_of(pipe) == (3, 5)
    assert record.rows[0].shape == (1, 32)
    check(record, naive.NaiveSD3(pipe.transformer))
    ras.disable(pipe)
    assert not ras.is_enabled(pipe)


@pytest.mark.parametrize("family", ["sd3", "lumina"])
def test_half_precision_runs_and_is_dense_at_ratio_one(family):
    pipe = getattr(pipelines, family)()
    pipe.to(torch.bfloat16)
    inputs = getattr(pipelines, f"{family}_inputs")(pipe, 2)
    inputs = {
        k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    expected = run(pipe, inputs)
    with ras.enabled(pipe, CONFIG, sample_ratio=1.0):
        assert torch.equal(run(pipe, inputs), expected)
    with ras.enabled(pipe, CONFIG):
        result = run(pipe, inputs)
        assert steps_of(pipe) == (3, 5)
    assert result.isfinite().all() and result.dtype == expected.dtype
    assert not torch.equal(result, expected)


def test_another_dtype_from_call_to_call():
    pipe = pipelines.sd3()
    halves = {k: v.bfloat16() if torch.is_tensor(v) else v for k, v in sd3_inputs(pipe, 2).items()}
    plain = pipelines.sd3()
    plain.to(torch.bfloat16)
    ras.enable(plain, CONFIG)
    expected = run(plain, halves)
    ras.enable(pipe, CONFIG)
    run(pipe, sd3_inputs(pipe, 2))
    pipe.to(torch.bfloat16)
    assert torch.equal(run(pipe, halves), expected)


def test_autocast():
    """Tokens come in float32, keys and values are kept in bfloat16."""
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe, 2)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(pipe, inputs)
        with ras.enabled(pipe, CONFIG, sample_ratio=1.0):
            assert torch.equal(run(pipe, inputs), expected)
        with ras.enabled(pipe, CONFIG):
            result = run(pipe, inputs)
            assert steps_of(pipe) == (3, 5)
    assert result.isfinite().all() and result.dtype == expected.dtype


# --- other processors -----------------------------------------------------------------------------


def run_noting_warnings(pipe, inputs, **call):
    """The result, and the RAS warnings' texts."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(pipe, inputs, **call)
    return result, [str(w.message) for w in caught if issubclass(w.category, ras.RASWarning)]


def test_fused_projections_after_enable(monkeypatch):
    """Either sparse and right, or dense with one warning; and dense again at the end."""
    pipe = pipelines.sd3()
    oracle = naive.NaiveSD3(pipe.transformer)
    inputs = sd3_inputs(pipe, 2)
    plain = run(pipe, inputs)
    record = Recorder(monkeypatch, pipe)
    ras.enable(pipe, CONFIG)
    pipe.transformer.fuse_qkv_projections()
    told = []
    for _ in range(2):
        record.clear()
        told += run_noting_warnings(pipe, inputs)[1]
        check(record, oracle, [] if told else SPARSE, planned=SPARSE[: len(record.rows)])
        assert steps_of(pipe) == ((8, 0) if told else (3, 5))
    assert len(told) <= 1
    ras.disable(pipe)
    pipe.transformer.unfuse_qkv_projections()
    for name, processor in pipe.transformer.attn_processors.items():
        assert type(processor).__module__.startswith("diffusers."), name
    assert relative_error(run(pipe, inputs), plain) < 1e-6


def test_fused_projections_before_enable(monkeypatch):
    pipe = pipelines.sd3()
    oracle = naive.NaiveSD3(pipe.transformer)
    pipe.transformer.fuse_qkv_projections()
    record = Recorder(monkeypatch, pipe)
    ras.enable(pipe, CONFIG)
    _, told = run_noting_warnings(pipe, sd3_inputs(pipe, 2))
    check(record, oracle, [] if told else SPARSE, planned=SPARSE[: len(record.rows)])
    assert len(told) <= 1


def ip_adapter_call(pipe):
    return sd3_inputs(pipe, ip_adapter_image_embeds=normal(2, 3, 8, seed=9))


def test_ip_adapter_is_refused():
    pipe = pipelines.sd3()
    pipe.load_ip_adapter(pipelines.ip_adapter(pipe.transformer), image_encoder_folder=None)
    with pytest.raises(ValueError, match=r"SD3IPAdapterJointAttnProcessor2_0|IP-Adapter"):
        ras.enable(pipe, CONFIG)
    assert not ras.is_enabled(pipe)


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


# --- warnings -------------------------------------------------------------------------------------


def test_run_too_short_for_a_sparse_step():
    """A 4-step run with the default start step is dense and says so once."""
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe)
    plain = run(pipe, inputs, steps=4)
    ras.enable(pipe, ras.RASConfig.paper())
    result, told = run_noting_warnings(pipe, inputs, steps=4)
    _, told_again = run_noting_warnings(pipe, inputs, steps=4)
    assert torch.equal(result, plain)
    assert len(told) == 1 and not told_again
    assert ras.stats(pipe).warnings == tuple(told) and steps_of(pipe) == (4, 0)
    ras.enable(pipe, ras.RASConfig.paper())
    assert len(run_noting_warnings(pipe, inputs, steps=4)[1]) == 1


# --- a bare transformer ---------------------------------------------------------------------------


def by_keyword(transformer, latents, text, pooled, t):
    return transformer(
        hidden_states=latents,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=t,
        return_dict=False,
    )[0]


def by_position(transformer, latents, text, pooled, t):
    return transformer(latents, text, pooled, t).sample


def loop(
    transformer,
    scheduler,
    inputs,
    steps=STEPS,
    guidance=4.0,
    step=None,
    call=by_keyword,
    separate=False,
):
    """Sampling by hand, with one call of the transformer for both branches or with two."""
    text = torch.cat([inputs["negative_prompt_embeds"], inputs["prompt_embeds"]])
    pooled = torch.cat([inputs["negative_pooled_prompt_embeds"], inputs["pooled_prompt_embeds"]])
    step = step or (lambda noise, t, x: scheduler.step(noise, t, x, return_dict=False)[0])
    scheduler.set_timesteps(steps)
    latents = inputs["latents"]
    for t in scheduler.timesteps:
        if separate:
            parts = list(zip(text.chunk(2), pooled.chunk(2)))
            noise = [call(transformer, latents, *part, t.expand(len(latents))) for part in parts]
            without, given = noise
        else:
            both = torch.cat([latents, latents])
            without, given = call(transformer, both, text, pooled, t.expand(len(both))).chunk(2)
        latents = step(without + guidance * (given - without), t, latents)
    return latents


@pytest.mark.parametrize("call", [by_keyword, by_position])
def test_bare_transformer(call):
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe, 2)
    transformer = pipe.transformer
    scheduler = pipelines.euler()
    assert ras.enable(transformer, CONFIG, scheduler=scheduler) is transformer
    result = loop(transformer, scheduler, inputs, call=call)
    assert steps_of(transformer) == (3, 5)
    ras.disable(transformer)
    assert torch.equal(result, fresh(lambda pipe: inputs))


def test_steps_that_are_not_seen():
    """The user's own Euler step: nothing is known of the noise, so all is dense, with a warning."""
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe)
    scheduler = pipelines.euler()

    def own_step(noise, t, latents):
        i = (scheduler.timesteps == t).nonzero().item()
        return latents + (scheduler.sigmas[i + 1] - scheduler.sigmas[i]) * noise

    plain = loop(pipe.transformer, scheduler, inputs, step=own_step)
    ras.enable(pipe.transformer, CONFIG, scheduler=scheduler)
    for expected_warnings in (1, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = loop(pipe.transformer, scheduler, inputs, step=own_step)
        told = [w for w in caught if issubclass(w.category, ras.RASWarning)]
        assert len(told) == expected_warnings
        assert relative_error(result, plain) < 1e-5
        assert ras.stats(pipe.transformer).steps_sparse == 0


def test_two_calls_of_one_branch_in_a_step():
    """Guidance in two calls that cannot be told apart: dense and right, with one warning."""
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe, 2)
    scheduler = pipelines.euler()
    plain = loop(pipe.transformer, scheduler, inputs, separate=True)
    ras.enable(pipe.transformer, CONFIG, scheduler=scheduler)
    with pytest.warns(ras.RASWarning) as told:
        result = loop(pipe.transformer, scheduler, inputs, separate=True)
    assert len([w for w in told if issubclass(w.category, ras.RASWarning)]) == 1
    assert relative_error(result, plain) < 1e-5


def test_gradients_are_those_of_the_plain_model():
    """With gradients enabled `ras` stands aside."""
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe)
    transformer, scheduler = pipe.transformer, pipe.scheduler

    def gradients():
        with torch.enable_grad():
            loop(transformer, scheduler, inputs, steps=6).square().mean().backward()
        found = {name: p.grad for name, p in transformer.named_parameters()}
        transformer.zero_grad()
        return found

    plain = gradients()
    with ras.enabled(pipe, CONFIG), warnings.catch_warnings():
        warnings.simplefilter("ignore", ras.RASWarning)
        found = gradients()
    for name, gradient in plain.items():
        assert (gradient is None) == (found[name] is None), name
        assert gradient is None or torch.equal(found[name], gradient), name


@pytest.mark.parametrize("family", ["sd3", "lumina"])
def test_the_noise_handed_out_is_the_callers_own(family):
    """Writing into a result changes nothing that `ras` keeps (patch 1: no copy on the way out)."""
    pipe = getattr(pipelines, family)(patch_size=1)
    inputs = getattr(pipelines, f"{family}_inputs")(pipe, height=8, width=8)

    def spoil(module, args, kwargs, output):
        spoiled = output[0].clone()
        output[0].fill_(float("nan"))
        return (spoiled,)

    with ras.enabled(pipe, CONFIG):
        expected = run(pipe, inputs)
        hook = pipe.transformer.register_forward_hook(spoil, with_kwargs=True)
        result = run(pipe, inputs)
        hook.remove()
    assert torch.equal(result, expected)


def test_decoded_image():
    """All the way to pixels, with prompts as text."""
    pipe = pipelines.sd3(parts=pipelines.text_encoders(), vae=pipelines.autoencoder())
    call = dict(prompt="a red ring", max_sequence_length=4, **pipelines.size(16, 16))
    with ras.enabled(pipe, CONFIG) as enabled:
        assert enabled is pipe and isinstance(pipe, StableDiffusion3Pipeline)
        (image,) = run(pipe, call)
    assert image.size == (128, 128)
