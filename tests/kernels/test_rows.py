"""Rows that are gathered and scattered: copies, to the bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.operands import (
    DEVICE,
    any_bits,
    batches,
    bits,
    counts,
    indices,
    laid,
    layouts,
    more,
    normal,
    only_rows,
    read,
    trailing,
)

import ras_kernels
from ras_kernels import reference

COPIED = [
    torch.int8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.complex64,
    torch.int64,
    torch.float64,
]


@pytest.mark.parametrize("dtype", COPIED, ids=str)
@more
@given(st.data(), batches, counts, trailing)
def test_gather_and_scatter_copy_every_bit(dtype, data, batch, tokens, row):
    index = data.draw(indices(batch, tokens))
    values = any_bits(batch, tokens, *row, dtype=dtype)
    there = laid(values, data.draw(read))
    gathered = ras_kernels.gather_tokens(there, index)
    assert gathered.is_contiguous() and gathered.dtype == dtype
    assert torch.equal(bits(gathered), bits(reference.gather_tokens(there, index)))

    new = laid(any_bits(*gathered.shape, dtype=dtype, seed=1), data.draw(read))
    there = laid(values, data.draw(layouts))
    with only_rows(index, there):
        assert ras_kernels.scatter_tokens_(there, index, new) is there
    assert torch.equal(bits(reference.gather_tokens(there, index)), bits(new))


def test_rows_of_sixteen_byte_elements_are_copied_too():
    tokens = normal(2, 5, 3).to(torch.complex128)
    index = torch.tensor([[3, 0]], device=DEVICE)
    rows = ras_kernels.gather_tokens(tokens, index)
    assert torch.equal(rows, tokens[:, [3, 0]])
    ras_kernels.scatter_tokens_(tokens, index, -rows)
    assert torch.equal(tokens[:, [3, 0]], -rows)
