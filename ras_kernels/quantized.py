"""Caches of 8 bits: rows as codes with a scale for each head of a token, written and read."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._checks import FLOATS, check_floats, check_index, check_written, shapes
from ._codes import check_changes, check_codes, cut, decoded, encoded, heads_of, strides_of
from ._library import register
from ._plans import Run, launch
from ._triton import cdiv, jit, tl


def quantize_tokens_(
    codes: Tensor,
    scales: Tensor,
    index: Tensor | None,
    rows: Tensor,
    *,
    change_codes: Tensor | None = None,
    change_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write rows in place as codes, each head of a token with a scale of its own.

    `scale = max|row| / largest code; code = round(row / scale)`, so that `code * scale` is within
    `scale / 2` of an element in int8, and in float8_e4m3fn within a 16th of it or `scale / 1024`.
    A row whose largest magnitude is under `2**-117` counts as zeros, whose scale is 0; one with an
    infinity or a NaN gets a scale of NaN. One within `2**-23` of float32's largest number may be
    read as an infinity.

    Args:
        codes: `(B, N, G, D)`, int8 or float8_e4m3fn, written in place; D at least 1.
        scales: `(B, N, G)` float32, written in place.
        index: `(B, K)` or `(1, K)`, each row once per sample; None for all rows, in order.
        rows: `(B, K, G, D)`, float32, float16 or bfloat16.
        change_codes, change_scales: Like `codes` and `scales`, written in place with the difference
            of a row from what was there, if given.

    Returns:
        `codes` and `scales` themselves.
    """
    _quantize(codes, scales, change_codes, change_scales, index, rows)
    return codes, scales


