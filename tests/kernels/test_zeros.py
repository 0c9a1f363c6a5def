"""Sizes of 0, of every kind and for every op: a result without NaN, or an error that says more."""

import pytest
import torch
from support.operands import DEVICE, LAYER_NORM, normal

import ras_kernels

SIZES = dict(B=2, N=4, K=2, S=5, H=4, G=2, D=4, C=3, T=1)
REFUSED = {
    ("gather_tokens", "N"): r"tokens has no rows .*index .*\(B, 0\).*\(2, 0, 3\) and \(2, 2\)",
    ("scatter_tokens_", "N"): r"tokens has no rows .*index .*\(B, 0\)",
    ("update_tokens_", "N"): r"tokens has no rows .*index .*\(B, 0\)",
    ("update_drift_", "N"): r"pace has no rows .*index .*\(B, 0\)",
    ("norm_rotary_scatter_", "N"): r"out has no rows .*index .*\(B, 0\)",
    ("qkv_scatter_", "N"): "tokens must be no more",
    ("qkv_scatter_", "S"): "key_changes must be",
    ("linear_scatter_", "N"): r"key has no rows .*index .*\(B, 0\)",
    ("quantize_tokens_", "N"): r"codes has no rows .*index .*\(B, 0\)",
    ("quantize_tokens_", "D"): r"codes .*D at least 1.*\(2, 4, 2, 0\)",
    ("dequantize_tokens", "D"): r"codes .*D at least 1.*\(2, 5, 2, 0\)",
    ("select_regions", "N"): r"N at least 1.*\(2, 0\)",
    ("select_regions", "K"): "num_active .*from 1 to 4.* 0",
    ("sparse_attention", "G"): r"key's heads divide the query's.*\(2, 2, 4, 4\) and \(2, 5, 0, 4\)",
    ("sparse_attention, lengths", "G"): "key's heads divide the query's",
    ("sparse_attention, lse", "G"): "key's heads divide the query's",
    ("region_scores", "C"): r"C at least 1.*\(2, 4, 0\)",
    ("update_drift_", "C"): r"C at least 1.*\(2, 4, 0\)",
    ("update_drift_, all", "C"): r"C at least 1.*\(2, 4, 0\)",
}


