"""Projections straight into the cache against their definition in float64."""

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
    wide,
)
from torch.nn import functional as F

import ras_kernels
from ras_kernels import reference


@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
@pytest.mark.parametrize("with_changes", [False, True])
@more
@given(
    st.data(),
    batches,
    counts,
    st.sampled_from([1, 33, 64]),
    st.sampled_from([(1, 1), (2, 8), (3, 24), (5, 32)]),
    st.booleans(),
    st.booleans(),
)
def test_linear_scatter(dtype, with_changes, data, batch, count, depth, heads, flat, biased):
    listed = data.draw(indices(batch, count) | st.none())
    index = torch.arange(count, device=DEVICE)[None] if listed is None else listed
    width = math.prod(heads)
    tokens = laid(normal(batch, index.shape[1], depth, dtype=dtype), data.draw(read))
    how = data.draw(st.sampled_from([("dense", "dense"), ("rows", "rows")]) | st.tuples(read, read))
    weights = [
        laid(normal(width, depth, dtype=dtype, seed=seed) / depth**0.5, one)
        for seed, one in zip((1, 2), how)
    ]
    biases = [
        laid(normal(width, dtype=dtype, seed=seed), data.draw(layouts)) if biased else None
        for seed in (3, 4)
    ]
    shape = batch, count, *([width] if flat else heads)
    caches = [laid(normal(*shape, dtype=dtype, seed=s), data.draw(layouts)) for s in (5, 6)]
    changes = [
        laid(torch.full_like(cache, math.nan), data.draw(layouts)) if with_changes else None
        for cache in caches
    ]
    old = [reference.gather_tokens(cache, index) for cache in caches]
    with only_rows(index, *caches, *changes * with_changes):
        written = ras_kernels.linear_scatter_(
            *caches,
            listed,
            tokens,
            key_weight=weights[0],
            value_weight=weights[1],
            key_bias=biases[0],
            value_bias=biases[1],
            key_changes=changes[0],
            value_changes=changes[1],
        )
    for cache, returned, change, before, *linear in zip(
        caches, written, changes, old, weights, biases
    ):
        assert returned is cache
        exact = F.linear(wide(tokens), *map(wide, linear)).view(before.shape)
        same = F.linear(tokens, *linear).view(before.shape)
        check(reference.gather_tokens(cache, index), exact, same)
        if with_changes:
            check(reference.gather_tokens(change, index), exact - wide(before), same - before)


@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
def test_linear_scatter_of_more_rows_than_run_together(dtype):
    """1100 of them are more than eight tiles of 128."""
    tokens, weight = normal(2, 550, 16, dtype=dtype), normal(24, 16, seed=1, dtype=dtype)
    key, value = (normal(2, 550, 24, seed=seed, dtype=dtype) for seed in (2, 3))
    index = torch.arange(550, device=DEVICE).flip(0)[None]
    ras_kernels.linear_scatter_(key, value, index, tokens, key_weight=weight, value_weight=-weight)
    exact, same = F.linear(wide(tokens), wide(weight)), F.linear(tokens, weight)
    check(key.flip(1), exact, same)
    check(value.flip(1), -exact, -same)


@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
@pytest.mark.parametrize("with_changes", [False, True])
@few
@given(
    st.data(),
    batches,
    counts,
    st.sampled_from([None, 0, 3, 20]),
    st.sampled_from([1, 64]),
    st.sampled_from([((1, 1), 1), ((3, 24), 6), ((5, 32), 2)]),
    st.booleans(),
    st.sampled_from(["dense", "rows", "gaps"]),
)
def test_qkv_scatter(dtype, with_changes, data, batch, count, length, depth, heads, biased, how):
    """Of more query heads than key heads, with rows between those of the image and the text's."""
    listed = data.draw(indices(batch, count) | st.none())
    index = torch.arange(count, device=DEVICE)[None] if listed is None else listed
    (groups, size), query_heads = heads
    widths = query_heads * size, groups * size, groups * size
    of = {"": index.shape[1]} | ({} if length is None else {"text_": length})
    given, exact, same = {}, {}, {}
    for seed, (name, rows) in enumerate(of.items()):
        tokens = laid(normal(batch, rows, depth, dtype=dtype, seed=seed), data.draw(read))
        weights = [
            laid(normal(width, depth, dtype=dtype, seed=seed + i) / depth**0.5, how)
            for i, width in enumerate(widths)
        ]
        biases = [
            normal(width, dtype=dtype, seed=seed + 9 + i) if biased else None
            for i, width in enumerate(widths)
        ]
        given |= {name + "weights": weights, name + "biases": biases}
        given |= {"text" if name else "tokens": tokens}
        exact[name], same[name] = (
            [F.linear(*map(as_kind, (tokens, *layer))) for layer in zip(weights, biases)]
            for as_kind in (wide, lambda tensor: tensor)
        )
    end = count + 2 + (length or 0)
    caches = [
        laid(normal(batch, end, groups, size, dtype=dtype, seed=s), data.draw(layouts))
        for s in (5, 6)
    ]
    changes = [None, None]
    if with_changes:
        filled = torch.full((batch, count, groups, size), math.nan, dtype=dtype, device=DEVICE)
        changes = [laid(filled, data.draw(layouts)) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    of_text = torch.arange(end - (length or 0), end, device=DEVICE).expand(batch, -1)
    written = torch.cat([index.expand(batch, -1).long(), of_text], dim=1)
    with only_rows(written, *caches), only_rows(index, *changes * with_changes):
        queries = ras_kernels.qkv_scatter_(
            *caches, listed, **given, key_changes=changes[0], value_changes=changes[1]
        )
    assert (queries[1] is None) == (length is None)
    for found, name in zip(queries, of):
        check(found, exact[name][0], same[name][0])
    for part, (cache, change, old) in enumerate(zip(caches, changes, before), 1):
        for name, rows in (("", index), ("text_", of_text)):
            if name in of:
                found = reference.gather_tokens(cache, rows).flatten(2)
                check(found, exact[name][part], same[name][part])
        if with_changes:
            was = reference.gather_tokens(old, index).flatten(2)
            found = reference.gather_tokens(change, index).flatten(2)
            check(found, exact[""][part] - wide(was), same[""][part] - was)