def dequantize_tokens(
    codes: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
    *,
    change_codes: Tensor | None = None,
    change_scales: Tensor | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """Read rows that `quantize_tokens_` wrote, carried on by a share of their change if given.

    `codes * scales + gain * (change_codes * change_scales)`, in float32.

    Args:
        codes, scales: `(B, S, G, D)` and `(B, S, G)`, see `quantize_tokens_`.
        dtype: Of what is returned: float32, float16 or bfloat16.
        change_codes, change_scales: `(B, N, G, D)` and `(B, N, G)`; rows beyond the first N stay as
            they are.
        gain: `(B, N)` float32, the share of each; 0 for those that stay as they are, even if their
            change is NaN. All three are given, or none.

    Returns:
        `(B, S, G, D)`, contiguous.
    """
    if not isinstance(dtype, torch.dtype):  # PyTorch takes some numbers for one
        raise TypeError(f"dtype must be a torch.dtype; got a {type(dtype).__name__}")
    return _dequantize(codes, scales, change_codes, change_scales, gain, dtype)


def _check_quantize(
    codes: Tensor,
    scales: Tensor,
    change_codes: Tensor | None,
    change_scales: Tensor | None,
    index: Tensor | None,
    rows: Tensor,
) -> None:
    check_codes(codes, scales)
    if (change_codes is None) != (change_scales is None):
        raise ValueError("give change_codes and change_scales both, or neither")
    if change_codes is not None and change_scales is not None:
        check_changes(codes, change_codes, change_scales, codes.shape[1])
    if index is not None:
        check_index(index, codes, "codes")
    count = codes.shape[1] if index is None else index.shape[1]
    expected = (codes.shape[0], count, *codes.shape[2:])
    if rows.shape != expected:
        raise ValueError(f"rows must be {expected}; got {shapes(rows)}")
    check_floats(rows=rows)
    if rows.device != codes.device:
        raise ValueError(f"rows is on {rows.device}, codes on {codes.device}")
    for name, tensor in (
        ("codes", codes),
        ("scales", scales),
        ("change_codes", change_codes),
        ("change_scales", change_scales),
    ):
        if tensor is not None:
            check_written(tensor, name)


def _check_dequantize(
    codes: Tensor,
    scales: Tensor,
    change_codes: Tensor | None,
    change_scales: Tensor | None,
    gain: Tensor | None,
    dtype: torch.dtype,
) -> None:
    check_codes(codes, scales)
    if dtype not in (*FLOATS, torch.float64):
        raise ValueError(f"dtype must be float32, float16 or bfloat16; got {dtype}")
    if change_codes is None and change_scales is None and gain is None:
        return
    if change_codes is None or change_scales is None or gain is None:
        raise ValueError("give change_codes, change_scales and gain together, or none of them")
    check_changes(codes, change_codes, change_scales, None)
    if gain.shape != change_codes.shape[:2]:
        raise ValueError(
            f"gain must be {tuple(change_codes.shape[:2])}, one for each token of change_codes; "
            f"got {shapes(gain)}"
        )
    if gain.dtype != torch.float32 or gain.device != codes.device:
        raise ValueError(
            f"gain must be float32 on {codes.device}; got {gain.dtype} on {gain.device}"
        )


@jit(
    *("codes_b", "codes_n", "codes_g", "beside_b", "beside_n", "beside_g"),
    *("rows_b", "rows_k", "rows_g", "scales_b", "scales_n", "scales_g"),
    *("others_b", "others_n", "others_g", "index_b", "index_k", "count"),
)
def _quantize_kernel(
    codes,
    scales,
    change_codes,
    change_scales,
    index,
    rows,
    codes_b,
    codes_n,
    codes_g,
    beside_b,  # of change_codes
    beside_n,
    beside_g,
    rows_b,
    rows_k,
    rows_g,
    scales_b,
    scales_n,
    scales_g,
    others_b,  # of change_scales
    others_n,
    others_g,
    index_b,
    index_k,
    count,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    MOST: tl.constexpr,
    LEAST: tl.constexpr,
    FLOAT8: tl.constexpr,
    ALL: tl.constexpr,
    CHANGES: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Strides of rows come in units of VECTOR elements: the product tells of the alignment.
    b = tl.program_id(1).to(tl.int64)
    k, g, inside = heads_of(count, HEADS, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    both = inside[:, None] & (c < SIZE)[None, :]
    n = k
    if not ALL:
        n = tl.load(index + b * index_b + k * index_k, mask=inside, other=0).to(tl.int64)
    there = (b * rows_b + k * rows_k + g * rows_g)[:, None] * VECTOR + c[None, :]
    new = tl.load(rows + there, mask=both, other=0.0).to(tl.float32)
    here = codes + (b * codes_b + n * codes_n + g * codes_g)[:, None] * VECTOR + c[None, :]
    scale = scales + b * scales_b + n * scales_n + g * scales_g
    if CHANGES:
        old = decoded(tl.load(here, mask=both, other=0), FLOAT8)
        old *= tl.load(scale, mask=inside, other=0.0)[:, None]
        code, of_change = encoded(tl.where(both, new - old, 0.0), MOST, LEAST, FLOAT8)
        beside = (b * beside_b + n * beside_n + g * beside_g)[:, None] * VECTOR + c[None, :]
        tl.store(change_codes + beside, code, mask=both)
        other = b * others_b + n * others_n + g * others_g
        tl.store(change_scales + other, of_change, mask=inside)
    code, own = encoded(new, MOST, LEAST, FLOAT8)
    tl.store(here, code, mask=both)
    tl.store(scale, own, mask=inside)


@jit(
    *("codes_b", "codes_n", "codes_g", "beside_b", "beside_n", "beside_g"),
    *("output_b", "output_n", "output_g", "scales_b", "scales_n", "scales_g"),
    *("others_b", "others_n", "others_g", "gain_b", "gain_n", "count", "carried"),
)
def _dequantize_kernel(
    codes,
    scales,
    change_codes,
    change_scales,
    gain,
    output,
    codes_b,
    codes_n,
    codes_g,
    beside_b,  # of change_codes
    beside_n,
    beside_g,
    output_b,
    output_n,
    output_g,
    scales_b,
    scales_n,
    scales_g,
    others_b,  # of change_scales
    others_n,
    others_g,
    gain_b,
    gain_n,
    count,
    carried,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    FLOAT8: tl.constexpr,
    CHANGES: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    n, g, inside = heads_of(count, HEADS, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    within = (c < SIZE)[None, :]
    both = inside[:, None] & within
    here = (b * codes_b + n * codes_n + g * codes_g)[:, None] * VECTOR + c[None, :]
    scale = tl.load(scales + b * scales_b + n * scales_n + g * scales_g, mask=inside, other=0.0)
    value = decoded(tl.load(codes + here, mask=both, other=0), FLOAT8) * scale[:, None]
    if CHANGES:
        may = inside & (n < carried)
        share = tl.load(gain + b * gain_b + n * gain_n, mask=may, other=0.0)
        some = share != 0  # 0 times a change of NaN would be NaN
        other = b * others_b + n * others_n + g * others_g
        share *= tl.load(change_scales + other, mask=some, other=0.0)
        beside = (b * beside_b + n * beside_n + g * beside_g)[:, None] * VECTOR + c[None, :]
        change = tl.load(change_codes + beside, mask=some[:, None] & within, other=0)
        value += share[:, None] * decoded(change, FLOAT8)
    there = (b * output_b + n * output_n + g * output_g)[:, None] * VECTOR + c[None, :]
    tl.store(output + there, value, mask=both)


def _plan_quantize(
    codes: Tensor,
    scales: Tensor,
    change_codes: Tensor | None,
    change_scales: Tensor | None,
    index: Tensor | None,
    rows: Tensor,
) -> Run | None:
    changes = change_codes is not None
    beside = codes if change_codes is None else change_codes
    others = scales if change_scales is None else change_scales
    how = cut(codes, rows, beside)
    if how is None:
        return None
    count = rows.shape[1]
    quantize = launch(
        _quantize_kernel,
        (cdiv(count * how["HEADS"], how["BLOCK_R"]), len(rows)),
        (
            codes.view(torch.int8),
            scales,
            beside.view(torch.int8),
            others,
            rows if index is None else index,
            rows,
        ),
        *strides_of(how, codes, beside, rows),
        *scales.stride(),
        *others.stride(),
        0 if index is None or len(index) == 1 else index.stride(0),
        0 if index is None else index.stride(1),
        count,
        **how,
        MOST=reference.LARGEST_CODE[codes.dtype],
        LEAST=reference.LEAST_ROW,
        FLOAT8=codes.dtype != torch.int8,
        ALL=index is None,
        CHANGES=changes,
        num_warps=4,
    )

    def run(
        codes: Tensor,
        scales: Tensor,
        change_codes: Tensor | None,
        change_scales: Tensor | None,
        index: Tensor | None,
        rows: Tensor,
    ) -> None:
        beside = codes if change_codes is None else change_codes
        others = scales if change_scales is None else change_scales
        quantize(codes, scales, beside, others, rows if index is None else index, rows)

    return run


def _plan_dequantize(
    codes: Tensor,
    scales: Tensor,
    change_codes: Tensor | None,
    change_scales: Tensor | None,
    gain: Tensor | None,
    dtype: torch.dtype,
) -> Run | None:
    output = _fake_dequantize(codes, scales, change_codes, change_scales, gain, dtype)
    beside = codes if change_codes is None else change_codes
    others = scales if change_scales is None else change_scales
    how = cut(codes, output, beside)
    if how is None:
        return None
    dequantize = launch(
        _dequantize_kernel,
        (cdiv(codes.shape[1] * how["HEADS"], how["BLOCK_R"]), len(codes)),
        (
            codes.view(torch.int8),
            scales,
            beside.view(torch.int8),
            others,
            scales if gain is None else gain,
            output,
        ),
        *strides_of(how, codes, beside, output),
        *scales.stride(),
        *others.stride(),
        *((0, 0) if gain is None else gain.stride()),
        codes.shape[1],
        0 if change_codes is None else change_codes.shape[1],
        **how,
        FLOAT8=codes.dtype != torch.int8,
        CHANGES=gain is not None,
        num_warps=4,
    )

    def run(
        codes: Tensor,
        scales: Tensor,
        change_codes: Tensor | None,
        change_scales: Tensor | None,
        gain: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        output = _fake_dequantize(codes, scales, change_codes, change_scales, gain, dtype)
        beside = codes if change_codes is None else change_codes
        others = scales if change_scales is None else change_scales
        dequantize(codes, scales, beside, others, scales if gain is None else gain, output)
        return output

    return run


def _fake_dequantize(
    codes: Tensor,
    scales: Tensor,
    change_codes: Tensor | None,
    change_scales: Tensor | None,
    gain: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


_quantize = register(
    "quantize_tokens_(Tensor(a!) codes, Tensor(b!) scales, Tensor(c!)? change_codes, "
    "Tensor(d!)? change_scales, Tensor? index, Tensor rows) -> ()",
    check=_check_quantize,
    reference=reference.quantize_tokens_,
    plan=_plan_quantize,
)
_dequantize = register(
    "dequantize_tokens(Tensor codes, Tensor scales, Tensor? change_codes, Tensor? change_scales, "
    "Tensor? gain, ScalarType dtype) -> Tensor",
    check=_check_dequantize,
    reference=reference.dequantize_tokens,
    plan=_plan_dequantize,
    fake=_fake_dequantize,
)
