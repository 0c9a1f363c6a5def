"""What holds for every op: far offsets, and indices that are checked before a write."""

import pytest
import torch
from support.operands import calls, far

from ras_kernels import _checks


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


@pytest.mark.parametrize("name", [name for name, call in calls().items() if "index" in call[1]])
@pytest.mark.parametrize("off", [-1, 1])
def test_an_index_out_of_range_is_named_before_anything_is_written(monkeypatch, name, off):
    """On GPUs with the switch that `test_ops.py` looks at, on CPUs always."""
    monkeypatch.setattr(_checks, "CHECKS_INDICES", True)
    call, tensors = calls()[name]
    tensors["index"] = tensors["index"] + off
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"index must be in \[0, 3\)"):
        call(**tensors)
    torch.testing.assert_close(tensors, before, rtol=0, atol=0)
