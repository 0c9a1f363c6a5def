"""The method that a plan puts in the place of `forward`: wrapped, copied, and gone again."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from support import pipelines
from support.oracle import relative_error
from support.pipelines import sd3_inputs
from support.runs import DENSE_STEPS, SHARES, run

import ras

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]


def test_forward_is_back():
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe)
    expected = run(pipe, inputs)
    with ras.enabled(pipe, plan=SHARES):
        assert not torch.equal(run(pipe, inputs), expected)
        ras.enable(pipe, plan=SHARES)  # again, without a disable between
    assert "forward" not in vars(pipe.transformer)
    assert torch.equal(run(pipe, inputs), expected)


def test_a_call_that_fails_on_its_way():
    """It puts nothing on top of a wrapper, so that nothing is left when both are gone."""
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe)
    ras.enable(pipe, plan=SHARES)
    ours = pipe.transformer.forward

    def broken(*args, **kwargs):
        raise RuntimeError("on its way")

    pipe.transformer.forward = broken
    told = pytest.warns(ras.RASWarning, match="stands in for forward")
    with told, pytest.raises(RuntimeError, match="on its way"):
        run(pipe, inputs)
    assert pipe.transformer.forward is broken
    pipe.transformer.forward = ours
    run(pipe, inputs)
    ras.disable(pipe)
    assert "forward" not in vars(pipe.transformer)


class Counting(ModelHook):
    """A hook of accelerate's, as offloading has them."""

    def __init__(self):
        self.calls = []

    def pre_forward(self, module, *args, **kwargs):
        self.calls.append(0)
        return args, kwargs


def wrap(transformer):
    """Have something in the place of `forward` that calls what was there."""
    hook = Counting()
    add_hook_to_module(transformer, hook)
    return SimpleNamespace(forward=transformer.forward, calls=hook.calls)


def test_a_wrapper_that_was_there_before():
    """It runs where something is computed, and is back after `disable`."""
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe)
    wrapper = wrap(pipe.transformer)
    expected = run(pipe, inputs)
    wrapper.calls.clear()
    with ras.enabled(pipe, plan=SHARES):
        run(pipe, inputs)
        assert len(wrapper.calls) == len(DENSE_STEPS)
    assert pipe.transformer.forward is wrapper.forward
    assert torch.equal(run(pipe, inputs), expected)


def test_a_wrapper_put_on_top():
    """It stays when `ras` goes, and reaches the plain model; taken off, it leaves that."""
    pipe, plain = pipelines.sd3(), pipelines.sd3()
    inputs = sd3_inputs(pipe)
    expected = run(plain, inputs)
    ras.enable(pipe, plan=SHARES)
    ours = pipe.transformer.forward
    wrapper = wrap(pipe.transformer)
    with ras.enabled(plain, plan=SHARES):
        assert torch.equal(run(pipe, inputs), run(plain, inputs))
    assert len(wrapper.calls) == 8
    ras.disable(pipe)
    assert pipe.transformer.forward is wrapper.forward
    assert torch.equal(run(pipe, inputs), expected)
    pipe.transformer.forward = ours
    assert torch.equal(run(pipe, inputs), expected)
    with ras.enabled(pipe, plan=SHARES):
        run(pipe, inputs)
        assert ras.stats(pipe).steps_skipped == 4
    assert torch.equal(run(pipe, inputs), expected)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("ran", [False, True])
def test_copy_of_an_enabled_transformer(ran, wrapped):
    """It runs by itself, also where the one it was copied from has been disabled."""
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe, 2)
    call = dict(
        hidden_states=inputs["latents"],
        encoder_hidden_states=inputs["prompt_embeds"],
        pooled_projections=inputs["pooled_prompt_embeds"],
        timestep=torch.full((2,), 500.0),
        return_dict=False,
    )
    expected = pipe.transformer(**call)[0]
    if wrapped:
        wrap(pipe.transformer)
    ras.enable(pipe, plan=SHARES)
    if ran:
        run(pipe, inputs)
    twin = copy.deepcopy(pipe.transformer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ras.RASWarning)
        assert relative_error(twin(**call)[0], expected) < 1e-5
        before = run(pipe, inputs)
        ras.disable(pipe)
        assert relative_error(twin(**call)[0], expected) < 1e-5
    with torch.no_grad():
        twin.proj_out.weight.zero_()  # the copy has weights of its own
    assert torch.equal(pipe.transformer(**call)[0], expected)
    with ras.enabled(pipe, plan=SHARES):
        assert torch.equal(run(pipe, inputs), before)
