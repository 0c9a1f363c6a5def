"""Rows written with what they change by, and carried on by it, against float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.operands import (
    COMPUTED,
    DEVICE,
    batches,
    check,
    counts,
    few,
    indices,
    laid,
    layouts,
    more,
    normal,
    only_rows,
    read,
    trailing,
    wide,
)
from torch.nn import functional as F

import ras_kernels
from ras_kernels import reference


@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
@more
@given(st.data(), batches, counts, trailing, st.booleans())
def test_update_tokens(dtype, data, batch, tokens, row, all_rows):
    index = None if all_rows else data.draw(indices(batch, tokens))
    rows = torch.arange(tokens, device=DEVICE)[None] if all_rows else index
    there = laid(normal(batch, tokens, *row, dtype=dtype), data.draw(layouts))
    beside = laid(torch.full_like(there, math.nan), data.draw(layouts))
    new = normal(batch, rows.shape[1], *row, dtype=dtype, seed=1)
    new = laid(new, data.draw(read))
    old = reference.gather_tokens(there, rows)
    with only_rows(rows, there, beside):
        assert ras_kernels.update_tokens_(there, beside, index, new) is there
    assert torch.equal(reference.gather_tokens(there, rows), new)
    check(reference.gather_tokens(beside, rows), wide(new) - wide(old), new - old)


@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
@more
@given(st.data(), batches, counts | st.just(0), st.integers(0, 3), trailing)
def test_carry_tokens(dtype, data, batch, carried, rest, row):
    tokens = laid(normal(batch, carried + rest, *row, dtype=dtype), data.draw(read))
    changes = laid(normal(batch, carried, *row, dtype=dtype, seed=1), data.draw(read))
    gain = laid(F.relu(normal(batch, carried, seed=2)), data.draw(read))  # half of it zeros
    found = ras_kernels.carry_tokens(tokens, changes, gain)
    assert found.is_contiguous()
    still = F.pad(gain == 0, (0, rest), value=True)
    assert torch.equal(found[still], tokens[still])
    exact = reference.carry_tokens(*map(wide, (tokens, changes, gain)))
    check(found, exact, reference.carry_tokens(tokens, changes, gain))


@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
@few
@given(st.data(), batches, counts | st.just(0), st.integers(0, 3), trailing)
def test_carry_keys_and_values(dtype, data, batch, carried, rest, row):
    """Each with strides of its own."""
    key, value = (
        laid(normal(batch, carried + rest, *row, dtype=dtype, seed=seed), data.draw(read))
        for seed in (0, 1)
    )
    changes = [
        laid(normal(batch, carried, *row, dtype=dtype, seed=seed), data.draw(read))
        for seed in (2, 3)
    ]
    gain = laid(F.relu(normal(batch, carried, seed=4)), data.draw(read))
    found = ras_kernels.carry_keys_and_values(key, value, *changes, gain)
    for carried_on, cache, change in zip(found, (key, value), changes):
        assert carried_on.is_contiguous()
        exact = reference.carry_tokens(*map(wide, (cache, change, gain)))
        check(carried_on, exact, reference.carry_tokens(cache, change, gain))
