"""The norm of queries and keys, their rotary position and the write into the cache, in one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import (
    check_finite,
    check_floats,
    check_rows,
    check_same,
    check_written,
    shapes,
)
from ._library import register
from ._plans import Run, launch, nothing
from ._triton import cdiv, jit, next_power_of_2, tl

NORMS = ("rms_norm", "layer_norm_across_heads")
"""Per head, as in SD3.5, or over all heads of a token, as in Lumina-Next (diffusers' names)."""

ELEMENTS = 4096  # of a program's tile


def norm_rotary(
    tokens: Tensor,
    *,
    norm: str | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rotary: Tensor | None = None,
) -> Tensor:
    """Normalise queries or keys and turn them by their positions, in float32.

    `"rms_norm"` is `x / sqrt(mean(x**2) + eps)` over each head, `"layer_norm_across_heads"` is
    `(x - mean) / sqrt(var + eps)` over all heads of a token (population variance); weight and bias
    follow. Then the pairs `x[2 i] + 1j * x[2 i + 1]` are multiplied by `rotary[i]`.

    Args:
        tokens: `(B, K, H, D)`.
        norm: One of `ras_kernels.NORMS`, or None.
        weight, bias: `(D,)`, or `(H * D,)` across heads, the dtype of `tokens`; or None.
        eps: Of the norm.
        rotary: `(B, K, D / 2)` or `(1, K, D / 2)`, complex64; or None.

    Returns:
        `(B, K, H, D)`, contiguous, the dtype of `tokens`.
    """
    return _norm_rotary(tokens, norm, weight, bias, eps, _pairs(rotary))


def norm_rotary_scatter_(
    out: Tensor,
    index: Tensor | None,
    tokens: Tensor,
    *,
    norm: str | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rotary: Tensor | None = None,
    changes: Tensor | None = None,
) -> Tensor:
    """Write what `norm_rotary` returns into rows of a cache: `out[b, index[b, j]] = …[b, j]`.

    Args:
        out: `(B, N, H, D)`, written in place.
        index: `(B, K)` or `(1, K)`, each row once per sample; None for the first K rows, in order.
        tokens, norm, weight, bias, eps, rotary: See `norm_rotary`.
        changes: `(B, N, H, D)`; its rows are set to what was added to those of `out`.

    Returns:
        `out` itself.
    """
    options = norm, weight, bias, eps, _pairs(rotary)
    _norm_rotary_scatter(out, changes, index, tokens, *options)
    return out


def _pairs(rotary: Tensor | None) -> Tensor | None:
    """Real and imaginary parts: Inductor takes no complex tensors beside what an op writes to."""
    if not isinstance(rotary, Tensor):
        return rotary
    if not rotary.is_complex():
        raise ValueError(f"rotary must be complex; it is {rotary.dtype}")
    return torch.view_as_real(rotary.resolve_conj())


def _check(
    tokens: Tensor,
    norm: str | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rotary: Tensor | None,
) -> None:
    if tokens.ndim != 4:
        raise ValueError(f"tokens must be (B, K, H, D); got {tuple(tokens.shape)}")
    if norm is not None and norm not in NORMS:
        raise ValueError(f"norm must be None or one of {', '.join(NORMS)}; got {norm!r}")
    check_finite(eps=eps)
    if eps < 0:
        raise ValueError(f"eps must be at least 0; got {eps}")
    check_floats(tokens=tokens)
    heads, size = tokens.shape[2:]
    width = heads * size if norm == "layer_norm_across_heads" else size
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        if norm is None:
            raise ValueError(f"{name} belongs to a norm, and norm is None")
        if vector.shape != (width,):
            raise ValueError(f"{name} must be ({width},) for {norm}; got {tuple(vector.shape)}")
        check_same(**{"tokens": tokens, name: vector})
    if rotary is None:
        return
    taken = [(batch, tokens.shape[1], size // 2) for batch in (tokens.shape[0], 1)]
    found = rotary.shape[:-1]  # without that of its real and imaginary parts
    if found not in taken or size % 2:
        raise ValueError(
            f"rotary must be complex of shape {taken[0]} or {taken[1]}; got one of shape "
            f"{tuple(found)}"
        )
    if rotary.device != tokens.device:
        raise ValueError(f"rotary is on {rotary.device}, tokens on {tokens.device}")


def _check_scatter(
    out: Tensor,
    changes: Tensor | None,
    index: Tensor | None,
    tokens: Tensor,
    norm: str | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rotary: Tensor | None,
) -> None:
    _check(tokens, norm, weight, bias, eps, rotary)
    if index is None:
        if out.ndim < 2 or out.shape[:1] + out.shape[2:] != tokens.shape[:1] + tokens.shape[2:]:
            raise ValueError(
                f"out must be (B, N, H, D), and tokens (B, K, H, D); got {shapes(out, tokens)}"
            )
        if tokens.shape[1] > out.shape[1]:
            raise ValueError(
                "without an index tokens must be no more than out has rows; got "
                f"{shapes(tokens, out)}"
            )
        check_same(out=out, tokens=tokens)
        check_written(out, "out")
    else:
        check_rows(out, index, tokens, ("out", "tokens"))
    if changes is not None:
        if changes.shape != out.shape:
            raise ValueError(
                f"changes must be {tuple(out.shape)} as out; got {tuple(changes.shape)}"
            )
        check_same(out=out, changes=changes)
        check_written(changes, "changes")


@jit(
    *("tokens_b", "tokens_k", "tokens_h", "output_b", "output_n", "output_h"),
    *("changes_b", "changes_n", "changes_h", "rotary_b", "index_b", "num_rows"),
)
def _norm_rotary_kernel(
    tokens,
    index,
    weight,
    bias,
    rotary,
    output,
    changes,
    tokens_b,
    tokens_k,
    tokens_h,
    output_b,
    output_n,
    output_h,
    changes_b,
    changes_n,
    changes_h,
    rotary_b,
    rotary_k,
    index_b,
    index_k,
    num_rows,
    eps,
    PARTS: tl.constexpr,  # of a token
    HEADS: tl.constexpr,  # of a part, which are normalised together
    SIZE: tl.constexpr,
    RMS: tl.constexpr,
    LAYER: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ROTARY: tl.constexpr,
    SCATTER: tl.constexpr,
    CHANGES: tl.constexpr,
    VECTOR: tl.constexpr,  # the strides of tokens, output and changes come in units of it
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    WIDTH: tl.constexpr = HEADS * SIZE
    # One axis, since the others of a grid end at 65,535.
    blocks = tl.cdiv(num_rows, BLOCK_K)
    b = (tl.program_id(0) // blocks // PARTS).to(tl.int64)
    part = tl.program_id(0) // blocks % PARTS
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = k < num_rows
    k = k.to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    both = inside[:, None] & (c < WIDTH)[None, :]
    head = (part * HEADS + c // SIZE).to(tl.int64)
    at = (head * tokens_h * VECTOR + c % SIZE)[None, :]
    here = tokens + (b * tokens_b + k * tokens_k)[:, None] * VECTOR + at
    x = tl.load(here, mask=both, other=0.0).to(tl.float32)
    if LAYER:
        x -= tl.sum(x, 1)[:, None] / WIDTH
        x = tl.where(both, x, 0.0)
    if LAYER or RMS:
        x *= tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)[:, None]
    if WEIGHT:
        x *= tl.load(weight + c, mask=c < WIDTH, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        x += tl.load(bias + c, mask=c < WIDTH, other=0.0).to(tl.float32)[None, :]
    if ROTARY:
        pair = tl.arange(0, BLOCK_C // 2)
        turn = (
            rotary + (b * rotary_b + k * rotary_k)[:, None] * 2 + (pair % (SIZE // 2) * 2)[None, :]
        )
        some = inside[:, None] & (pair < WIDTH // 2)[None, :]
        cosine = tl.load(turn, mask=some, other=0.0).to(tl.float32)
        sine = tl.load(turn + 1, mask=some, other=0.0).to(tl.float32)
        real, imaginary = tl.split(tl.reshape(x, (BLOCK_K, BLOCK_C // 2, 2)))
        turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
        x = tl.reshape(turned, (BLOCK_K, BLOCK_C))
    n = k
    if SCATTER:
        n = tl.load(index + b * index_b + k * index_k, mask=inside, other=0).to(tl.int64)
    there = output + (b * output_b + n * output_n)[:, None] * VECTOR
    there += (head * output_h * VECTOR + c % SIZE)[None, :]
    if CHANGES:
        new = x.to(output.dtype.element_ty).to(tl.float32)
        old = tl.load(there, mask=both, other=0.0).to(tl.float32)
        beside = changes + (b * changes_b + n * changes_n)[:, None] * VECTOR
        beside += (head * changes_h * VECTOR + c % SIZE)[None, :]
        tl.store(beside, new - old, mask=both)
    tl.store(there, x, mask=both)


def _operands(
    out: Tensor,
    changes: Tensor | None,
    index: Tensor | None,
    tokens: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rotary: Tensor | None,
) -> tuple[Tensor, ...]:
    """The kernel's tensors; for one that is not given, and then not read, any other."""
    tokens = tokens if tokens.stride(3) == 1 else tokens.contiguous()
    return (
        tokens,
        tokens if index is None else index,
        tokens if weight is None else weight.contiguous(),
        tokens if bias is None else bias.contiguous(),
        tokens if rotary is None else rotary.float().contiguous(),
        out,
        out if changes is None else changes,
    )


def _plan_scatter(
    out: Tensor,
    changes: Tensor | None,
    index: Tensor | None,
    tokens: Tensor,
    norm: str | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rotary: Tensor | None,
) -> Run | None:
    """Without an index, for all rows in order."""
    if any(t is not None and t.stride(3) != 1 for t in (out, changes)):
        return None
    if not tokens.numel():
        return nothing
    operands = _operands(out, changes, index, tokens, weight, bias, rotary)
    batch, count, heads, size = tokens.shape
    parts = 1 if norm == "layer_norm_across_heads" else heads
    block_c = next_power_of_2(heads // parts * size)
    block_k = max(ELEMENTS // block_c, 1)
    element = tokens.element_size()
    moved = operands[0], *operands[-2:]
    strides = [stride for tensor in moved for stride in tensor.stride()[:3]]
    starts = [tensor.data_ptr() // element for tensor in moved]
    vector = math.gcd(16 // element, size, *strides, *starts)
    turn = launch(
        _norm_rotary_kernel,
        (cdiv(count, block_k) * parts * batch,),
        operands,
        *(stride // vector for stride in strides),
        0 if rotary is None or len(rotary) == 1 else count * (size // 2),
        size // 2,
        0 if index is None or len(index) == 1 else index.stride(0),
        0 if index is None else index.stride(1),
        count,
        eps,
        PARTS=parts,
        HEADS=heads // parts,
        SIZE=size,
        RMS=norm == "rms_norm",
        LAYER=norm == "layer_norm_across_heads",
        WEIGHT=weight is not None,
        BIAS=bias is not None,
        ROTARY=rotary is not None,
        SCATTER=index is not None,
        CHANGES=changes is not None,
        VECTOR=vector,
        BLOCK_K=block_k,
        BLOCK_C=block_c,
        num_warps=8 if block_c > 1024 else 4,
    )

    def run(
        out: Tensor,
        changes: Tensor | None,
        index: Tensor | None,
        tokens: Tensor,
        norm: str | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        rotary: Tensor | None,
    ) -> None:
        turn(*_operands(out, changes, index, tokens, weight, bias, rotary))

    return run


def _plan(tokens: Tensor, *options: Any) -> Run | None:
    scatter = _plan_scatter(_fake(tokens), None, None, tokens, *options)
    if scatter is None:
        return None

    def run(tokens: Tensor, *options: Any) -> Tensor:
        out = _fake(tokens)
        scatter(out, None, None, tokens, *options)
        return out

    return run


def _fake(tokens: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


_OPTIONS = "str? norm, Tensor? weight, Tensor? bias, float eps, Tensor? rotary"
_norm_rotary = register(
    f"norm_rotary(Tensor tokens, {_OPTIONS}) -> Tensor",
    check=_check,
    reference=reference.norm_rotary,
    plan=_plan,
    fake=_fake,
)
_norm_rotary_scatter = register(
    "norm_rotary_scatter_(Tensor(a!) out, Tensor(b!)? changes, Tensor? index, Tensor tokens, "
    f"{_OPTIONS}) -> ()",
    check=_check_scatter,
    reference=reference.norm_rotary_scatter_,
    plan=_plan_scatter,
)
