"""Caches of 8 bits: how near codes are to what was written, by what is derived, in float64."""

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
    codes_of,
    counts,
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

CODES = pytest.mark.parametrize("kind", ras_kernels.CODES, ids=str)
DTYPES = pytest.mark.parametrize("dtype", COMPUTED, ids=str)
heads = st.sampled_from([(1, 1), (2, 5), (3, 40), (2, 72), (1, 128), (0, 8)])


def values(codes, scales):
    """What they stand for, in float64."""
    return codes.double() * scales.double()[..., None]


def bound(rows, kind, rounding=2**-13):
    """How far codes may be from rows.

    In int8 half a step, which is a 127th of the largest. In float8_e4m3fn half a unit in the last
    of three binary places, a 16th, or half of the smallest step, 2**-10 of a scale, which is a
    448th of the largest. `rounding` is of scale and quotient in float32, 2**-23 of up to 448.
    """
    rows = rows.double().abs()
    scale = rows.amax(-1, keepdim=True) / reference.LARGEST_CODE[kind]
    if kind == torch.int8:
        return scale * (0.5 + rounding)
    return torch.maximum(rows / 16, scale * 2**-10) + scale * rounding


def like(kind, *shape):
    return torch.zeros(shape, dtype=kind, device=DEVICE), torch.zeros(shape[:-1], device=DEVICE)


@CODES
@DTYPES
@more
@given(st.data(), batches, counts, heads, st.booleans(), st.booleans())
def test_quantize_tokens(kind, dtype, data, batch, tokens, head, all_rows, changed):
    """Rows that an index names, within the bound; nothing else is written."""
    shape = (batch, tokens, *head)
    index = None if all_rows else data.draw(indices(batch, tokens))
    rows = torch.arange(tokens, device=DEVICE)[None] if all_rows else index
    codes, scales = (
        laid(part, data.draw(layouts), 0) for part in codes_of(*shape, seed=1, dtype=kind)
    )
    beside = [laid(part, data.draw(layouts), 0) for part in codes_of(*shape, seed=2, dtype=kind)]
    size = 2.0 ** torch.arange(head[0], device=DEVICE)[:, None]  # heads of scales of their own
    new = laid((normal(batch, rows.shape[1], *head) * size).to(dtype), data.draw(read))
    old = values(*(reference.gather_tokens(part, rows) for part in (codes, scales)))
    options = dict(change_codes=beside[0], change_scales=beside[1]) if changed else {}
    with only_rows(rows, codes, scales, *(beside if changed else ())):
        written = ras_kernels.quantize_tokens_(codes, scales, index, new, **options)
    assert written[0] is codes and written[1] is scales
    found = values(*(reference.gather_tokens(part, rows) for part in (codes, scales)))
    assert ((found - new.double()).abs() <= bound(new, kind)).all()
    if changed:
        change = new.double() - old
        found = values(*(reference.gather_tokens(part, rows) for part in beside))
        rounded = 2**-22 * torch.maximum(new.double().abs(), old.abs())
        assert ((found - change).abs() <= bound(change, kind) + 2 * rounded).all()


@CODES
@DTYPES
@more
@given(st.data(), batches, counts | st.just(0), st.integers(0, 3), heads, st.booleans())
def test_dequantize_tokens(kind, dtype, data, batch, carried, rest, head, changed):
    """What the codes stand for, to a rounding; rows of a gain of 0 as without changes."""
    codes, scales = (
        laid(part, data.draw(read), 0)
        for part in codes_of(batch, carried + rest, *head, seed=1, dtype=kind)
    )
    beside = [
        laid(part, data.draw(read), 0)
        for part in codes_of(batch, carried, *head, seed=2, dtype=kind)
    ]
    gain = laid(F.relu(normal(batch, carried, seed=3)), data.draw(read))  # half of it zeros
    names = ("change_codes", "change_scales", "gain")
    options = dict(zip(names, (*beside, gain))) if changed else {}
    found = ras_kernels.dequantize_tokens(codes, scales, dtype, **options)
    assert found.is_contiguous() and found.dtype == dtype
    exact = plain = values(codes, scales)
    if changed:
        exact = reference.carry_tokens(plain, values(*beside), gain)
        still = F.pad(gain == 0, (0, rest), value=True)
        assert torch.equal(found[still], ras_kernels.dequantize_tokens(codes, scales, dtype)[still])
    check(found, exact, exact.to(dtype))


