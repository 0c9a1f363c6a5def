"""Enabled models that are copied, pickled, saved and cast: plain copies, or one clear error."""

import copy
import functools
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from support import pipelines
from support.oracle import relative_error
from support.pipelines import sd3_inputs
from support.runs import run
from support.zoo import ENTRIES

import ras
from ras.mount import Mount
from ras.site import RASAttnProcessor

PLAN = (1, 1, 0.5, 0, 1, 0.25, 0.5, 0)
STEPS = len(PLAN)
NAMES = pytest.mark.parametrize("name", ["sd3", "lumina", "flux", "qwen", "wan22"])
PARTS = pytest.mark.parametrize("part", ["pipe", "transformer", "block", "leave"])

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]


def built(name, **settings):
    """A pipeline that is enabled, and what draws with it or with another one."""
    pipe, call = ENTRIES[name].build()
    ras.enable(pipe, **(settings or dict(plan=PLAN)))
    return pipe, functools.partial(call, STEPS)


def part_of(pipe, part):
    transformer = pipe.transformer
    blocks = next(each for each in transformer.children() if isinstance(each, torch.nn.ModuleList))
    layers = [each for each in transformer.modules() if isinstance(each, torch.nn.Linear)]
    return dict(pipe=pipe, transformer=transformer, block=blocks[0], leave=layers[-1])[part]


def check_plain(module):
    """Nothing of ours is in what a module has, or the modules within it."""
    for inner in module.modules():
        hooks = [*inner._forward_pre_hooks.values(), *inner._forward_hooks.values()]
        flags = [*inner._forward_pre_hooks_with_kwargs, *inner._forward_hooks_with_kwargs]
        assert not hooks and not flags and not inner._forward_hooks_always_called
        assert not isinstance(getattr(inner, "processor", None), RASAttnProcessor)
        own = {name: value for name, value in vars(inner).items() if name != "processor"}
        assert not [name for name, value in own.items() if isinstance(value, Mount)]
        assert not {"forward", "_reset_stateful_cache", "__deepcopy__"} & own.keys()


@NAMES
def test_a_deep_copy_is_plain(name):
    """Of the pipeline, before a run and in the midst of one, which goes on as if it were not."""
    pipe, draw = built(name)
    expected, copies = draw(), [copy.deepcopy(pipe)]

    def copied(pipe, step, t, tensors):
        if step == 3:
            copies.append(copy.deepcopy(pipe))
        return tensors

    assert torch.equal(draw(callback_on_step_end=copied), expected)
    ras.disable(pipe)
    dense = draw()
    for other in copies:
        assert not ras.is_enabled(other)
        check_plain(other.transformer)
        assert torch.equal(draw(on=other), dense)
        ras.enable(other, plan=PLAN)
        assert torch.equal(draw(on=other), expected)
    assert len(copies) == 2 and not ras.is_enabled(pipe)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_deep_copy_of_a_transformer(name):
    pipe, draw = built(name)
    expected, other = draw(), copy.deepcopy(pipe.transformer)
    check_plain(other)
    assert ras.is_enabled(pipe) and torch.equal(draw(), expected)
    ras.disable(pipe)
    dense, pipe.transformer = draw(), other
    assert torch.equal(draw(), dense)


class Counting(ModelHook):
    """A hook of accelerate's, as offloading has them."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        Counting.calls += 1
        return args, kwargs


def test_a_copy_keeps_what_others_have_put_there():
    """As it does without RAS: what lay beneath is the copy's own."""
    pipe, call = ENTRIES["flux"].build()
    add_hook_to_module(pipe.transformer, Counting())
    ras.enable(pipe, plan=PLAN)
    other = copy.deepcopy(pipe)
    assert "forward" in vars(other.transformer) and other.transformer._hf_hook is not None
    Counting.calls = 0
    call(STEPS, on=other)
    assert Counting.calls == STEPS
    Counting.calls = 0
    call(STEPS)
    assert Counting.calls == STEPS - PLAN.count(0)


