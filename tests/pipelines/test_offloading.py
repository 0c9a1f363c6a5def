"""`ras` with weights that are elsewhere, or other than they seem, until a layer is called.

The oracle of offloading and of layerwise casting is `ras` on the same weights without them. Here
they go from the CPU to the CPU, and what is loaded when is counted; on a GPU they do what they are
for.
"""

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload
from diffusers.hooks import group_offloading
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook
from support import pipelines
from support.offloading import FP8, WAYS, casting, no_streams
from support.operands import DEVICE
from support.oracle import relative_error
from support.pipelines import sd3_inputs
from support.runs import load_lora, loop, lora, run
from support.weights import FAMILIES, PLAN, expected_of, moved, round_trip

import ras

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]
SKIPPED = (1, 4)
STEPS_OF_PLAN = (3, 3, 2)

LOADS = [  # what brings weights to where, or to what, they are needed as
    (CpuOffload, "pre_forward"),
    (AlignDevicesHook, "pre_forward"),
    (group_offloading.ModuleGroup, "onload_"),
    (LayerwiseCastingHook, "pre_forward"),
]


@pytest.fixture(autouse=True)
def streams_of_nothing(monkeypatch):
    no_streams(monkeypatch)


@pytest.fixture
def loads(monkeypatch):
    """The step, or call of the transformer, in which each load happened, from now on."""
    seen, calls = [], [-1]

    def watch(cls, name):
        load = getattr(cls, name)

        def watched(hook, *args, **kwargs):
            if getattr(hook, "offload", True):  # not accelerate's that only moves tokens
                seen.append(calls[0])
            return load(hook, *args, **kwargs)

        monkeypatch.setattr(cls, name, watched)

    for cls, name in LOADS:
        watch(cls, name)

    def begin(pipe):
        """To be told of calls by the pipeline's transformer."""
        seen.clear()
        calls[0] = -1
        pipe.transformer.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        return seen

    return begin


def blocks_of(pipe):
    transformer = pipe.transformer
    return getattr(transformer, "transformer_blocks", None) or transformer.layers


# --- offloading and casting -----------------------------------------------------------------------


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["sd3", "lumina"])
def test_offloaded(family, way, order, loads):
    """The result is that without offloading, run after run; skipped steps load nothing."""
    expected, plain = expected_of(family, way)
    pipe, inputs = FAMILIES[family]()
    inputs = moved(inputs)
    ran = []
    blocks_of(pipe)[0].norm1.register_forward_hook(lambda *_: ran.append(0))
    if order == "before":
        WAYS[way](pipe)
        ras.enable(pipe, plan=PLAN)
    else:
        ras.enable(pipe, plan=PLAN)
        WAYS[way](pipe)
    seen = loads(pipe)
    for _ in range(3):
        ran.clear()
        result = run(pipe, inputs, len(PLAN))
        assert relative_error(result, expected) < 1e-5
        stats = ras.stats(pipe)
        found = stats.steps_dense, stats.steps_sparse, stats.steps_skipped
        assert found == STEPS_OF_PLAN and len(ran) == len(PLAN) - len(SKIPPED)
    loaded = [seen.count(call) for call in range(3 * len(PLAN))]
    for call, count in enumerate(loaded):
        if call % len(PLAN) not in SKIPPED:
            assert count, call
        elif order == "before":
            # model offloading comes back, on top, between runs
            assert count <= (way == "model" and call >= len(PLAN)), call
        else:  # what came last, on top, is asked for what does not belong to any block
            assert count <= 1 + way.endswith("streams"), call
    ras.disable(pipe)
    seen.clear()
    assert relative_error(run(pipe, inputs, len(PLAN)), plain) < 1e-5
    assert set(seen) == set(range(3 * len(PLAN), 4 * len(PLAN)))
    check_stored(pipe, way)


def check_stored(pipe, way):
    """The weights are back where, and as what, they wait."""
    weights = dict(pipe.transformer.named_parameters())
    place = {"sequential": "meta", "float8": DEVICE, "bfloat16": DEVICE}.get(way, "cpu")
    assert {weight.device.type for weight in weights.values()} == {place}
    stored = {"float8": FP8, "bfloat16": torch.bfloat16}.get(way, torch.float32)
    for name, weight in weights.items():
        if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight")):
            assert weight.dtype == stored, name


