"""The ops of `ras_kernels` against their definitions in float64, by whatever runs them here.

On a GPU that is the compiled kernels; with TRITON_INTERPRET=1 (see `test_interpreter.py`) Triton's
interpreter; otherwise the definitions, which `test_ops.py` holds against plain loops.
"""

import contextlib
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import ras_kernels
from ras_kernels import _checks, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu" and ras_kernels.backend("cpu") == "triton"

COMPUTED = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            INTERPRETED, reason="Triton's interpreter computes with the bits of bf16 as integers"
        ),
    ),
]
COPIED = [
    torch.int8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.complex64,
    torch.int64,
    torch.float64,
]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LAYER_NORM = "layer_norm_across_heads"

few = settings(max_examples=12, deadline=None, derandomize=True, database=None)
more = settings(few, max_examples=25)


# --- tensors --------------------------------------------------------------------------------------


def normal(*shape, seed=0, dtype=torch.float32):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, dtype)


def any_bits(*shape, seed=0, dtype):
    """NaNs of all kinds among them."""
    count, generator = math.prod(shape) * dtype.itemsize, torch.Generator().manual_seed(seed)
    values = torch.randint(256, (count,), dtype=torch.uint8, generator=generator)
    return values.view(dtype).view(shape).to(DEVICE)


def turns(*shape):
    return torch.polar(torch.ones(shape, device=DEVICE), normal(*shape, seed=5))


LAYOUTS = ["dense", "offset", "rows", "part", "rows first", "heads first", "gaps"]
READ = [*LAYOUTS, "expanded"]
layouts, read = st.sampled_from(LAYOUTS), st.sampled_from(READ)


def laid(tensor, how):
    """The same values in a storage that is poisoned wherever they do not lie.

    `offset` is contiguous, but starts at an odd place; `rows` and `part` lie within a larger
    tensor, the first so that rows stay as aligned as they were; `gaps` takes every second column;
    `expanded` repeats the first sample.
    """
    poison = math.nan if tensor.is_floating_point() or tensor.is_complex() else 77
    if how == "expanded":
        return laid(tensor[:1], "part").expand_as(tensor)
    if how == "offset":
        whole = tensor.new_full([tensor.numel() + 2], poison)
        return whole[1:-1].view(tensor.shape).copy_(tensor)
    dims = range(tensor.ndim)
    order = [*dims]
    first = {"rows first": 0, "heads first": 1}.get(how, tensor.ndim)
    order[first : first + 2] = reversed(order[first : first + 2])
    edges = [{"dense": 0, "rows": int(dim == 1)}.get(how, 1) for dim in dims]
    steps = [2 if how == "gaps" and dim == tensor.ndim - 1 else 1 for dim in dims]
    room = [2 * edge + step * size for edge, step, size in zip(edges, steps, tensor.shape)]
    whole = tensor.new_full([room[dim] for dim in order], poison)
    parts = [slice(e, e + step * size, step) for e, step, size in zip(edges, steps, tensor.shape)]
    return whole.permute([order.index(dim) for dim in dims])[tuple(parts)].copy_(tensor)


def far(tensor, dim):
    """The same values, so far apart along `dim` that the last lies 2**31 elements from the first.

    What lies between is never touched, and takes no memory on Linux.
    """
    strides = list(tensor.contiguous().stride())
    strides[dim] = 64 * math.ceil(2**31 / 64 / (tensor.shape[dim] - 1))
    size = 1 + sum(stride * (size - 1) for stride, size in zip(strides, tensor.shape))
    return tensor.new_empty(size).as_strided(tensor.shape, strides).copy_(tensor)


def bits(tensor):
    return tensor.contiguous().view(BITS[tensor.element_size()])


