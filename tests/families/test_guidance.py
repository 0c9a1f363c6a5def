"""Guidance that ends in mid-run, skips layers, or is off."""

import pytest
from diffusers import FlowMatchHeunDiscreteScheduler
from support import pipelines
from support.pipelines import Recorder, sd3_inputs
from support.runs import (
    CONFIG,
    SPARSE,
    STEPS,
    check,
    check_run,
    run,
    steps_of,
)

import ras

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]


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
    check(record, pipe.transformer, sparse, planned=SPARSE)


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
    check(record, pipe.transformer, [2, 4, 6, 7], planned=SPARSE, order=2)


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
    check(record, pipe.transformer)
