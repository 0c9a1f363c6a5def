"""`sparse_attention` against its definition in float64."""

import math

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


# --- two queries, their outputs and the sums of their scores --------------------------------------


def operands(dtype=torch.float32, size=72, keys=70):
    query, second = (normal(4, rows, 2, size, dtype=dtype, seed=rows) for rows in (9, 5))
    key, value = (normal(4, keys, 1, size, dtype=dtype, seed=seed) for seed in (1, 2))
    return query, second, key, value


@pytest.mark.parametrize("given_by", ["nothing", "mask", "lengths"])
@pytest.mark.parametrize("scale", [None, -0.7, 0.0])
@pytest.mark.parametrize("size", [8, 72])
def test_lse(size, scale, given_by):
    """The logarithm of the sum of exponentials; minus infinity without a key."""
    query, _, key, value = operands(size=size)
    lengths = torch.tensor([70, 0, 33, 64], device=DEVICE)
    seen = torch.arange(70, device=DEVICE) < lengths[:, None]
    option = dict(nothing={}, mask=dict(key_mask=seen), lengths=dict(key_lengths=lengths))[given_by]
    out, lse = ras_kernels.sparse_attention(
        query, key, value, **option, scale=scale, return_lse=True
    )
    plain = ras_kernels.sparse_attention(query, key, value, **option, scale=scale)
    assert torch.equal(out, plain)
    scores = torch.einsum("bkhd,bshd->bhks", query.double(), key.double().repeat_interleave(2, 2))
    scores *= size**-0.5 if scale is None else scale
    if option:
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
def test_merged_states_are_those_of_all_keys(dtype):
    """Of which one part, the other, both and none have any for some sample."""
    query, _, key, value = operands(dtype)
    lengths = torch.tensor([[40, 0, 33, 0], [30, 30, 0, 0]], device=DEVICE)
    parts = key.split([40, 30], 1), value.split([40, 30], 1)
    states = [
        ras_kernels.sparse_attention(query, *part, key_lengths=length, return_lse=True)
        for *part, length in zip(*parts, lengths)
    ]
    out, lse = ras_kernels.merge_states(*states[0], *states[1])
    places = (torch.arange(count, device=DEVICE) for count in (40, 30))
    seen = torch.cat([place < length[:, None] for place, length in zip(places, lengths)], 1)
    options = seen, None, None
    exact = reference.sparse_attention(*map(wide, (query, key, value)), *options)
    assert out.dtype == dtype and out.is_contiguous() and (out[3] == 0).all()
    assert (out.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()
    exact = reference.attention_lse(*map(wide, (query, key)), *options)
    assert (lse[3] == -torch.inf).all()
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [0.0, 100.0, -100.0, 1e30, -1e30, math.inf])
def test_shares_of_states(size):
    """Both alike, and one that outweighs the other, however large the sums of their scores are."""
    first, second = (normal(1, 3, 2, 8, seed=seed) for seed in (1, 2))
    lses = torch.full((2, 1, 2, 3), size, device=DEVICE)
    lses[1, 0, 1] -= torch.inf  # head 1 is of the first state alone
    lses[1, 0, 1].nan_to_num_(-torch.inf, neginf=-torch.inf)
    found, lse = ras_kernels.merge_states(first, lses[0], second, lses[1])
    expected = torch.stack([(first + second)[:, :, 0] / 2, first[:, :, 1]], 2)
    expected = expected if size < math.inf else torch.full_like(expected, math.nan)
    torch.testing.assert_close(found, expected, equal_nan=True)
    torch.testing.assert_close(lse[:, 1], lses[0, :, 1])
    torch.testing.assert_close(lse[:, 0], lses[0, :, 0] + math.log(2))


