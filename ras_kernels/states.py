"""Attention over two sets of keys, put together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import check_floats, check_same, shapes
from ._library import register
from ._plans import Run, launch
from ._triton import cdiv, jit, next_power_of_2, tl


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Put together the same queries' attention over two sets of keys, as if over both at once.

    A state with an `lse` of minus infinity, as of no keys, counts for nothing, whatever its output
    is; where both are, there are zeros. Infinity, as of a score without bounds, makes NaN.

    Args:
        out_a, out_b: `(B, K, H, D)`, as `sparse_attention` returns them.
        lse_a, lse_b: `(B, H, K)` float32, as it returns them with `return_lse`; float64 for
            outputs in float64.

    Returns:
        `out`, contiguous, the dtype of `out_a`, and `lse`: `log(exp(lse_a) + exp(lse_b))`.
    """
    return _merge(out_a, lse_a, out_b, lse_b)


def _check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    if out_a.ndim != 4 or out_a.shape != out_b.shape:
        raise ValueError(f"out_a and out_b must both be (B, K, H, D); got {shapes(out_a, out_b)}")
    batch, rows, heads, _ = out_a.shape
    if not lse_a.shape == lse_b.shape == (batch, heads, rows):
        raise ValueError(
            f"lse_a and lse_b must be {(batch, heads, rows)}; got {shapes(lse_a, lse_b)}"
        )
    check_floats(out_a=out_a)
    check_same(out_a=out_a, out_b=out_b)
    dtype = torch.float64 if out_a.dtype == torch.float64 else torch.float32
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        if lse.dtype != dtype or lse.device != out_a.device:
            raise ValueError(
                f"{name} must be {dtype} on {out_a.device}; it is {lse.dtype} on {lse.device}"
            )


@jit("rows", "heads", "count")
def _merge_kernel(
    out_a,
    lse_a,
    out_b,
    lse_b,
    output,
    lse,
    rows,
    heads,
    count,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Rows are those of the outputs, `(b * K + k) * H + h`."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    here = row < count
    inside = here[:, None] & (d < SIZE)[None, :]
    at = (row // heads // rows * heads + row % heads) * rows + row // heads % rows
    first = tl.load(lse_a + at, mask=here, other=0.0)
    second = tl.load(lse_b + at, mask=here, other=0.0)
    top = tl.maximum(first, second)
    shift = tl.where(tl.abs(top) == float("inf"), 0.0, top)  # inf - inf would be NaN
    share_a = tl.exp(first - shift)
    share_b = tl.exp(second - shift)
    total = share_a + share_b
    tl.store(lse + at, shift + tl.log(total), mask=here)
    share_a = tl.where(first == float("-inf"), 0.0, share_a / total)[:, None]
    share_b = tl.where(second == float("-inf"), 0.0, share_b / total)[:, None]
    # What has no share may be NaN, and is not read.
    place = row[:, None] * SIZE + d[None, :]
    a = tl.load(out_a + place, mask=inside & (share_a != 0), other=0.0).to(tl.float32)
    b = tl.load(out_b + place, mask=inside & (share_b != 0), other=0.0).to(tl.float32)
    tl.store(output + place, a * share_a + b * share_b, mask=inside)


def _plan(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Run | None:
    batch, rows, heads, size = out_a.shape
    if not out_a.numel():
        return None
    width = next_power_of_2(size)
    block = max(2048 // width, 1)
    operands = [t.contiguous() for t in (out_a, lse_a, out_b, lse_b)]
    merge = launch(
        _merge_kernel,
        (cdiv(batch * rows * heads, block),),
        (*operands, *_fake(*operands)),
        rows,
        heads,
        batch * rows * heads,
        SIZE=size,
        BLOCK_D=width,
        BLOCK_R=block,
        num_warps=4,
    )

    def run(*states: Tensor) -> tuple[Tensor, Tensor]:
        states = tuple(t.contiguous() for t in states)
        merged = _fake(*states)
        merge(*states, *merged)
        return merged

    return run


def _fake(out_a: Tensor, lse_a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dense = torch.contiguous_format
    return (
        torch.empty_like(out_a, memory_format=dense),
        torch.empty_like(lse_a, memory_format=dense),
    )


_merge = register(
    "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    check=_check,
    reference=reference.merge_states,
    plan=_plan,
    fake=_fake,
)
