"""Partial steps whose attention goes another way than through the seam."""

import pytest
import torch
from support.by_seam import PLAN, build, by_ras
from support.offloading import no_streams

import ras

NAMES = pytest.mark.parametrize("name", ["flux", "qwen"])

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]


@pytest.fixture(autouse=True)
def streams_of_nothing(monkeypatch):
    no_streams(monkeypatch)


def go_round(attn):
    """Have a layer attend as diffusers does, whatever stands for its processor."""
    original = attn.processor.ras_original
    attn.forward = lambda hidden_states, encoder_hidden_states=None, **kw: original(
        attn, hidden_states, encoder_hidden_states, **kw
    )


@pytest.mark.parametrize("after", [None, 1, 3])
@NAMES
def test_attention_that_is_not_seen(name, after):
    """Before a run, or in its midst: steps are dense then, with one warning, not wrong."""
    pipe, call = build(name)
    ras.enable(pipe, plan=PLAN)
    attn = pipe.transformer.transformer_blocks[1].attn
    if after is None:
        go_round(attn)

    def later(pipe, step, time, tensors):
        if step == after:
            go_round(attn)
        return {}

    outputs = []
    pipe.transformer.register_forward_hook(lambda *call: outputs.append(call[-1][0].shape))
    told = "stands in for forward" if after is None else "not where RAS looks"
    with pytest.warns(ras.RASWarning, match=told) as warned:
        call(len(PLAN), callback_on_step_end=later)
    assert len([w for w in warned if issubclass(w.category, ras.RASWarning)]) == 1
    assert len(set(outputs)) == 1
    del attn.forward
    ras.enable(pipe, plan=PLAN)
    assert torch.equal(call(len(PLAN)), by_ras(name))


@NAMES
def test_a_partial_step_that_is_not_seen_is_computed_again(name):
    """All of its tokens are what the dense step gives."""
    pipe, call = build(name)
    dense, plan = call(3), (1, 1, 0.5)
    ras.enable(pipe, plan=plan)
    attn = pipe.transformer.transformer_blocks[1].attn

    def later(pipe, step, time, tensors):
        if step == 1:
            go_round(attn)
        return {}

    with pytest.warns(ras.RASWarning, match="not where RAS looks"):
        assert torch.equal(call(3, callback_on_step_end=later), dense)


class Calls:
    """Notes each call's conditioning and output."""

    def __init__(self, pipe):
        self.made = []
        pipe.transformer.register_forward_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs, output):
        text = kwargs["encoder_hidden_states"].double().sum().item()
        self.made.append((text, output[0].clone()))

    def outputs(self, text):
        return [output for other, output in self.made if other == text]


@pytest.mark.parametrize("missed", [0, 1])
@pytest.mark.parametrize("plan", [(1, 0, 0.5, 1), (1, 0.5, 0, 1)])
def test_branches_stay_apart_where_partial_steps_end(plan, missed):
    """Guidance's two calls: a skipped call gives what its own branch last gave, held."""
    pipe, call = build("qwen")
    calls = Calls(pipe)
    ras.enable(pipe, plan=plan, extrapolation=0)
    count, attn = iter(range(100)), pipe.transformer.transformer_blocks[1].attn

    def begin(*_):
        if next(count) == missed:
            go_round(attn)

    pipe.transformer.register_forward_pre_hook(begin)
    with pytest.warns(ras.RASWarning, match="not where RAS looks"):
        call(len(plan))
    texts = list(dict.fromkeys(text for text, _ in calls.made))
    assert len(texts) == 2
    for skipped in (step for step, share in enumerate(plan) if not share):
        for text, other in (texts, texts[::-1]):
            held, found = calls.outputs(text)[skipped - 1 : skipped + 1]
            strange = calls.outputs(other)[skipped - 1]
            assert torch.equal(found, held) or not torch.equal(found, strange)


def test_branches_stay_apart_where_there_is_no_room():
    pipe, call = build("qwen")
    calls = Calls(pipe)
    ras.enable(pipe, plan=(1, 0.1, 0.1, 0.1, 0.1, 0.1), max_cache_bytes=1, extrapolation=0)
    with pytest.warns(ras.RASWarning, match="max_cache_bytes"):
        call(6)
    first, second = list(dict.fromkeys(text for text, _ in calls.made))
    assert not torch.equal(calls.outputs(first)[1], calls.outputs(second)[0])
    assert ras.stats(pipe).calls_computed % 2 == 1  # the first branch had been let go of
