"""Quantised and adapted layers, and which ones kernels take the place of.

The oracle of quantised layers is that of the weights that they stand for.
"""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from support import pipelines
from support.offloading import CPU, WAYS, no_streams
from support.operands import DEVICE
from support.oracle import relative_error
from support.pipelines import Recorder, sd3_inputs
from support.runs import CONFIG, check, fresh, load_lora, lora, run
from support.weights import FAMILIES, PLAN, expected_of, moved

import ras
import ras_kernels
from ras import projections

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]
SKIPPED = (1, 4)


@pytest.fixture(autouse=True)
def streams_of_nothing(monkeypatch):
    no_streams(monkeypatch)


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
            "qkv_scatter_": ("weights", "text_weights"),
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
                given = kwargs.get(argument)
                for weight in given if isinstance(given, list) else [given]:
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


PLAIN = "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"
NORMS = "norm_q", "norm_k", "norm_added_q", "norm_added_k"
FUSED = {"sd3": PLAIN, "sd3.5": NORMS, "lumina": ("norm_q", "norm_k")}


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
        projections, "fuses", lambda tokens: not torch.is_autocast_enabled(tokens.device.type)
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
    # A kernel takes all six; where it may not, another keys and values, both or none.
    pairs = ("to_k", "to_v"), ("add_k_proj", "add_v_proj"), PLAIN
    whole = {
        name
        for name in may_be_fused(pipelines.sd3(), "sd3")
        for pair in [next(pair for pair in pairs if name.endswith(pair))]
        if not {f"{name.rpartition('.')[0]}.{each}" for each in pair} & adapted
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
    names = {f"transformer_blocks.1.attn.{n}" for n in ("to_q", "to_k", "to_v", "add_q_proj")}
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