def outside(tensor, index):
    """The bits of all that lies in the storage of `tensor`, but for its rows `index`."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    written = torch.zeros(size, dtype=torch.bool, device=tensor.device)
    rows = written.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    reference.scatter_tokens_(rows, index, True)
    return bits(tensor.as_strided((size,), (1,), 0)[~written])


@contextlib.contextmanager
def only_rows(index, *tensors):
    """Nothing else is written in the storages of the tensors."""
    before = [outside(tensor, index) for tensor in tensors]
    yield
    for tensor, bits_before in zip(tensors, before):
        assert torch.equal(outside(tensor, index), bits_before)


@st.composite
def indices(draw, batch, tokens):
    """`(B, K)` or `(1, K)`, in any order and layout."""
    count = draw(st.sampled_from([1, tokens]) | st.integers(0, tokens))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    order = torch.rand(draw(st.sampled_from([batch, 1])), tokens, generator=generator).argsort(1)
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return laid(order[:, :count].to(DEVICE, dtype), draw(read))


# --- tolerance ------------------------------------------------------------------------------------


def wide(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def check(found, exact, same):
    """At most twice the error that the definition itself makes in this dtype, and one rounding."""
    assert found.shape == exact.shape and found.dtype == same.dtype
    if not exact.numel():
        return
    rounding = torch.finfo(found.dtype).eps * exact.abs().max().item()
    error, error_of_same = ((t.double() - exact).abs().max().item() for t in (found, same))
    assert error_of_same <= 16 * rounding  # or the bound below would say nothing
    assert error <= 2 * error_of_same + rounding


# --- copies ---------------------------------------------------------------------------------------

batches, counts = st.integers(0, 3), st.integers(1, 9) | st.just(70)
trailing = st.sampled_from([(), (1,), (9,), (72,), (2, 5), (4, 9), (2, 3, 4), (0,), (1030,)])


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


@few
@given(st.data(), batches, counts)
def test_merged_noise_is_a_copy(data, batch, tokens):
    index = data.draw(indices(batch, tokens))
    cached = laid(normal(batch, tokens, 5), data.draw(layouts))
    fresh = laid(normal(batch, index.shape[1], 5, seed=1), data.draw(read))
    expected = cached.clone()
    reference.scatter_tokens_(expected, index, fresh)
    with only_rows(index, cached):
        merged = ras_kernels.merge_noise_(cached, index, fresh)
    assert torch.equal(merged, expected) and torch.equal(cached, expected)
    merged.zero_()
    assert torch.equal(cached, expected)


# --- changes --------------------------------------------------------------------------------------


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


# --- attention ------------------------------------------------------------------------------------


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
    st.sampled_from([None, 0.3]),
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
        some = data.draw(st.lists(st.integers(0, keys + 1), min_size=batch, max_size=batch))
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


# --- regions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
@pytest.mark.parametrize("metric", ras_kernels.METRICS)
@more
@given(
    st.data(),
    batches,
    st.sampled_from([1, 4, 16]),
    st.integers(1, 3),
    st.sampled_from([(1, 1), (3, 5), (12, 11)]),
    st.booleans(),
)
def test_region_scores(dtype, metric, data, batch, channels, patch, regions, packed):
    sides = [patch * side for side in regions]
    shape = (math.prod(regions), patch**2 * channels) if packed else (channels, *sides)
    noise = laid(normal(batch, *shape, dtype=dtype), data.draw(read))
    found = ras_kernels.region_scores(noise, patch, metric)
    exact = reference.region_scores(wide(noise), patch, metric).double()
    check(found, exact, reference.region_scores(noise, patch, metric))


@pytest.mark.parametrize("starvation_scale", [0.0, 0.7310585])
@more
@given(
    st.data(),
    batches,
    st.sampled_from([1, 2, 7, 128, 129, 300, 1030]),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.booleans(),
)
def test_selection_is_the_definitions_to_the_last_tie(
    starvation_scale, data, batch, regions, high_ratio, unusual
):
    num_active = data.draw(st.sampled_from([1, regions]) | st.integers(1, regions))
    scores = (5 * normal(batch, regions)).round().abs()
    if unusual:
        for at, value in enumerate([math.nan, math.inf, -0.0, -math.inf, math.nan]):
            scores[:, 3 * at :: 29] = value
    ages = normal(batch, regions, seed=1).abs().mul(3)
    ages = ages.to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    scores, ages = (laid(tensor, data.draw(read)) for tensor in (scores, ages))
    before = ages.clone()
    active, after = ras_kernels.select_regions(
        scores, ages, num_active, high_ratio=high_ratio, starvation_scale=starvation_scale
    )
    expected = reference.select_regions(scores, ages, num_active, high_ratio, starvation_scale)
    assert active.dtype == torch.int32 and after.dtype == ages.dtype
    assert torch.equal(active, expected[0]) and torch.equal(after, expected[1])
    assert torch.equal(ages, before)


# --- norms and positions --------------------------------------------------------------------------

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
    index = data.draw(indices(batch, count))
    tokens = normal(batch, index.shape[1], *heads, dtype=dtype, seed=1)
    tokens = laid(tokens, data.draw(read))
    how = data.draw(options(norm, tokens))
    out = laid(normal(batch, count, *heads, dtype=dtype), data.draw(layouts))
    changes = laid(torch.full_like(out, math.nan), data.draw(layouts)) if with_changes else None
    old = reference.gather_tokens(out, index)
    with only_rows(index, out, *[changes] * with_changes):
        result = ras_kernels.norm_rotary_scatter_(out, index, tokens, changes=changes, **how)
    assert result is out
    exact = reference.norm_rotary(wide(tokens), **{name: wide(how[name]) for name in how})
    same = reference.norm_rotary(tokens, **how)
    check(reference.gather_tokens(out, index), exact, same)
    if with_changes:
        check(reference.gather_tokens(changes, index), exact - wide(old), same - old)


# --- projections ----------------------------------------------------------------------------------


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
    index = data.draw(indices(batch, count))
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
            index,
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


# --- all ops --------------------------------------------------------------------------------------


def calls():
    """Each op, with all that it takes: a function of tensors, and the tensors."""
    half = partial(normal, dtype=torch.float16)
    index = torch.tensor([[2, 0, 1], [1, 2, 0], [0, 1, 2]], dtype=torch.int32, device=DEVICE)
    tokens, rows, heads = (3, 3, 3, 4), half(3, 3, 3, 4, seed=1), (3, 3, 3, 8)
    norm = dict(weight=half(24, seed=2), bias=half(24, seed=3), rotary=turns(3, 3, 4))
    select = partial(ras_kernels.select_regions, num_active=2, high_ratio=0.3, starvation_scale=1.0)
    ages = torch.arange(9, device=DEVICE).view(3, 3)
    return {
        "gather_tokens": (ras_kernels.gather_tokens, dict(tokens=half(*tokens), index=index)),
        "scatter_tokens_": (
            ras_kernels.scatter_tokens_,
            dict(tokens=half(*tokens), index=index, rows=rows),
        ),
        "merge_noise_": (
            ras_kernels.merge_noise_,
            dict(cached=half(3, 3, 4), index=index, fresh=half(3, 3, 4, seed=1)),
        ),
        "update_tokens_": (
            ras_kernels.update_tokens_,
            dict(tokens=half(*tokens), changes=half(*tokens, seed=2), index=index, rows=rows),
        ),
        "carry_tokens": (
            ras_kernels.carry_tokens,
            dict(tokens=half(*tokens), changes=rows, gain=normal(3, 3)),
        ),
        "sparse_attention": (
            ras_kernels.sparse_attention,
            dict(query=half(*heads), key=half(*heads, seed=1), value=half(*heads, seed=2)),
        ),
        "region_scores": (
            partial(ras_kernels.region_scores, patch_size=3),
            dict(noise=half(3, 4, 3, 3)),
        ),
        "region_scores, packed": (
            partial(ras_kernels.region_scores, patch_size=2),
            dict(noise=half(3, 3, 16)),
        ),
        "select_regions": (select, dict(scores=half(3, 3), ages=ages)),
        "norm_rotary": (
            partial(ras_kernels.norm_rotary, norm=LAYER_NORM),
            dict(tokens=half(*heads), **norm),
        ),
        "norm_rotary_scatter_": (
            partial(ras_kernels.norm_rotary_scatter_, norm=LAYER_NORM),
            dict(
                out=half(*heads, seed=4),
                changes=half(*heads, seed=5),
                index=index,
                tokens=half(*heads),
                **norm,
            ),
        ),
        "norm_rotary_scatter_, per head": (
            partial(ras_kernels.norm_rotary_scatter_, norm="rms_norm"),
            dict(
                out=half(*heads, seed=4),
                changes=half(*heads, seed=5),
                index=index,
                tokens=half(*heads),
                rotary=norm["rotary"],
            ),
        ),
        "linear_scatter_": (
            ras_kernels.linear_scatter_,
            dict(
                key=half(*heads, seed=1),
                value=half(*heads, seed=2),
                index=index,
                tokens=half(3, 3, 16),
                key_weight=half(24, 16, seed=3),
                value_weight=half(24, 16, seed=4),
                key_bias=half(24, seed=5),
                value_bias=half(24, seed=6),
                key_changes=half(*heads, seed=7),
                value_changes=half(*heads, seed=8),
            ),
        ),
    }


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
