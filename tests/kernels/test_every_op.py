"""What holds for every op: far offsets, vectors of any strides, indices checked before a write."""

import pytest
import torch
from support.operands import DEVICE, calls, far, half, laid

import ras_kernels
from ras_kernels import _checks, reference


@pytest.mark.parametrize("name", calls())
def test_offsets_beyond_two_to_the_31(name):
    """Of each float16 tensor along each dimension; an index of that size would take 8 GB."""
    call, near = calls()[name]
    expected = call(**near)
    for argument, tensor in calls()[name][1].items():
        for dim in range(tensor.ndim if tensor.dtype == torch.float16 else 0):
            tensors = calls()[name][1]
            tensors[argument] = far(tensor, dim)
            torch.testing.assert_close(call(**tensors), expected, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(tensors, near, rtol=1e-2, atol=1e-2)


def vectors():
    """`calls`, and what attention takes one of."""
    call, tensors = calls()["sparse_attention"]
    lengths = torch.tensor([2, 0, 3], device=DEVICE)
    seen = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1]], dtype=torch.bool, device=DEVICE)
    return calls() | {
        "sparse_attention, key_lengths": (call, {**tensors, "key_lengths": lengths}),
        "sparse_attention, key_mask": (call, {**tensors, "key_mask": seen}),
    }


WRITTEN = ("update_drift_", "pace"), ("update_drift_", "since")


@pytest.mark.parametrize("name", vectors())
def test_vectors_of_any_strides(name):
    """Arguments of up to two dimensions do what the same values side by side do."""
    for argument, tensor in vectors()[name][1].items():
        for how in ("gaps", "rows first", "expanded") if tensor.ndim < 3 else ():
            if how == "expanded" and (name, argument) in WRITTEN:
                continue
            found, expected = ({**vectors()[name][1]} for _ in range(2))
            found[argument] = laid(tensor, how)
            expected[argument] = found[argument].clone(memory_format=torch.contiguous_format)
            results = [vectors()[name][0](**found), vectors()[name][0](**expected)]
            torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
            if results[0] is not None:
                torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)


INT64 = torch.iinfo(torch.int64)


@pytest.mark.parametrize("length", [INT64.min, -(2**32) + 1, 2**31, 2**32 + 1, INT64.max])
def test_key_lengths_at_the_limits(length):
    query, key, value = (half(2, 3, 2, 8, seed=seed) for seed in range(3))
    lengths = torch.tensor([length, 2], device=DEVICE)
    found, expected = (
        ras_kernels.sparse_attention(query, key, value, key_lengths=some)
        for some in (lengths, lengths.clamp(0, 3))
    )
    assert torch.equal(found, expected)


def test_what_lies_past_key_lengths_or_the_mask_does_not_matter_to_the_definition():
    """Nor to the kernel, which `test_poison.py` has for all that must not matter."""
    query, key, value = (half(2, 3, 2, 8, seed=seed) for seed in range(3))
    lengths = torch.tensor([0, 2], device=DEVICE)
    past = torch.arange(3, device=DEVICE) >= lengths[:, None]
    for given in ((None, lengths), (~past, None)):
        clean = reference.sparse_attention(query, key, value, *given, None)
        spoilt = (t.masked_fill(past[:, :, None, None], torch.nan) for t in (key, value))
        assert torch.equal(reference.sparse_attention(query, *spoilt, *given, None), clean)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ages_at_the_limits(dtype):
    scores, limits = half(1, 6), torch.iinfo(dtype)
    ages = [limits.max - 1, 0, limits.max - 1, limits.max // 2, 1, limits.min]
    ages = torch.tensor([ages], dtype=dtype, device=DEVICE)
    found = ras_kernels.select_regions(scores, ages, 2, high_ratio=0.3, starvation_scale=1.0)
    assert found[0].tolist() == [[0, 2]]
    torch.testing.assert_close(found, reference.select_regions(scores, ages, 2, 0.3, 1.0))


@pytest.mark.parametrize("name", [name for name, call in calls().items() if "index" in call[1]])
@pytest.mark.parametrize("off", [-1, 1, 2**32, -(2**63)])
def test_an_index_out_of_range_is_named_before_anything_is_written(monkeypatch, name, off):
    """On GPUs with the switch that `test_wrong_arguments.py` looks at, on CPUs always."""
    monkeypatch.setattr(_checks, "CHECKS_INDICES", True)
    call, tensors = calls()[name]
    tensors["index"] = tensors["index"].long() + off
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"index must be in \[0, 3\)"):
        call(**tensors)
    torch.testing.assert_close(tensors, before, rtol=0, atol=0)