@pytest.mark.parametrize("way", ["model", "sequential", "blocks", "leaves", "blocks-streams"])
def test_taken_off_and_put_on_while_enabled(way):
    """Hooks that come and go between runs, and another kind of them after."""
    expected, plain = expected_of("sd3", way)
    pipe, inputs = FAMILIES["sd3"]()
    inputs = moved(inputs)
    ras.enable(pipe, plan=PLAN)
    WAYS[way](pipe)
    run(pipe, inputs, len(PLAN))
    pipe.remove_all_hooks()
    if way in ("model", "sequential"):  # diffusers has no way to take group offloading off
        pipe.to(DEVICE)
        for _ in range(2):
            assert relative_error(run(pipe, inputs, len(PLAN)), expected) < 1e-5
            assert ras.stats(pipe).steps_skipped == 2
        WAYS["blocks"](pipe)
    for _ in range(2):
        assert relative_error(run(pipe, inputs, len(PLAN)), expected) < 1e-5
        assert ras.stats(pipe).steps_skipped == 2
    ras.disable(pipe)
    assert relative_error(run(pipe, inputs, len(PLAN)), plain) < 1e-5


@pytest.mark.parametrize("way", ["model", "sequential", "leaves", "blocks", "float8"])
def test_enabled_again_and_again(way):
    """Nothing piles up on the transformer."""
    expected, plain = expected_of("sd3", way)
    pipe, inputs = FAMILIES["sd3"]()
    inputs = moved(inputs)
    WAYS[way](pipe)

    def depth():
        count, forward = 0, pipe.transformer.forward
        while forward is not None:
            count, forward = count + 1, getattr(forward, "__wrapped__", None)
        return count

    run(pipe, inputs, len(PLAN))
    before = depth()
    for _ in range(3):
        with ras.enabled(pipe, plan=PLAN):
            for _ in range(2):
                assert relative_error(run(pipe, inputs, len(PLAN)), expected) < 1e-5
        assert depth() == before
    assert relative_error(run(pipe, inputs, len(PLAN)), plain) < 1e-5


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_on_layerwise_cast_layers(order):
    """Each adapter's own layers compute in the compute dtype, beside stored ones of another."""
    pipe, plain = pipelines.sd3(), pipelines.sd3().to(DEVICE)
    round_trip(plain, torch.bfloat16)
    state, _ = lora(pipe.transformer, 1000)
    inputs = moved(sd3_inputs(pipe, 2))
    load_lora(plain, state)
    with ras.enabled(plain, plan=PLAN):
        expected = run(plain, inputs, len(PLAN))
    casting(torch.bfloat16)(pipe)
    if order == "before":
        load_lora(pipe, state)
    ras.enable(pipe, plan=PLAN)
    if order == "after":
        load_lora(pipe, state)
    # peft casts what is loaded later to what the layer stores
    assert relative_error(run(pipe, inputs, len(PLAN)), expected) < 0.02
    assert ras.stats(pipe).steps_sparse == 3


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: there is one device here")
@pytest.mark.parametrize("settings", [dict(plan=PLAN), dict(plan=(1, 1, 0, 1, 0, 1, 0, 1))])
@pytest.mark.parametrize("way", ["model", "sequential"])
def test_latents_that_are_elsewhere(way, settings):
    """Offloading moves a bare transformer's inputs to the GPU: it works, or says what is where."""
    pipe, inputs = FAMILIES["sd3"]()
    with ras.enabled(pipe, **settings):
        expected = run(pipe, inputs, len(PLAN))
    if way == "model":
        accelerate.cpu_offload_with_hook(pipe.transformer, torch.device(DEVICE))
    else:
        accelerate.cpu_offload(pipe.transformer, torch.device(DEVICE))
    scheduler = pipelines.euler()
    ras.enable(pipe.transformer, scheduler=scheduler, **settings)
    try:
        result = loop(pipe.transformer, scheduler, inputs, len(PLAN))
    except ValueError as error:
        assert "cuda" in str(error) and "cpu" in str(error)
    else:
        assert relative_error(result.cpu(), expected) < 1e-4
