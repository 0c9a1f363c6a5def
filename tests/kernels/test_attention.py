"""`sparse_attention` against its definition in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.operands import COMPUTED, DEVICE, check, few, laid, layouts, normal, read, wide

import ras_kernels
from ras_kernels import reference


@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
@pytest.mark.parametrize("size", [8, 40, 64, 72, 96, 128])
@few
@given(
    st.data(),
    st.integers(0, 2),
    st.sampled_from(["nothing", "mask", "lengths"]),
    st.sampled_from([0, 1, 5, 33, 130]),
    st.sampled_from([0, 1, 31, 32, 33, 64, 100, 150]),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.sampled_from([None, 0.3, -0.3, 0.0]),
)
def test_attention(dtype, size, data, batch, given_by, queries, keys, heads, scale):
    query = laid(normal(batch, queries, heads[0], size, dtype=dtype), data.draw(read))
    key, value = (
        laid(normal(batch, keys, heads[1], size, dtype=dtype, seed=seed), data.draw(read))
        for seed in (1, 2)
    )
    mask = lengths = None
    seen = torch.ones(batch, keys, dtype=torch.bool, device=DEVICE)
    if given_by != "nothing":
        some = data.draw(st.lists(st.integers(-70, keys + 1), min_size=batch, max_size=batch))
        kind = data.draw(st.sampled_from([torch.int32, torch.int64]))
        lengths = torch.tensor(some, dtype=kind, device=DEVICE)
        seen = torch.arange(keys, device=DEVICE) < lengths[:, None]
    if given_by == "mask":
        if data.draw(st.booleans()):  # not only the first so many
            seen = seen.roll(keys // 2, 1) & (normal(keys) > -1)
        mask, lengths = laid(seen, data.draw(layouts)), None
    found = ras_kernels.sparse_attention(
        query, key, value, key_mask=mask, key_lengths=lengths, scale=scale
    )
    assert found.is_contiguous()
    assert (found[~seen.any(1)] == 0).all()
    options = seen, None, size**-0.5 if scale is None else scale
    exact = reference.sparse_attention(*map(wide, (query, key, value)), *options)
    check(found, exact, reference.sparse_attention(query, key, value, *options))


@pytest.mark.parametrize("given_by", ["nothing", "mask", "lengths"])
@pytest.mark.parametrize("scale", [-0.7, 30.0, -30.0, 0.0, -0.0, 1e-45, -1e-45])
def test_any_scale(scale, given_by):
    """A negative one makes the smallest score the largest, and with 0 all keys count alike."""
    query, key, value = (normal(2, rows, 1, 72, seed=rows) for rows in (3, 37, 37))
    value = key + value  # so that the scores tell in the result
    lengths = torch.tensor([37, 34], device=DEVICE)
    seen = torch.arange(37, device=DEVICE) < lengths[:, None]
    mask, lengths = dict(nothing=(None, None), mask=(seen, None), lengths=(None, lengths))[given_by]
    found = ras_kernels.sparse_attention(
        query, key, value, key_mask=mask, key_lengths=lengths, scale=scale
    )
    exact = reference.sparse_attention(*map(wide, (query, key, value)), mask, lengths, scale)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