@pytest.mark.parametrize("how", ["dense", "part", "heads first", "gaps"])
def test_two_queries_are_one_after_the_other(how):
    """Bit for bit, in outputs of the caller's, which need not be aligned."""
    query, second, key, value = operands(torch.float16)
    lengths = torch.tensor([70, 0, 33, 64], device=DEVICE)
    options = dict(key_lengths=lengths, return_lse=True)
    expected = [ras_kernels.sparse_attention(one, key, value, **options) for one in (query, second)]
    rooms = [one.new_full((one.numel() + 2,), torch.nan) for one in (query, second)]
    out = tuple(room[1:-1].view(one.shape) for room, one in zip(rooms, (query, second)))
    outs, lses = ras_kernels.sparse_attention(
        (laid(query, how), laid(second, "heads first")), key, value, **options, out=out
    )
    assert all(a is b for a, b in zip(outs, out))
    for state, *found in zip(expected, outs, lses):
        assert all(map(torch.equal, state, found))
    assert all(room[0].isnan() and room[-1].isnan() for room in rooms)
    some = ras_kernels.sparse_attention((query[:, :0], second), key, value)
    assert some[0].shape == (4, 0, 2, 72)
    torch.testing.assert_close(some[1], ras_kernels.sparse_attention(second, key, value))


@pytest.mark.parametrize(
    "change, error, told",
    [
        (dict(query=(1, 2)), TypeError, "query must be a tensor or a pair of tensors"),
        (dict(second=lambda q: q[..., :4]), ValueError, "second query .* but for K"),
        (dict(second=lambda q: q.double()), ValueError, "second is torch.float64"),
        (dict(out=torch.zeros(3)), TypeError, "out must be .* a pair"),
        (dict(out=lambda q: q.new_empty(4, 2, 9, 8).transpose(1, 2)), ValueError, "contiguous"),
        (dict(out=lambda q: q[:, :3].contiguous()), ValueError, r"out must .*\(4, 9, 2, 8\)"),
        (dict(out=lambda q: q.double()), ValueError, "out is torch.float64"),
    ],
)
def test_what_two_queries_must_be(change, error, told):
    query, second, key, value = operands(size=8)
    queries, out = (query, second), None
    if "query" in change:
        queries = change["query"]
    elif "second" in change:
        queries = query, change["second"](second)
    else:
        out = change["out"]
        out = (out(query), torch.empty_like(second)) if callable(out) else out
    with pytest.raises(error, match=told):
        ras_kernels.sparse_attention(queries, key, value, out=out)


@pytest.mark.parametrize("other", ["query", "second", "key", "value", "lengths", "out"])
def test_an_output_shares_no_memory(other):
    """Not even in part; what lies beside it in one storage is another matter."""
    room = torch.zeros(4096, device=DEVICE)
    sizes = dict(query=(4, 9, 2, 8), second=(4, 5, 2, 8), key=(4, 7, 2, 8), value=(4, 7, 2, 8))
    given = {name: normal(*size) for name, size in sizes.items()}
    given |= {
        "lengths": torch.full((4,), 7, device=DEVICE),
        "out": torch.empty_like(given["query"]),
    }
    out = {"first": torch.empty_like(given["query"]), "second": torch.empty_like(given["second"])}

    def call():
        queries, outs = (given["query"], given["second"]), (out["first"], out["second"])
        options = dict(key_lengths=given["lengths"], out=outs)
        return ras_kernels.sparse_attention(queries, given["key"], given["value"], **options)

    def placed(tensor, at):
        part = room[at : at + tensor.numel() * tensor.element_size() // 4]
        return part.view(tensor.dtype).view(tensor.shape).copy_(tensor.clone())

    expected = [one.clone() for one in call()]
    out["second"] = placed(out["second"], 8)
    end = 8 + out["second"].numel()
    place, name = (out, "first") if other == "out" else (given, other)
    place[name] = placed(place[name], end)  # beside it
    assert all(map(torch.equal, call(), expected))
    place[name] = placed(place[name], end - 2)
    before = room.clone()
    with pytest.raises(ValueError, match="out is written, and must share no memory"):
        call()
    assert torch.equal(room, before)