@CODES
def test_every_code(kind):
    """All bits of a row are read as PyTorch reads them, and written again as they are."""
    every = torch.arange(-128, 128, dtype=torch.int8, device=DEVICE)
    scales = torch.full((1, 1, 1), 0.75, device=DEVICE)
    read = ras_kernels.dequantize_tokens(every.view(kind)[None, None, None], scales, torch.float32)
    exact = values(every.view(kind)[None, None, None], scales)  # two of float8 are NaN
    torch.testing.assert_close(read.double(), exact, rtol=0, atol=0, equal_nan=True)
    every = every[every != -128 if kind == torch.int8 else (every & 0x7F) != 0x7F]
    codes = every.view(kind)[None, None, None]
    found = ras_kernels.dequantize_tokens(codes, scales, torch.float32)
    assert torch.equal(found.double(), values(codes, scales))
    again, own = like(kind, *codes.shape)
    ras_kernels.quantize_tokens_(again, own, None, found)
    assert torch.equal(own, scales) and torch.equal(again.double(), codes.double())


@CODES
def test_rounding_is_to_the_nearest_and_of_halves_to_the_even(kind):
    """Of numbers of all sizes, some halfway between two codes, as PyTorch rounds them."""
    most = reference.LARGEST_CODE[kind]
    if kind == torch.int8:
        halves = torch.arange(-126.5, 127)
    else:
        some = torch.arange(0x7F, dtype=torch.int8).view(kind).float()
        halves = (some[1:] + some[:-1]) / 2
    spread = 2.0 ** torch.linspace(-14, math.log2(most), 1500)
    row = torch.cat([halves, spread, -spread, torch.tensor([most, 0.0])]).to(DEVICE)[None, None]
    pairs = torch.stack([torch.full_like(row, most), row], -1)  # so that each scale is 1
    codes, scales = like(kind, *pairs.shape)
    ras_kernels.quantize_tokens_(codes, scales, None, pairs)
    assert (scales == 1).all()
    expected = pairs.round().to(kind) if kind == torch.int8 else pairs.to(kind)
    assert torch.equal(codes.double(), expected.double())


@CODES
@pytest.mark.parametrize("changed", [False, True])
def test_rows_that_are_no_numbers_and_rows_of_nothing(kind, changed):
    """An infinity or a NaN spoils its own head of its own token, and is gone when it is written
    anew; what is too small for a scale is zero."""
    rows = normal(1, 7, 2, 8)
    rows[0, 0, 0, 3], rows[0, 1, 1, 0], rows[0, 2, 0, 7] = math.inf, -math.inf, math.nan
    rows[0, 3, 1] = 0
    rows[0, 4, 0] *= 2.0**-130
    rows[0, 5, 1] *= 2.0**125
    parts = [*like(kind, 1, 7, 2, 8), *like(kind, 1, 7, 2, 8)]
    codes, scales, *beside = parts
    options = dict(zip(("change_codes", "change_scales"), beside)) if changed else {}
    ras_kernels.quantize_tokens_(codes, scales, None, rows, **options)
    found = ras_kernels.dequantize_tokens(codes, scales, torch.float32)
    spoilt = ~rows.isfinite().all(-1)
    assert found[spoilt].isnan().all() and scales[spoilt].isnan().all()
    assert (codes.float()[spoilt] == 0).all()
    assert (found[0, 3, 1] == 0).all() and scales[0, 3, 1] == scales[0, 4, 0] == 0
    assert (found[0, 4, 0] == 0).all()
    error = (found.double() - rows.double()).abs()
    assert (error <= bound(rows, kind) + 2.0**-117)[~spoilt].all()
    ras_kernels.quantize_tokens_(codes, scales, None, normal(1, 7, 2, 8, seed=1), **options)
    assert scales.isfinite().all()
    if not changed:
        return
    assert beside[1].isnan().equal(spoilt)  # the change from no number is none, either
    gain = torch.zeros(1, 7, device=DEVICE)
    held = ras_kernels.dequantize_tokens(codes, scales, torch.float32, **options, gain=gain)
    assert torch.equal(held, ras_kernels.dequantize_tokens(codes, scales, torch.float32))


def test_scales_are_of_a_head_of_a_token_each():
    """Heads of very different sizes in one token: a scale for all of them would lose the small."""
    rows = normal(2, 5, 4, 32) * torch.tensor([1e-4, 1.0, 1e2, 1e4], device=DEVICE)[:, None]
    for kind in ras_kernels.CODES:
        codes, scales = like(kind, *rows.shape)
        ras_kernels.quantize_tokens_(codes, scales, None, rows)
        found = ras_kernels.dequantize_tokens(codes, scales, torch.float32)
        error = (wide(found) - wide(rows)).norm(dim=-1) / wide(rows).norm(dim=-1)
        assert error.max() < (0.015 if kind == torch.int8 else 0.05)
