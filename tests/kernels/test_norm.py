"""Norms and rotary positions, returned and scattered, against their definition in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.operands import (
    COMPUTED,
    DEVICE,
    LAYER_NORM,
    batches,
    check,
    counts,
    indices,
    laid,
    layouts,
    more,
    normal,
    only_rows,
    read,
    turns,
    wide,
)

import ras_kernels
from ras_kernels import reference

head_sizes = st.sampled_from([(1, 6), (4, 64), (3, 72), (5, 24), (2, 7)])


@st.composite
def options(draw, norm, tokens):
    """Of `norm_rotary`."""
    batch, count, heads, size = tokens.shape
    weight = bias = rotary = None
    if norm is not None:
        width = heads * size if norm == LAYER_NORM else size
        weight, bias = (
            laid(normal(width, dtype=tokens.dtype, seed=seed), draw(layouts))
            if draw(st.booleans())
            else None
            for seed in (3, 4)
        )
    if size % 2 == 0 and draw(st.booleans()):
        rotary = laid(turns(draw(st.sampled_from([1, batch])), count, size // 2), draw(read))
    eps = draw(st.sampled_from([1e-6, 0.1]))
    return dict(norm=norm, weight=weight, bias=bias, eps=eps, rotary=rotary)


@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
@pytest.mark.parametrize("norm", [None, *ras_kernels.NORMS])
@more
@given(st.data(), batches, counts | st.just(0), head_sizes)
def test_norm_rotary(dtype, norm, data, batch, count, heads):
    tokens = laid(normal(batch, count, *heads, dtype=dtype), data.draw(read))
    how = data.draw(options(norm, tokens))
    found = ras_kernels.norm_rotary(tokens, **how)
    assert found.is_contiguous()
    shares = found.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
    assert not (shares and found.numel())
    exact = reference.norm_rotary(wide(tokens), **{name: wide(how[name]) for name in how})
    check(found, exact, reference.norm_rotary(tokens, **how))


@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
@pytest.mark.parametrize("norm", [None, *ras_kernels.NORMS])
@more
@given(st.data(), batches, counts, head_sizes, st.booleans())
def test_norm_rotary_scatter(dtype, norm, data, batch, count, heads, with_changes):
    listed = data.draw(indices(batch, count) | st.none())
    index = torch.arange(count, device=DEVICE)[None] if listed is None else listed
    tokens = normal(batch, index.shape[1], *heads, dtype=dtype, seed=1)
    tokens = laid(tokens, data.draw(read))
    how = data.draw(options(norm, tokens))
    out = laid(normal(batch, count, *heads, dtype=dtype), data.draw(layouts))
    changes = laid(torch.full_like(out, math.nan), data.draw(layouts)) if with_changes else None
    old = reference.gather_tokens(out, index)
    with only_rows(index, out, *[changes] * with_changes):
        result = ras_kernels.norm_rotary_scatter_(out, listed, tokens, changes=changes, **how)
    assert result is out
    exact = reference.norm_rotary(wide(tokens), **{name: wide(how[name]) for name in how})
    same = reference.norm_rotary(tokens, **how)
    check(reference.gather_tokens(out, index), exact, same)
    if with_changes:
        check(reference.gather_tokens(changes, index), exact - wide(old), same - old)
