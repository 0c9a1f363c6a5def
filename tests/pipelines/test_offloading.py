"""`ras` with weights that are elsewhere, or other than they seem, until a layer is called.

The oracle of offloading and of layerwise casting is `ras` on the same weights without them. Here
they go from the CPU to the CPU, and what is loaded when is counted; on a GPU they do what they are
for. The oracle of quantised layers is that of the weights that they stand for.
"""

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload
from diffusers import SD3Transformer2DModel
from diffusers.hooks import group_offloading
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook
from support import pipelines
from support.offloading import CPU, FP8, WAYS, casting, no_streams
from support.operands import DEVICE
from support.oracle import relative_error
from support.pipelines import Recorder, sd3_inputs
from support.runs import CONFIG, check, fresh, load_lora, loop, lora, run

import ras
import ras_kernels
from ras import projections

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]

PLAN = (1, 0, 1, 0.5, 0, 0.25, 1, 0.5)  # skips as soon as it may
SKIPPED = (1, 4)
STEPS_OF_PLAN = (3, 3, 2)

FAMILIES = {
    "sd3": lambda **config: with_inputs("sd3", **config),
    "sd3.5": lambda **config: with_inputs(
        "sd3", qk_norm="rms_norm", dual_attention_layers=(0, 1), **config
    ),
    "lumina": lambda **config: with_inputs("lumina", **config),
}


def with_inputs(family, **config):
    pipe = getattr(pipelines, family)(**config)
    return pipe, getattr(pipelines, f"{family}_inputs")(pipe, 2)


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


def moved(inputs, device=DEVICE):
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}


def expected_of(family, way):
    """What `ras` gives, and the plain model, with weights that are where they are needed."""
    pipe, inputs = FAMILIES[family]()
    if way in ("float8", "bfloat16"):  # those that are left of a round trip
        round_trip(pipe, FP8 if way == "float8" else torch.bfloat16)
    pipe.to(DEVICE)
    plain = run(pipe, moved(inputs), len(PLAN))
    with ras.enabled(pipe, plan=PLAN):
        return run(pipe, moved(inputs), len(PLAN)), plain


def round_trip(pipe, storage):
    """Cast what layerwise casting casts, without its hooks."""
    skipped = getattr(pipe.transformer, "_skip_layerwise_casting_patterns", None) or []
    for name, module in pipe.transformer.named_modules():
        kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding)
        if not isinstance(module, kinds) or any(part in name for part in ("norm", *skipped)):
            continue
        if "pos_embed" in name or "patch_embed" in name or name in ("proj_in", "proj_out"):
            continue
        module.to(storage).to(torch.float32)


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


# --- quantised layers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torchao():
    pytest.importorskip("torchao")
    from torchao import quantization

    return quantization


def is_quantised(weight):
    return type(weight) not in (torch.Tensor, torch.nn.Parameter)


def quantise(torchao, pipe):
    torchao.quantize_(pipe.transformer, torchao.Int8WeightOnlyConfig())
    assert sum(map(is_quantised, pipe.transformer.parameters())) > 20


def dequantised(transformer):
    """A transformer with the weights that this one's stand for."""
    model = type(transformer).from_config(transformer.config)
    weights = {
        name: weight.dequantize() if is_quantised(weight) else weight
        for name, weight in transformer.state_dict().items()
    }
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised(monkeypatch, torchao, family, order):
    pipe, inputs = FAMILIES[family]()
    original = run(pipe, inputs)
    record = Recorder(monkeypatch, pipe)
    if order == "before":
        quantise(torchao, pipe)
    with ras.enabled(pipe, CONFIG):
        if order == "after":
            run(pipe, inputs)
            quantise(torchao, pipe)
            record.clear()
        run(pipe, inputs)
        assert ras.stats(pipe).steps_sparse == 5
    check(record, dequantised(pipe.transformer))
    assert 1e-3 < relative_error(run(pipe, inputs), original) < 0.1  # it does make a difference


def test_quantised_by_diffusers(monkeypatch, torchao, tmp_path):
    """Loaded by `from_pretrained`, as users do."""
    from diffusers import TorchAoConfig

    pipe, inputs = FAMILIES["sd3.5"]()
    pipe.transformer.save_pretrained(tmp_path)
    transformer = SD3Transformer2DModel.from_pretrained(
        tmp_path,
        quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig()),
        torch_dtype=torch.float32,
    )
    pipe.register_modules(transformer=transformer)
    assert sum(map(is_quantised, transformer.parameters())) > 20
    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, CONFIG):
        run(pipe, inputs)
        assert ras.stats(pipe).steps_sparse == 5
    check(record, dequantised(pipe.transformer))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("way", ["model", "blocks", "leaves"])
