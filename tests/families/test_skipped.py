"""Steps that compute nothing, in whole runs.

The same run is made with the oracle in the place of the transformer.
"""

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from support import pipelines
from support.oracle import relative_error
from support.pipelines import sd3_inputs
from support.runs import DENSE_STEPS, SHARES, by_oracle, loop, of_plan, run

import ras

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]

HEUN = FlowMatchHeunDiscreteScheduler


def skipping(family="sd3", batch=1, scheduler=pipelines.euler, shares=SHARES, **call):
    """What a run with the plan gives, what the oracle's gives, and the statistics."""
    pipe = getattr(pipelines, family)(scheduler=scheduler())
    inputs = getattr(pipelines, f"{family}_inputs")(pipe, batch)
    plain = getattr(pipelines, family)(scheduler=scheduler())
    by_oracle(plain, of_plan(shares), extrapolation=0.62)
    expected = run(plain, inputs, len(shares), **call)
    with ras.enabled(pipe, plan=shares, extrapolation=0.62):
        result = run(pipe, inputs, len(shares), **call)
        stats = ras.stats(pipe)
    return result, expected, stats


@pytest.mark.parametrize("scheduler", [pipelines.euler, HEUN])
@pytest.mark.parametrize("family, batch, guidance", [("sd3", 1, 1.0), ("sd3", 2, 4.0)])
def test_skipped_steps(family, batch, guidance, scheduler):
    result, expected, stats = skipping(family, batch, scheduler, guidance=guidance)
    assert relative_error(result, expected) < 1e-5
    order, copies = scheduler().order, batch * (2 if guidance > 1 else 1)
    calls, computed = 8 * order - (order - 1), 4 * order
    assert (stats.steps_dense, stats.steps_sparse, stats.steps_skipped) == (4, 0, 4)
    assert (stats.tokens_computed, stats.tokens_total) == (
        copies * 64 * computed,
        copies * 64 * calls,
    )
    assert (stats.text_tokens, stats.text_tokens_total) == (
        copies * 12 * computed,
        copies * 12 * calls,
    )
    assert stats.speedup_ceiling == calls / computed
    assert torch.equal(stats.region_counts, torch.full((batch, 8, 8), computed))
    assert stats.plan.shares == SHARES and stats.steps_planned == 8 and stats.warnings == ()


@pytest.mark.parametrize("batch, guidance", [(1, 1.0), (3, 4.0)])
@pytest.mark.parametrize("scheduler", [pipelines.euler, HEUN])
def test_skipped_steps_of_lumina(scheduler, batch, guidance):
    result, expected, stats = skipping("lumina", batch, scheduler, guidance=guidance)
    assert relative_error(result, expected) < 1e-5
    assert (stats.steps_dense, stats.steps_skipped) == (4, 4)
    copies = batch * (2 if guidance > 1 else 1)
    assert stats.tokens_computed == copies * 64 * 4 * scheduler().order
    assert (stats.text_tokens, stats.text_tokens_total) == (0, 0)


@pytest.mark.parametrize("return_dict", [True, False])
def test_skipped_steps_in_a_loop_by_hand(return_dict):
    """No pipeline at all: the transformer is called with and without a dict to return."""

    def call(transformer, latents, text, pooled, t):
        output = transformer(latents, text, pooled, t, return_dict=return_dict)
        assert isinstance(output, Transformer2DModelOutput if return_dict else tuple)
        return output.sample if return_dict else output[0]

    pipe = pipelines.sd3()
    inputs, plain = sd3_inputs(pipe, 2), pipelines.sd3()
    by_oracle(plain, of_plan(SHARES), extrapolation=0.62)
    expected = loop(plain.transformer, plain.scheduler, inputs, call=call)
    scheduler = pipelines.euler()
    ras.enable(pipe.transformer, plan=SHARES, extrapolation=0.62, scheduler=scheduler)
    result = loop(pipe.transformer, scheduler, inputs, call=call)
    stats = ras.stats(pipe.transformer)
    ras.disable(pipe.transformer)
    assert relative_error(result, expected) < 1e-5
    assert (stats.steps_dense, stats.steps_skipped) == (4, 4)


def test_factors_of_a_plan_count_for_their_steps():
    shares, factors = (1, 1, 0, 0, 1, 0), (0, 0, 0.3, 1.0, 0, 0)
    pipe, plain = pipelines.sd3(), pipelines.sd3()
    inputs = sd3_inputs(pipe)
    by_oracle(plain, of_plan(shares), factors)
    with ras.enabled(pipe, plan=ras.Plan(shares, factors)):
        assert relative_error(run(pipe, inputs, 6), run(plain, inputs, 6)) < 1e-5


def test_held_noise_in_skipped_steps():
    pipe, plain = pipelines.sd3(), pipelines.sd3()
    inputs = sd3_inputs(pipe)
    by_oracle(plain, of_plan(SHARES))
    with ras.enabled(pipe, plan=SHARES, extrapolation=0):
        assert torch.equal(run(pipe, inputs), run(plain, inputs))


def test_skipped_steps_do_not_run_the_model():
    pipe = pipelines.sd3()
    entered, seen = [], []
    pipe.transformer.pos_embed.register_forward_hook(lambda *_: entered.append(len(seen)))
    pipe.transformer.register_forward_hook(lambda *_: seen.append(0))
    with ras.enabled(pipe, plan=SHARES):
        run(pipe, sd3_inputs(pipe))
    assert entered == list(DENSE_STEPS) and len(seen) == 8


def test_guidance_cut_off_at_a_skipped_step():
    """There is no noise of half the batch to reuse: the step is dense instead."""
    pipe = pipelines.sd3()

    def cut(pipe, step, t, tensors):
        if step == 3:
            pipe._guidance_scale = 0.0
            tensors = {name: value.chunk(2)[-1] for name, value in tensors.items()}
        return tensors

    names = ["prompt_embeds", "pooled_prompt_embeds"]
    with ras.enabled(pipe, plan=SHARES):
        run(
            pipe,
            sd3_inputs(pipe, 2),
            callback_on_step_end=cut,
            callback_on_step_end_tensor_inputs=names,
        )
        stats = ras.stats(pipe)
    assert (stats.steps_dense, stats.steps_skipped) == (5, 3)


@pytest.mark.parametrize("partial", [0.0, 0.25])
def test_skip_layer_guidance_with_skipped_steps(partial):
    """Its branch reuses its own noise, and computes where it has none yet."""
    pipe = pipelines.sd3()
    calls = []
    hook = pipe.transformer.transformer_blocks[0].norm1.register_forward_hook
    with ras.enabled(pipe, plan=(1, 1, partial, 1, 0, 0, 1, 0)):
        hook(lambda *_: calls.append(0))
        result = run(
            pipe,
            sd3_inputs(pipe),
            skip_guidance_layers=[1],
            skip_layer_guidance_start=0.01,
            skip_layer_guidance_stop=0.7,
        )
        stats = ras.stats(pipe)
    assert result.isfinite().all()
    assert (stats.steps_dense, stats.steps_sparse) == (4, int(partial > 0))
    # 1 to 5 have a second call, which is dense in a partial step
    assert len(calls) == 4 + 2 + 2 * (partial > 0)
