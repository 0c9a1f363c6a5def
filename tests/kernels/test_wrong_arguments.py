"""What ops refuse: by name, before anything is written."""

import math
import runpy

import pytest
import torch
from support.operands import LAYER_NORM, codes_of

import ras_kernels
from ras_kernels import _checks

INDEX = torch.tensor([[0, 2], [5, 1]])


def x(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def right():
    """Arguments that each op takes."""
    cache = {"index": INDEX, "tokens": x(2, 2, 3, 4)}
    norm = {"norm": "rms_norm", "weight": x(4), "bias": x(4), "rotary": torch.ones(1, 2, 2) + 1j}
    projections = {
        f"{name}_{part}": x(*shape)
        for name in ("key", "value")
        for part, shape in (("weight", (8, 3)), ("bias", (8,)), ("changes", (2, 6, 2, 4)))
    }
    return {
        "gather_tokens": {"tokens": x(2, 6, 3), "index": INDEX},
        "scatter_tokens_": {"tokens": x(2, 6, 3), "index": INDEX, "rows": x(2, 2, 3)},
        "update_tokens_": {
            "tokens": x(2, 6, 3),
            "changes": x(2, 6, 3),
            "index": INDEX,
            "rows": x(2, 2, 3, seed=1),
        },
        "carry_tokens": {"tokens": x(2, 6, 3), "changes": x(2, 5, 3), "gain": x(2, 5)},
        "carry_keys_and_values": {
            **{name: x(2, 6, 3) for name in ("key", "value")},
            **{name: x(2, 5, 3) for name in ("key_changes", "value_changes")},
            "gain": x(2, 5),
        },
        "quantize_tokens_": {
            "codes": codes_of(2, 6, 3, 4)[0],
            "scales": codes_of(2, 6, 3, 4)[1],
            "change_codes": codes_of(2, 6, 3, 4)[0],
            "change_scales": codes_of(2, 6, 3, 4)[1],
            "index": INDEX,
            "rows": x(2, 2, 3, 4),
        },
        "dequantize_tokens": {
            "codes": codes_of(2, 6, 3, 4)[0],
            "scales": codes_of(2, 6, 3, 4)[1],
            "dtype": torch.float16,
            "change_codes": codes_of(2, 5, 3, 4)[0],
            "change_scales": codes_of(2, 5, 3, 4)[1],
            "gain": x(2, 5),
        },
        "sparse_attention": {"query": x(2, 2, 4, 8), "key": x(2, 5, 2, 8), "value": x(2, 5, 2, 8)},
        "region_scores": {"noise": x(2, 3, 8), "pixels": 4},
        "update_drift_": {
            "pace": x(2, 6),
            "since": x(2, 6),
            "last": x(2, 6, 8),
            "index": INDEX,
            "noise": x(2, 6, 8, seed=1),
            "position": 0.5,
        },
        "drift_scores": {"pace": x(2, 6), "since": x(2, 6), "position": 0.5},
        "select_regions": {
            "scores": x(2, 6),
            "ages": torch.zeros(2, 6, dtype=torch.int32),
            "num_active": 3,
            "high_ratio": 0.3,
            "starvation_scale": 1.0,
        },
        "norm_rotary": {"tokens": x(2, 2, 3, 4), **norm},
        "norm_rotary_scatter_": {"out": x(2, 6, 3, 4), "changes": x(2, 6, 3, 4), **cache, **norm},
        "linear_scatter_": {
            "key": x(2, 6, 2, 4),
            "value": x(2, 6, 2, 4),
            "index": INDEX,
            "tokens": x(2, 2, 3),
            **projections,
        },
        "qkv_scatter_": {
            "key": x(2, 8, 2, 4),
            "value": x(2, 8, 2, 4),
            "index": INDEX,
            "tokens": x(2, 2, 3),
            "text": x(2, 2, 3),
            **{f"{of}weights": [x(12, 3), x(8, 3), x(8, 3)] for of in ("", "text_")},
            **{f"{of}biases": [x(12), x(8), x(8)] for of in ("", "text_")},
            **{f"{name}_changes": x(2, 6, 2, 4) for name in ("key", "value")},
        },
    }


@pytest.mark.parametrize("name", right())
def test_right_arguments_are_taken(name):
    getattr(ras_kernels, name)(**right()[name])


TAKEN = {
    *(("quantize_tokens_", part, "float16") for part in ("rows",)),
    ("gather_tokens", "float16"),
    ("gather_tokens", "int16"),
    ("region_scores", "float16"),
    ("region_scores", "meta"),
    ("select_regions", "scores", "float16"),
}


def other_kinds(name):
    """Each of an op's tensors in another dtype and on another device, where that is wrong."""
    tensors = {a: t for a, t in right()[name].items() if isinstance(t, torch.Tensor)}
    for argument, tensor in tensors.items():
        for kind in ("float16", "int16", "meta"):
            if argument == "index" or (tensor.is_complex() and kind != "meta"):
                continue
            if (name, kind) not in TAKEN and (name, argument, kind) not in TAKEN:
                wrong = tensor.to("meta" if kind == "meta" else getattr(torch, kind))
                yield name, {argument: wrong}, rf"\b({'|'.join(tensors)})\b.*{kind}"


def indices(name):
    """What is wrong with an index, whichever op takes it."""
    into = next(iter(right()[name]))
    return [
        (name, {"index": INDEX.float()}, "index .*int32.*float32"),
        (name, {"index": INDEX[0]}, r"index .*\(B, K\).*\(2,\)"),
        (name, {"index": INDEX.repeat(2, 1)}, rf"{into}\b.*index .*\(1, K\).*\(4, 2\)"),
        (name, {"index": INDEX + 1}, r"index .*\[0, 6\).* 6"),
        (name, {"index": INDEX - 1}, r"index .*\[0, 6\).* -1"),
        (name, {"index": INDEX.to("meta")}, "index .*meta.*cpu"),
        (name, {into: x(2)}, rf"\b{into}\b.*\(2,\)"),
    ]


def expanded(name, argument):
    value = right()[name][argument]
    return name, {argument: value[:1].expand_as(value)}, rf"\b{argument}\b.*expanded"


@pytest.mark.parametrize(
    "name, wrong, said",
    [
        *(case for name in right() for case in other_kinds(name)),
        *(case for name, one in right().items() if "index" in one for case in indices(name)),
        ("scatter_tokens_", {"rows": x(2, 3, 3)}, r"rows .*\(2, 2, 3\).*\(2, 3, 3\)"),
        ("scatter_tokens_", {"rows": x(1, 2, 3)}, r"rows .*\(2, 2, 3\).*\(1, 2, 3\)"),
        expanded("scatter_tokens_", "tokens"),
        ("update_tokens_", {"changes": x(2, 5, 3)}, r"changes .*\(2, 6, 3\).*\(2, 5, 3\)"),
        ("update_tokens_", {"rows": x(2, 3, 3)}, r"rows .*\(2, 2, 3\).*\(2, 3, 3\)"),
        ("update_tokens_", {"index": None}, r"rows .*\(2, 6, 3\).*\(2, 2, 3\)"),
        ("update_tokens_", {"index": None, "tokens": x(2)}, r"tokens .*\(2,\)"),
        expanded("update_tokens_", "tokens"),
        expanded("update_tokens_", "changes"),
        ("carry_tokens", {"changes": x(2, 7, 3), "gain": x(2, 7)}, r"changes .*\(2, 7, 3\)"),
        ("carry_tokens", {"changes": x(2, 5, 4)}, r"changes .*\(2, 5, 4\)"),
        ("carry_tokens", {"changes": x(2)}, r"changes .*\(2,\)"),
        ("carry_tokens", {"tokens": x(2), "changes": x(2)}, r"tokens .*\(2,\)"),
        ("carry_tokens", {"gain": x(2, 6)}, r"gain .*\(2, 6\)"),
        (
            "carry_keys_and_values",
            {"value": x(2, 5, 3)},
            r"key and value .*\(2, 6, 3\).*\(2, 5, 3\)",
        ),
        ("carry_keys_and_values", {"value_changes": x(2, 4, 3)}, r"value_changes .*\(2, 4, 3\)"),
        (
            "carry_keys_and_values",
            {name: x(2, 7, 3) for name in ("key_changes", "value_changes")},
            r"key must .*\(2, 7, 3\)",
        ),
        ("carry_keys_and_values", {"gain": x(2, 6)}, r"gain .*\(2, 6\)"),
        ("quantize_tokens_", {"codes": x(2, 6, 3, 4).byte()}, "codes .*int8 .*uint8"),
        ("quantize_tokens_", {"rows": x(2, 3, 3, 4)}, r"rows .*\(2, 2, 3, 4\).*\(2, 3, 3, 4\)"),
        ("quantize_tokens_", {"index": None}, r"rows .*\(2, 6, 3, 4\).*\(2, 2, 3, 4\)"),
        ("quantize_tokens_", {"scales": x(2, 6)}, r"scales .*\(2, 6, 3\).*\(2, 6\)"),
        ("quantize_tokens_", {"change_scales": None}, "change_codes and change_scales"),
        ("quantize_tokens_", {"change_scales": x(2, 6)}, r"change_scales .*\(2, 6, 3\).*\(2, 6\)"),
        (
            "quantize_tokens_",
            dict(zip(("change_codes", "change_scales"), codes_of(2, 5, 3, 4))),
            r"change_codes .*\(2, 6, 3, 4\).*\(2, 5, 3, 4\)",
        ),
        (
            "quantize_tokens_",
            {"change_codes": codes_of(2, 6, 3, 4, dtype=torch.float8_e4m3fn)[0]},
            "change_codes is .*float8_e4m3fn.*codes is .*int8",
        ),
        *(
            expanded("quantize_tokens_", argument)
            for argument in ("codes", "scales", "change_codes", "change_scales")
        ),
        ("dequantize_tokens", {"dtype": torch.int8}, "dtype must be float32.*int8"),
        ("dequantize_tokens", {"gain": None}, "change_codes, change_scales and gain together"),
        ("dequantize_tokens", {"gain": x(2, 6)}, r"gain .*\(2, 5\).*\(2, 6\)"),
        ("dequantize_tokens", {"codes": x(2, 6, 4).char()}, r"codes .*\(B, N, G, D\).*\(2, 6, 4\)"),
        (
            "dequantize_tokens",
            dict(zip(("change_codes", "change_scales"), codes_of(2, 7, 3, 4))) | {"gain": x(2, 7)},
            r"change_codes .*\(2, 6, 3, 4\).*\(2, 7, 3, 4\)",
        ),
        ("sparse_attention", {"query": x(2, 4, 8)}, r"query .*\(2, 4, 8\)"),
        ("sparse_attention", {"value": x(2, 4, 2, 8)}, r"value .*\(2, 4, 2, 8\)"),
        ("sparse_attention", {"query": x(2, 2, 3, 8)}, r"query .*\(2, 2, 3, 8\)"),
        ("sparse_attention", {"query": x(1, 2, 4, 8)}, r"query .*\(1, 2, 4, 8\)"),
        ("sparse_attention", {"query": x(2, 2, 4, 6)}, r"query .*\(2, 2, 4, 6\)"),
        (
            "sparse_attention",
            {"key": x(2, 5, 0, 8), "value": x(2, 5, 0, 8)},
            r"key\b.*\(2, 5, 0, 8\)",
        ),
        ("sparse_attention", {"key_mask": x(2, 5)}, "key_mask .*bool.*float32"),
        ("sparse_attention", {"key_mask": x(2, 4) > 0}, r"key_mask .*\(2, 5\).*\(2, 4\)"),
        ("sparse_attention", {"key_mask": (x(2, 5) > 0).to("meta")}, "key_mask .*meta"),
        ("sparse_attention", {"key_lengths": x(2)}, "key_lengths .*int32.*float32"),
        ("sparse_attention", {"key_lengths": INDEX[:1, 0]}, r"key_lengths .*\(2,\).*\(1,\)"),
        ("sparse_attention", {"key_lengths": INDEX[0].to("meta")}, "key_lengths .*meta"),
        (
            "sparse_attention",
            {"key_mask": x(2, 5) > 0, "key_lengths": INDEX[0]},
            "key_mask or key_lengths",
        ),
        ("region_scores", {"pixels": 3}, r"noise .*pixels \* C.*\(2, 3, 8\) and 3"),
        ("region_scores", {"pixels": 0}, "pixels and C at least 1.* 0 pixels"),
        ("region_scores", {"noise": x(2, 8)}, r"noise .*\(2, 8\)"),
        ("region_scores", {"noise": x(2, 3, 2, 4)}, r"noise .*\(2, 3, 2, 4\)"),
        ("region_scores", {"metric": "entropy"}, "metric .*std, l2norm.*entropy"),
        ("update_drift_", {"noise": x(2, 8, 2, 3)}, r"noise .*\(2, 8, 2, 3\)"),
        ("update_drift_", {"last": x(2, 6, 4)}, r"last .*\(2, 6, 8\).*\(2, 6, 4\)"),
        ("update_drift_", {"pace": x(2, 5)}, r"pace .*\(2, 6\).*\(2, 5\)"),
        ("update_drift_", {"since": x(1, 6)}, r"since .*\(2, 6\).*\(1, 6\)"),
        *(expanded("update_drift_", argument) for argument in ("last", "pace", "since")),
        ("drift_scores", {"pace": x(6)}, r"pace .*\(B, N\).*\(6,\)"),
        ("drift_scores", {"since": x(2, 5)}, r"since .*\(2, 6\).*\(2, 5\)"),
        ("select_regions", {"scores": x(6)}, r"scores .*\(6,\)"),
        ("select_regions", {"ages": INDEX}, r"ages .*\(2, 6\).*\(2, 2\)"),
        ("select_regions", {"num_active": 7}, "num_active .*6.*7"),
        ("select_regions", {"num_active": 0}, "num_active .*1.*0"),
        ("select_regions", {"high_ratio": 2.0}, "high_ratio .*2.0"),
        ("select_regions", {"high_ratio": math.nan}, "high_ratio .*nan"),
        ("select_regions", {"starvation_scale": -1.0}, "starvation_scale .*-1"),
        ("select_regions", {"starvation_scale": math.inf}, "starvation_scale .*inf"),
        ("norm_rotary", {"tokens": x(2, 2, 12)}, r"tokens .*\(B, K, H, D\).*\(2, 2, 12\)"),
        ("norm_rotary", {"norm": "batch_norm"}, "norm .*rms_norm.*batch_norm"),
        ("norm_rotary", {"norm": None}, "weight .*norm"),
        ("norm_rotary", {"norm": None, "weight": None}, "bias .*norm"),
        ("norm_rotary", {"norm": LAYER_NORM}, r"weight .*\(12,\).*\(4,\)"),
        ("norm_rotary", {"bias": x(3)}, r"bias .*\(4,\).*\(3,\)"),
        ("norm_rotary", {"rotary": torch.ones(1, 3, 2) + 1j}, r"rotary .*\(2, 2, 2\).*\(1, 3, 2\)"),
        ("norm_rotary", {"rotary": x(1, 2, 2)}, "rotary .*complex.*float32"),
        (
            "norm_rotary",
            {"tokens": x(2, 2, 3, 5), "weight": x(5), "bias": x(5)},
            r"rotary .*\(1, 2, 2\)",
        ),
        (
            "norm_rotary_scatter_",
            {"tokens": x(2, 2, 4, 4)},
            r"tokens .*\(2, 2, 3, 4\).*\(2, 2, 4, 4\)",
        ),
        ("norm_rotary_scatter_", {"changes": x(2, 5, 3, 4)}, r"changes .*\(2, 5, 3, 4\)"),
        expanded("norm_rotary_scatter_", "out"),
        expanded("norm_rotary_scatter_", "changes"),
        ("linear_scatter_", {"tokens": x(2, 2)}, r"tokens .*\(B, K, C\).*\(2, 2\)"),
        ("linear_scatter_", {"tokens": x(2, 3, 3)}, r"tokens .*\(2, 2, C\).*\(2, 3, 3\)"),
        ("linear_scatter_", {"value": x(2, 6, 8)}, r"value .*\(2, 6, 8\)"),
        ("linear_scatter_", {"key_weight": x(8, 4)}, r"key_weight .*\(8, 3\).*\(8, 4\)"),
        ("linear_scatter_", {"value_weight": x(9, 3)}, r"value_weight .*\(8, 3\).*\(9, 3\)"),
        ("linear_scatter_", {"key_bias": x(9)}, r"key_bias .*\(8,\).*\(9,\)"),
        ("linear_scatter_", {"value_bias": None}, "key_bias and value_bias"),
        ("linear_scatter_", {"key_changes": None}, "key_changes and value_changes"),
        ("linear_scatter_", {"value_changes": x(2, 6, 8)}, r"value_changes .*\(2, 6, 8\)"),
        ("qkv_scatter_", {"index": None, "tokens": x(2, 7, 3)}, r"no more .*\(2, 7, 3\)"),
        ("qkv_scatter_", {"index": None, "text": x(3)}, r"text must be \(2, T, 3\).*\(3,\)"),
        ("qkv_scatter_", {"text": x(3)}, r"text must be \(2, T, 3\).*\(3,\)"),
        (
            "qkv_scatter_",
            {"index": torch.zeros(2, 7, dtype=torch.int64), "tokens": x(2, 7, 3)},
            r"no more .*\(2, 7, 3\)",
        ),
        ("qkv_scatter_", {"text": x(2, 3, 3)}, r"key_changes .*first rows.*\(2, 6, 2, 4\)"),
        ("qkv_scatter_", {"text": x(2, 2, 4)}, r"text must be \(2, T, 3\).*\(2, 2, 4\)"),
        ("qkv_scatter_", {"text": None}, "text is None"),
        ("qkv_scatter_", {"weights": [x(12, 3), x(9, 3), x(8, 3)]}, r"\bkey_weight .*\(9, 3\)"),
        ("qkv_scatter_", {"weights": [x(12, 4), x(8, 3), x(8, 3)]}, r"query_weight .*\(12, 4\)"),
        (
            "qkv_scatter_",
            {"text_weights": [x(8, 3)] * 3, "text_biases": [x(8)] * 3},
            "text_query_weight must have 12",
        ),
        ("qkv_scatter_", {"text_weights": [None] * 3}, "text_query_weight .*None"),
        ("qkv_scatter_", {"biases": [x(12), None, x(8)]}, "query_bias and key_bias and value_bias"),
        ("qkv_scatter_", {"text_biases": [None] * 3}, "text_biases"),
        *(
            expanded("linear_scatter_", argument)
            for argument in ("key", "value", "key_changes", "value_changes")
        ),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(name, wrong, said):
    getattr(ras_kernels, name)(**right()[name])  # which are remembered to be right
    arguments = {**right()[name], **wrong}
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor) and not t.is_meta]
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(ValueError, match=said):
        getattr(ras_kernels, name)(**arguments)
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("setting, checked", [("1", True), ("0", False), ("", False)])
def test_a_switch_has_indices_checked_on_gpus(monkeypatch, setting, checked):
    monkeypatch.setenv("RAS_KERNELS_CHECK_INDICES", setting)
    assert runpy.run_path(_checks.__file__)["CHECKS_INDICES"] is checked
