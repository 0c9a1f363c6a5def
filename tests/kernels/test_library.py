"""The ops as PyTorch knows them: schemas, fake implementations, `torch.compile`."""

import pytest
import torch
from support.operands import (
    DEVICE,
    INTERPRETED,
    LAYER_NORM,
    Recorder,
    calls,
    normal,
    recorded,
    turns,
)

import ras_kernels

REGISTERED = {
    name.partition("::")[2]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("ras_kernels::")
}


def test_every_op_is_called():
    assert {recorded(name)[0]._opname for name in calls()} == REGISTERED


@pytest.mark.parametrize("layout", ["dense", "rows first"])
@pytest.mark.parametrize("name", calls())
def test_opcheck(name, layout):
    torch.library.opcheck(*recorded(name, layout))


@pytest.mark.parametrize("name", calls())
def test_autocast_changes_nothing(name):
    """Nor dtypes, which are those that the fake implementation says."""
    call, tensors = calls()[name]
    written = [{key: single(tensor) for key, tensor in tensors.items()} for _ in range(2)]
    returned = [call(**written[0])]
    with torch.autocast(DEVICE, torch.bfloat16):
        returned.append(call(**written[1]))
    torch.testing.assert_close((written[1], returned[1]), (written[0], returned[0]), rtol=0, atol=0)


def single(tensor):
    """A copy in float32, which autocast has products of in another dtype."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor.clone()


def layer(hidden, noise, changes, ages, key, value, query_weight, weights, biases, norm, rotary):
    """A step of a layer with caches: all ops, some of them on views of what they write to."""
    batch, tokens, width = hidden.shape
    heads, size = key.shape[2:]
    scores = ras_kernels.region_scores(noise, 4)
    last, since = torch.zeros_like(noise), torch.zeros_like(scores)
    ras_kernels.update_drift_(last, scores, since, None, noise, position=0.5)
    scores = scores + ras_kernels.drift_scores(scores, since, position=0.7)
    active, ages = ras_kernels.select_regions(scores, ages, 5, high_ratio=0.3, starvation_scale=1.0)
    rows = ras_kernels.gather_tokens(hidden, active)
    key_changes, value_changes = torch.zeros_like(key), torch.zeros_like(value)
    ras_kernels.linear_scatter_(
        key[:, :tokens],
        value[:, :tokens],
        active,
        rows,
        key_weight=weights[0],
        value_weight=weights[1],
        key_bias=biases[0],
        value_bias=biases[1],
        key_changes=key_changes[:, :tokens],
        value_changes=value_changes[:, :tokens],
    )
    layers = [query_weight.T, *weights]
    query, _ = ras_kernels.qkv_scatter_(
        key, value, active, rows, weights=layers, text=hidden[:, :2], text_weights=layers
    )
    turned = ras_kernels.gather_tokens(rotary.expand(batch, -1, -1), active)
    options = dict(norm=LAYER_NORM, weight=norm, rotary=turned)
    ras_kernels.norm_rotary_scatter_(
        key[:, :tokens], active, ras_kernels.gather_tokens(key, active), **options
    )
    codes, scales = torch.zeros_like(key, dtype=torch.int8), torch.zeros_like(key[..., 0])
    ras_kernels.quantize_tokens_(
        codes[:, :tokens], scales[:, :tokens], active, ras_kernels.gather_tokens(key, active)
    )
    key = key + ras_kernels.dequantize_tokens(codes, scales, key.dtype)
    query = ras_kernels.norm_rotary(query.unflatten(2, (heads, size)), **options)
    moved = key_changes[:, :tokens], value_changes[:, :tokens]
    key, value = ras_kernels.carry_keys_and_values(key, value, *moved, ages / 3)
    seen = torch.full((batch,), tokens + 1, dtype=torch.int32, device=key.device)
    output = ras_kernels.sparse_attention(query, key, value, key_lengths=seen)
    states = ras_kernels.sparse_attention(
        query, key, value, key_lengths=seen, return_lse=True, out=torch.empty_like(output)
    )
    output = ras_kernels.merge_states(*states, output, states[1] - 1)[0].flatten(2)
    ras_kernels.scatter_tokens_(hidden, active, rows + output[..., :width])
    ras_kernels.update_tokens_(noise, changes, active, output[..., : noise.shape[2]])
    carried = ras_kernels.carry_tokens(noise, changes, ages / 2)
    return carried * 2, ages, active, key_changes, value_changes


@pytest.mark.skipif(INTERPRETED, reason="Inductor's own kernels need a compiler of Triton")
def test_compiled_without_a_break_it_gives_the_same_numbers():
    def inputs():
        weights, biases = ([normal(*s, seed=seed) for seed in (1, 2)] for s in ((32, 24), (32,)))
        return dict(
            hidden=normal(2, 9, 24),
            noise=normal(2, 9, 16, seed=1),
            changes=torch.zeros(2, 9, 16, device=DEVICE),
            ages=torch.arange(18, dtype=torch.int32, device=DEVICE).view(2, 9) % 4,
            key=normal(2, 12, 4, 8, seed=2),
            value=normal(2, 12, 4, 8, seed=3),
            query_weight=normal(24, 32, seed=4),
            weights=weights,
            biases=biases,
            norm=normal(32, seed=5),
            rotary=turns(1, 9, 4),
        )

    eager, compiled = inputs(), inputs()
    with Recorder() as recorder:
        expected = layer(**eager)
    assert {func._opname for func, _ in recorder.calls} == REGISTERED
    found = torch.compile(layer, fullgraph=True, dynamic=False)(**compiled)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled, eager)