def test_quantised_and_offloaded(torchao, way, order):
    pipe, inputs = FAMILIES["sd3"]()
    inputs = moved(inputs)
    quantise(torchao, pipe)
    pipe.to(DEVICE)
    plain = run(pipe, inputs, len(PLAN))
    with ras.enabled(pipe, plan=PLAN):
        expected = run(pipe, inputs, len(PLAN))
    pipe.to(CPU)
    if order == "before":
        WAYS[way](pipe)
    ras.enable(pipe, plan=PLAN)
    if order == "after":
        WAYS[way](pipe)
    for _ in range(2):
        assert relative_error(run(pipe, inputs, len(PLAN)), expected) < 1e-5
        assert ras.stats(pipe).steps_skipped == 2
    ras.disable(pipe)
    assert relative_error(run(pipe, inputs, len(PLAN)), plain) < 1e-5


# --- which layers kernels take the place of -------------------------------------------------------


class Used:
    """Which plain layers' weights the ops were given, and which layers were called."""

    def __init__(self, monkeypatch, transformer):
        self.fused, self.called = set(), set()
        self.names = {id(layer): name for name, layer in transformer.named_modules()}
        self.weights = {id(w): name for name, w in transformer.named_parameters()}
        for op, arguments in {
            "linear_scatter_": ("key_weight", "value_weight"),
            "norm_rotary": ("weight",),
            "norm_rotary_scatter_": ("weight",),
        }.items():
            self.watch_op(monkeypatch, op, arguments)
        for kind in (torch.nn.Linear, torch.nn.LayerNorm, projections.RMSNorm):
            self.watch_layers(monkeypatch, kind)

    def watch_op(self, monkeypatch, op, arguments):
        run_op = getattr(ras_kernels, op)

        def watched(*args, **kwargs):
            for argument in arguments:
                weight = kwargs.get(argument)
                if weight is not None:
                    self.fused.add(self.weights[id(weight)].rpartition(".")[0])
            return run_op(*args, **kwargs)

        monkeypatch.setattr(ras_kernels, op, watched)

    def watch_layers(self, monkeypatch, kind):
        forward = kind.forward

        def watched(layer, *args, **kwargs):
            self.called.add(self.names.get(id(layer)))
            return forward(layer, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", watched)


KEYS = "to_k", "to_v", "add_k_proj", "add_v_proj"
NORMS = "norm_q", "norm_k", "norm_added_q", "norm_added_k"
FUSED = {"sd3": KEYS, "sd3.5": NORMS, "lumina": ("norm_q", "norm_k")}


def may_be_fused(pipe, family):
    """The layers of self-attention that there are kernels for."""
    found = set()
    for name, layer in pipe.transformer.named_modules():
        parent, _, last = name.rpartition(".")
        own = parent.endswith(("attn", "attn1")) or (family == "sd3.5" and parent.endswith("attn2"))
        has_weight = getattr(layer, "weight", None) is not None
        if own and has_weight and last in FUSED[family]:
            found.add(name)
    return found


def fusing(monkeypatch):
    """As on a GPU, with the definitions of the ops in the place of kernels."""
    monkeypatch.setattr(
        projections, "_fuses", lambda tokens: not torch.is_autocast_enabled(tokens.device.type)
    )


def run_fusing(monkeypatch, pipe, inputs):
    """The result with `ras`, and which layers were used how."""
    fusing(monkeypatch)
    with monkeypatch.context() as patch:
        used = Used(patch, pipe.transformer)
        result = run(pipe, inputs, len(PLAN))
        assert ras.stats(pipe).steps_sparse == 3
    return result, used


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_layers_are_fused(monkeypatch, family):
    pipe, inputs = FAMILIES[family]()
    with ras.enabled(pipe, plan=PLAN):
        expected = run(pipe, inputs, len(PLAN))
        result, used = run_fusing(monkeypatch, pipe, inputs)
    assert relative_error(result, expected) < 1e-5
    assert used.fused == may_be_fused(pipe, family)
    assert not used.fused & used.called


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("way", ["sequential", "leaves", "leaves-streams", "float8", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_change_when_called_are_called(monkeypatch, family, way, order):
    """A kernel that read the weights of these would find none, or others."""
    expected, _ = expected_of(family, way)
    pipe, inputs = FAMILIES[family]()
    if order == "before":
        WAYS[way](pipe)
    ras.enable(pipe, plan=PLAN)
    if order == "after":
        WAYS[way](pipe)
    result, used = run_fusing(monkeypatch, pipe, moved(inputs))
    assert relative_error(result, expected) < 1e-5
    # layerwise casting leaves norms as they are
    cast_norms = way in ("float8", "bfloat16") and family != "sd3"
    assert used.fused == (may_be_fused(pipe, family) if cast_norms else set())


@pytest.mark.parametrize("way", ["model", "blocks", "blocks-streams"])
def test_layers_whose_block_is_loaded_are_fused(monkeypatch, way):
    """Weights that are there when the block runs are as good as any."""
    expected, _ = expected_of("sd3", way)
    pipe, inputs = FAMILIES["sd3"]()
    WAYS[way](pipe)
    ras.enable(pipe, plan=PLAN)
    result, used = run_fusing(monkeypatch, pipe, moved(inputs))
    assert relative_error(result, expected) < 1e-5
    assert used.fused == may_be_fused(pipe, "sd3") and not used.fused & used.called


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_layers_are_called(monkeypatch, torchao, family):
    pipe, inputs = FAMILIES[family]()
    quantise(torchao, pipe)
    with ras.enabled(pipe, plan=PLAN):
        expected = run(pipe, inputs, len(PLAN))
        result, used = run_fusing(monkeypatch, pipe, inputs)
    assert relative_error(result, expected) < 1e-5
    quantised = {
        name.rpartition(".")[0]
        for name, weight in pipe.transformer.named_parameters()
        if is_quantised(weight)
    }
    assert not used.fused & quantised
    assert used.fused == may_be_fused(pipe, family) - quantised


def test_adapted_layers_are_called(monkeypatch):
    """A LoRA on some layers of a model; the others are fused as before."""
    pipe, plain = pipelines.sd3(), pipelines.sd3()
    inputs = sd3_inputs(pipe, 2)
    state, deltas = lora(pipe.transformer, 1000)
    load_lora(plain, state)
    with ras.enabled(plain, plan=PLAN):
        expected = run(plain, inputs, len(PLAN))
    ras.enable(pipe, plan=PLAN)
    load_lora(pipe, state)
    result, used = run_fusing(monkeypatch, pipe, inputs)
    assert relative_error(result, expected) < 1e-5
    adapted = {name.removesuffix(".weight") for name in deltas}
    pairs = (("to_k", "to_v"), ("add_k_proj", "add_v_proj"))  # a kernel takes both or none
    whole = {
        name
        for name in may_be_fused(pipelines.sd3(), "sd3")
        for pair in pairs
        if name.endswith(pair)
        and not {f"{name.rpartition('.')[0]}.{each}" for each in pair} & adapted
    }
    assert used.fused == whole and 0 < len(whole) < 12


def test_layers_with_hooks_are_called(monkeypatch):
    """The user's own hooks run, and what they return is what counts."""
    pipe, inputs = FAMILIES["sd3"]()
    attn = pipe.transformer.transformer_blocks[1].attn
    doubled = []
    attn.to_v.register_forward_hook(lambda m, args, output: doubled.append(0) or 2 * output)
    with ras.enabled(pipe, plan=PLAN):
        expected = run(pipe, inputs, len(PLAN))
        doubled.clear()
        result, used = run_fusing(monkeypatch, pipe, inputs)
    assert relative_error(result, expected) < 1e-5
    assert len(doubled) == len(PLAN) - len(SKIPPED)
    names = {f"transformer_blocks.1.attn.{name}" for name in ("to_k", "to_v")}
    assert used.fused == may_be_fused(pipe, "sd3") - names


def test_an_own_class_of_layer_is_called(monkeypatch):
    """A subclass may do anything: it is no plain layer, whatever its weights are."""

    class Halved(torch.nn.Linear):
        def forward(self, tokens):
            return super().forward(tokens) / 2

    pipe, inputs = FAMILIES["sd3"]()
    attn = pipe.transformer.transformer_blocks[0].attn
    halved = Halved(attn.to_k.in_features, attn.to_k.out_features)
    halved.load_state_dict(attn.to_k.state_dict())
    attn.to_k = halved
    with ras.enabled(pipe, plan=PLAN):
        expected = run(pipe, inputs, len(PLAN))
        result, used = run_fusing(monkeypatch, pipe, inputs)
    assert relative_error(result, expected) < 1e-5
    assert relative_error(result, fresh(lambda _: inputs, ras.RASConfig(plan=PLAN))) > 1e-3
    assert not {"transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"} & used.fused