@PARTS
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_pickles(name, part):
    """Refused where there is something of ours in it, in so many words; and nothing has changed."""
    pipe, draw = built(name)
    expected, thing = draw(), part_of(pipe, part)
    for dump in (pickle.dumps, ForkingPickler.dumps, lambda it: torch.save(it, io.BytesIO())):
        if part in ("pipe", "transformer", "leave"):
            with pytest.raises(pickle.PicklingError, match=r"is enabled.*ras\.disable first"):
                dump(thing)
        else:  # hooks are elsewhere, and processors are pickled as what they stand for
            dump(thing)
    assert ras.is_enabled(pipe) and torch.equal(draw(), expected)
    ras.disable(pipe)
    dense = draw()
    plain = pickle.loads(pickle.dumps(pipe))
    check_plain(plain.transformer)
    assert torch.equal(draw(on=plain), dense)


def test_a_block_is_pickled_as_it_is_without():
    pipe, _ = built("flux")
    block = pickle.loads(pickle.dumps(pipe.transformer.transformer_blocks[0]))
    check_plain(block)
    assert type(block.attn.processor).__name__ == "FluxAttnProcessor"


@NAMES
def test_saved_as_it_is_without(name, tmp_path):
    """`state_dict` and `save_pretrained`, of a transformer that has run."""
    pipe, draw = built(name)
    draw()
    transformer = pipe.transformer
    transformer.save_pretrained(tmp_path / "enabled")
    state = {key: value.clone() for key, value in transformer.state_dict().items()}
    ras.disable(pipe)
    transformer.save_pretrained(tmp_path / "plain")
    assert list(state) == list(transformer.state_dict())
    for file in (tmp_path / "plain").iterdir():
        assert file.read_bytes() == (tmp_path / "enabled" / file.name).read_bytes()
    dense = draw()
    pipe.transformer = type(transformer).from_pretrained(tmp_path / "enabled")
    check_plain(pipe.transformer)
    assert relative_error(draw(), dense) < 1e-5


@NAMES
def test_cast_and_cast_back(name):
    """Between runs; weights have lost digits, and what follows is as if they had never had them."""
    (pipe, draw), (fresh, other) = built(name), ENTRIES[name].build()
    draw()
    for each in (pipe, fresh):
        each.to(torch.bfloat16), each.to(torch.float32)
    ras.enable(fresh, plan=PLAN)
    assert torch.equal(draw(), other(STEPS))


def test_cast():
    """Caches are of the dtype that the model has in each run."""
    pipe = pipelines.sd3()
    inputs, low = sd3_inputs(pipe, 1), {}
    for name, value in inputs.items():
        low[name] = value.bfloat16() if isinstance(value, torch.Tensor) else value
    ras.enable(pipe, plan=PLAN)
    run(pipe, inputs)
    high = ras.stats(pipe).cache_bytes
    pipe.to(torch.bfloat16)
    result, fresh = run(pipe, low), pipelines.sd3().to(torch.bfloat16)
    assert (
        0.4 < ras.stats(pipe).cache_bytes / high < 0.6
    )  # what regions are chosen by stays as it is
    ras.enable(fresh, plan=PLAN)
    assert torch.equal(result, run(fresh, low))


def test_a_scheduler_that_is_copied_or_pickled():
    """It steps as before, and tells nobody."""
    pipe, draw = built("flux")
    expected = draw()
    for other in (copy.deepcopy(pipe.scheduler), pickle.loads(pickle.dumps(pipe.scheduler))):
        other.set_timesteps(4)
        x = torch.ones(1, 4)
        stepped = other.step(x, other.timesteps[0], x, return_dict=False)[0]
        assert stepped.isfinite().all() and not torch.equal(stepped, x)
        assert ras.stats(pipe).runs == 1
    assert torch.equal(draw(), expected)
