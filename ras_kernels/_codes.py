"""What ops on caches of 8 bits have in common: codes, and how kernels go over them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import reference
from ._checks import shapes
from ._triton import jit, next_power_of_2, tl
from .rows import ELEMENTS, GRID, WIDEST

CODES = tuple(reference.LARGEST_CODE)
"""The dtypes of codes: int8, whose scale is a row's largest magnitude by 127, and float8_e4m3fn, by
448. Kernels compute both on bits, so that a chip need not have the latter."""


def check_codes(codes: Tensor, scales: Tensor, prefix: str = "") -> None:
    """Codes and their scales, of one device."""
    if codes.ndim != 4 or not codes.shape[3]:
        raise ValueError(
            f"{prefix}codes must be (B, N, G, D) with D at least 1; got {shapes(codes)}"
        )
    if codes.dtype not in CODES:
        raise ValueError(f"{prefix}codes must be int8 or float8_e4m3fn; got {codes.dtype}")
    if scales.shape != codes.shape[:3]:
        raise ValueError(
            f"{prefix}scales must be {tuple(codes.shape[:3])}, one for each row of {prefix}codes; "
            f"got {shapes(scales)}"
        )
    if scales.dtype != torch.float32 or scales.device != codes.device:
        raise ValueError(
            f"{prefix}scales must be float32 on {codes.device}; got {scales.dtype} on "
            f"{scales.device}"
        )


def check_changes(
    codes: Tensor, change_codes: Tensor, change_scales: Tensor, count: int | None
) -> None:
    """What is beside codes of `count` rows, or of up to those of `codes`."""
    check_codes(change_codes, change_scales, "change_")
    batch, most, *row = codes.shape
    rows = change_codes.shape[1]
    if change_codes.shape != (batch, rows, *row) or rows > most or count not in (None, rows):
        raise ValueError(
            f"change_codes must be {tuple(codes.shape)} as codes, or of fewer rows where they are "
            f"read; got {shapes(change_codes)}"
        )
    if (change_codes.dtype, change_codes.device) != (codes.dtype, codes.device):
        raise ValueError(
            f"change_codes is {change_codes.dtype} on {change_codes.device}, codes is "
            f"{codes.dtype} on {codes.device}"
        )


@jit()
def encoded(x, MOST: tl.constexpr, LEAST: tl.constexpr, FLOAT8: tl.constexpr):
    """The codes of rows in float32, as bits in int8, and their scales.

    Quotients are rounded as the definition's are: `/` is not, on NVIDIA's GPUs.
    """
    size = tl.abs(x)
    largest = tl.max(size, 1)
    spoilt = tl.max((size <= 3.4028234663852886e38).to(tl.int32) ^ 1, 1)  # no comparison holds
    fits = (largest >= LEAST) & (spoilt == 0)
    scale = tl.where(fits, tl.div_rn(largest, MOST), 0.0)
    ratio = tl.div_rn(x, tl.where(fits, scale, 1.0)[:, None])
    ratio = tl.where(fits[:, None], ratio, 0.0)
    # A sum with 1.5 * 2**23 has no room for fractions: they are rounded, halves to even.
    if FLOAT8:
        bits = ratio.to(tl.int32, bitcast=True)
        size_bits = bits & 0x7FFFFFFF
        size = size_bits.to(tl.float32, bitcast=True)
        # Of 23 bits of the fraction 3 stay, and of the exponent's bias of 127 there are 7; below
        # 2**-6 codes count steps of 2**-9.
        normal = (size_bits + 0x7FFFF + ((size_bits >> 20) & 1) - (120 << 23)) >> 20
        steps = (size * 512.0 + 12582912.0) - 12582912.0
        code = tl.where(size < 0.015625, steps.to(tl.int32), normal)
        code = tl.where(bits < 0, code - 128, code)
    else:
        code = ((ratio + 12582912.0) - 12582912.0).to(tl.int32)
    return code.to(tl.int8), tl.where(spoilt == 0, scale, float("nan"))


@jit()
def decoded(code, FLOAT8: tl.constexpr):
    """What codes, as bits in int8, stand for, in float32; times their scale, that is."""
    if FLOAT8:
        size_bits = code.to(tl.int32) & 0x7F
        normal = ((size_bits << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        size = tl.where(size_bits < 8, size_bits.to(tl.float32) * 0.001953125, normal)
        size = tl.where(size_bits == 0x7F, float("nan"), size)
        value = tl.where(code < 0, -size, size)
    else:
        value = code.to(tl.float32)
    return value


@jit()
def heads_of(count, HEADS: tl.constexpr, BLOCK_R: tl.constexpr):
    """A program's rows, each a head of a token: token and head of each, and whether it is there."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    return r // HEADS, r % HEADS, r < count * HEADS


def cut(codes: Tensor, dense: Tensor, *others: Tensor) -> dict[str, int] | None:
    """How kernels go over rows of codes and of their dtype outside, or None if they do not."""
    batch, _, heads, size = dense.shape
    tensors = codes, *others, dense
    if any(tensor.stride(3) != 1 for tensor in tensors if size > 1):
        return None
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    starts = [tensor.data_ptr() // tensor.element_size() for tensor in tensors]
    width = next_power_of_2(size)
    if width > WIDEST or batch > GRID or not heads:
        return None
    return {
        "HEADS": heads,
        "SIZE": size,
        "VECTOR": math.gcd(16, size, *strides, *starts),
        "BLOCK_R": max(ELEMENTS // width, 1),
        "BLOCK_C": width,
    }


def strides_of(cut: dict[str, int], *tensors: Tensor) -> list[int]:
    """Those of rows, in units of a vector, first for codes, their changes and what is dense."""
    return [stride // cut["VECTOR"] for tensor in tensors for stride in tensor.stride()[:3]]