def cases(**zero):
    """Arguments of each op, and the shapes of what it returns."""
    size = SIZES | zero
    batch, tokens, count, heads, width = (size[letter] for letter in "BNKHD")

    def some(shape, seed=0):
        return normal(*(size[letter] for letter in shape), seed=seed)

    def codes(shape, prefix="", **options):
        sizes = [size[letter] for letter in shape]
        parts = torch.zeros(sizes, dtype=torch.int8), torch.zeros(sizes[:3])
        names = f"{prefix}codes", f"{prefix}scales"
        return dict(zip(names, (part.to(DEVICE) for part in parts))) | options

    index = torch.arange(count, device=DEVICE).expand(batch, count)
    turns = torch.ones(1, count, width // 2, device=DEVICE) + 0j
    weight = normal(heads * width, size["C"])
    head, every = normal(width), normal(heads * width)
    pair = dict(pace=some("BN"), since=some("BN"), position=0.5)
    drift = dict(last=some("BNC"), noise=some("BNC", 1), **pair)
    attention = dict(query=some("BKHD"), key=some("BSGD"), value=some("BSGD", 1))
    lengths = torch.full((batch,), 3, device=DEVICE)
    caches = dict(key=some("BNHD"), value=some("BNHD", 1), tokens=some("BKC"), index=index)
    changes = dict(key_changes=some("BNHD"), value_changes=some("BNHD"))
    ages = some("BN").int()
    noise = normal(batch, tokens, 4 * size["C"])
    rows, regions = (batch, count, heads, width), (batch, tokens)
    return {
        "gather_tokens": (dict(tokens=some("BNC"), index=index), (batch, count, size["C"])),
        "scatter_tokens_": (
            dict(tokens=some("BNC"), index=index, rows=some("BKC")),
            (batch, tokens, size["C"]),
        ),
        "update_tokens_": (
            dict(tokens=some("BNC"), changes=some("BNC"), index=index, rows=some("BKC")),
            (batch, tokens, size["C"]),
        ),
        "carry_tokens": (
            dict(
                tokens=some("BSC"),
                changes=some("BNC")[:, : size["S"]],
                gain=some("BN")[:, : size["S"]],
            ),
            (batch, size["S"], size["C"]),
        ),
        "carry_keys_and_values": (
            dict(key=some("BSC"), value=some("BSC", 1), gain=some("BN")[:, : size["S"]])
            | {name: some("BNC", 2)[:, : size["S"]] for name in ("key_changes", "value_changes")},
            (batch, size["S"], size["C"]),
        ),
        "quantize_tokens_": (
            codes("BNGD") | codes("BNGD", "change_") | dict(index=index, rows=some("BKGD")),
            (batch, tokens, size["G"], width),
        ),
        "dequantize_tokens": (
            codes("BSGD", dtype=torch.float16)
            | {name: part[:, : size["S"]] for name, part in codes("BNGD", "change_").items()}
            | dict(gain=some("BN")[:, : size["S"]]),
            (batch, size["S"], size["G"], width),
        ),
        "sparse_attention": (attention, rows),
        "sparse_attention, lengths": (attention | dict(key_lengths=lengths), rows),
        "sparse_attention, lse": (attention | dict(return_lse=True), rows),
        "merge_states": (
            dict(out_a=some("BKHD"), lse_a=some("BHK"), out_b=some("BKHD"), lse_b=some("BHK")),
            rows,
        ),
        "region_scores": (dict(noise=noise, pixels=4), regions),
        "update_drift_": (drift | dict(index=index), None),
        "update_drift_, all": (drift | dict(index=None), None),
        "drift_scores": (pair, regions),
        "select_regions": (
            dict(scores=some("BN"), ages=ages, num_active=count)
            | dict(high_ratio=0.3, starvation_scale=1.0),
            (batch, count),
        ),
        "norm_rotary": (dict(tokens=some("BKHD"), rotary=turns), rows),
        "norm_rotary, all heads": (
            dict(tokens=some("BKHD"), norm=LAYER_NORM, weight=every, bias=every, rotary=turns),
            rows,
        ),
        "norm_rotary_scatter_": (
            dict(out=some("BNHD"), index=index, tokens=some("BKHD"), changes=some("BNHD"))
            | dict(norm="rms_norm", weight=head),
            (batch, tokens, heads, width),
        ),
        "linear_scatter_": (
            caches
            | changes
            | dict(key_weight=weight, value_weight=weight)
            | dict(key_bias=every, value_bias=every),
            (batch, tokens, heads, width),
        ),
        "qkv_scatter_": (
            caches
            | changes
            | dict(index=None, text=some("BTC"), weights=[weight] * 3, biases=[every] * 3)
            | dict(key=some("BSHD"), value=some("BSHD", 1))
            | dict(text_weights=[weight] * 3, text_biases=[every] * 3),
            (batch, count, heads * width),
        ),
    }


@pytest.mark.parametrize("letter", SIZES)
@pytest.mark.parametrize("name", cases())
@pytest.mark.filterwarnings("error")
def test_a_size_of_zero(name, letter):
    arguments, shape = cases(**{letter: 0})[name]
    op = getattr(ras_kernels, name.partition(",")[0])
    tensors = {key: value for key, value in arguments.items() if torch.is_tensor(value)}
    before = {key: value.clone() for key, value in tensors.items()}
    if (name, letter) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, letter]):
            op(**arguments)
        torch.testing.assert_close(tensors, before, rtol=0, atol=0)
        return
    returned = op(**arguments)
    if shape is not None:
        first = returned[0] if isinstance(returned, tuple) else returned
        assert first.shape == shape and not first.isnan().any()
    assert not any(tensor.isnan().any() for tensor in tensors.values())


def test_without_channels_a_projection_is_its_bias():
    arguments, _ = cases(C=0)["linear_scatter_"]
    key, _ = ras_kernels.linear_scatter_(**arguments)
    expected = arguments["key_bias"].view(4, 4).expand(2, 2, 4, 4)
    assert torch.equal(ras_kernels.gather_tokens(key, arguments["index"]), expected)


@pytest.mark.parametrize("letter", ["S", "K", "B", "H", "D"])
def test_attention_over_nothing_is_zeros(letter):
    arguments, shape = cases(**{letter: 0})["sparse_attention"]
    assert torch.equal(ras_kernels.sparse_attention(**arguments), torch.zeros(shape, device=DEVICE))
