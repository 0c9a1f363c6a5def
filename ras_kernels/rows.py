"""Gather and scatter: copies between rows of all tokens and dense rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from ._checks import check_index, check_rows
from ._library import register
from ._plans import Run, launch
from ._triton import cdiv, jit, next_power_of_2, tl

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ELEMENTS = 2048  # of a program's tile
WIDEST = 1024  # elements of a row in a tile
GRID = 65535  # programs along the second and the third axis, at most


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Take rows of each sample: `out[b, j] = tokens[b, index[b, j]]`.

    Args:
        tokens: `(B, N, ...)`, any dtype and strides.
        index: `(B, K)`, each sample's own rows, or `(1, K)`, the same for all.

    Returns:
        `(B, K, ...)`, contiguous, the dtype of `tokens`.
    """
    return _gather(tokens, index)


def scatter_tokens_(tokens: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Write rows in place: `tokens[b, index[b, j]] = rows[b, j]`.

    Args:
        tokens: `(B, N, ...)`, any dtype, written in place; any strides but expanded ones.
        index: `(B, K)` or `(1, K)`, each row once per sample.
        rows: `(B, K, ...)`, the dtype of `tokens`.

    Returns:
        `tokens` itself.
    """
    _scatter(tokens, index, rows)
    return tokens


@jit()
def place(columns, VECTOR: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where a program of a `Tiling` is: the sample, the outer index, rows, columns, columns' mask.

    `columns` and all strides come in units of VECTOR: a product with a constant is what tells the
    compiler of divisibility. Rows of 144 bytes are then read by 16, although 72 halves are no
    multiple of 16.
    """
    width = columns * VECTOR
    blocks = tl.cdiv(width, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    r = (tl.program_id(1) // blocks).to(tl.int64)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = tl.program_id(1) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return b, r, k, c, (c < width)[None, :]


@jit()
def elements(start, b, r, n, c, stride_b, stride_n, stride_r, VECTOR: tl.constexpr):
    """Pointers to the elements at columns `c`, in elements, of rows `n`."""
    row = (b * stride_b + r * stride_r) + n.to(tl.int64) * stride_n
    return start + row[:, None] * VECTOR + c[None, :]


@jit(
    *("tokens_b", "tokens_n", "tokens_r", "rows_b", "rows_k", "rows_r"),
    *("index_b", "num_rows", "columns"),
)
def _copy_rows_kernel(
    tokens,
    index,
    rows,
    tokens_b,
    tokens_n,
    tokens_r,
    rows_b,
    rows_k,
    rows_r,
    tokens_c,  # in elements, as rows_c
    rows_c,
    index_b,
    index_k,
    num_rows,
    columns,
    GATHER: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, r, k, c, within = place(columns, VECTOR, BLOCK_K, BLOCK_C)
    inside = k < num_rows
    n = tl.load(index + b * index_b + k.to(tl.int64) * index_k, mask=inside, other=0)
    both = inside[:, None] & within
    wide = c.to(tl.int64)
    here = elements(tokens, b, r, n, wide * tokens_c, tokens_b, tokens_n, tokens_r, VECTOR)
    there = elements(rows, b, r, k, wide * rows_c, rows_b, rows_k, rows_r, VECTOR)
    if GATHER:
        tl.store(there, tl.load(here, mask=both), mask=both)
    else:
        tl.store(here, tl.load(there, mask=both), mask=both)


class Tiling(NamedTuple):
    """How a kernel goes over rows of some tensors `(B, rows, ...)` with like trailing dimensions.

    Attributes:
        grid: Blocks of rows, blocks of columns for each outer trailing dimension, samples.
        block_k, block_c: Rows and columns of a block.
        columns: Of a row, in units of `vector`.
        vector: Elements that one access of up to 16 bytes may take.
        strides: For each tensor those of its samples, its rows and its outer trailing dimension,
            in units of `vector`.
        inner: For each tensor that of the columns, in elements.
    """

    grid: tuple[int, int, int]
    block_k: int
    block_c: int
    columns: int
    vector: int
    strides: list[int]
    inner: list[int]


def tiling(count: int, *tensors: Tensor) -> Tiling | None:
    """A tiling for `count` rows, or None if the trailing dimensions make more than two."""
    dims: list[tuple[int, list[int]]] = []
    for size, *strides in zip(tensors[0].shape[2:], *(t.stride()[2:] for t in tensors)):
        if size == 1:
            continue
        if dims and all(a == b * size for a, b in zip(dims[-1][1], strides)):
            dims[-1] = dims[-1][0] * size, strides
        else:
            dims.append((size, strides))
    if len(dims) > 2:
        return None
    dims = dims or [(1, [1] * len(tensors))]
    if len(dims) == 1:
        dims.insert(0, (1, [0] * len(tensors)))
    (outer, outer_strides), (columns, inner) = dims
    strides = [
        stride
        for tensor, row in zip(tensors, outer_strides)
        for stride in (tensor.stride(0), tensor.stride(1), row)
    ]
    size, vector = tensors[0].element_size(), 1
    if all(stride == 1 for stride in inner):
        starts = [tensor.data_ptr() // size for tensor in tensors]
        vector = math.gcd(max(16 // size, 1), columns, *strides, *starts)
    block_c = min(next_power_of_2(max(columns, 1)), WIDEST)
    # Elements that are read one by one take more registers for their addresses.
    block_k = max((ELEMENTS if vector > 1 else ELEMENTS // 2) // block_c, 1)
    grid = cdiv(count, block_k), outer * cdiv(columns, block_c), len(tensors[0])
    if max(grid[1:]) > GRID:
        return None
    strides = [stride // vector for stride in strides]
    return Tiling(grid, block_k, block_c, columns // vector, vector, strides, inner)


def _copies(tokens: Tensor, index: Tensor, rows: Tensor, *, gather: bool) -> Run | None:
    """A launch of the kernel, or None if these tensors are none that it takes."""
    words = WORDS.get(tokens.element_size())
    how = tiling(rows.shape[1], tokens, rows)
    if how is None or words is None:
        return None
    return launch(
        _copy_rows_kernel,
        how.grid,
        (tokens.view(words), index, rows.view(words)),  # bits, whatever they mean
        *how.strides,
        *how.inner,
        0 if len(index) == 1 else index.stride(0),
        index.stride(1),
        rows.shape[1],
        how.columns,
        GATHER=gather,
        VECTOR=how.vector,
        BLOCK_K=how.block_k,
        BLOCK_C=how.block_c,
        num_warps=4,
    )


def _plan_gather(tokens: Tensor, index: Tensor) -> Run | None:
    rows = _fake_gather(tokens, index)
    copy, shape = _copies(tokens, index, rows, gather=True), rows.shape
    if copy is None:
        return None

    def run(tokens: Tensor, index: Tensor) -> Tensor:
        rows = tokens.new_empty(shape)
        copy(tokens, index, rows)
        return rows

    return run


def _plan_scatter(tokens: Tensor, index: Tensor, rows: Tensor) -> Run | None:
    return _copies(tokens, index, rows, gather=False)


def _fake_gather(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape[0], index.shape[1], *tokens.shape[2:])


def _check_gather(tokens: Tensor, index: Tensor) -> None:
    check_index(index, tokens)


_gather = register(
    "gather_tokens(Tensor tokens, Tensor index) -> Tensor",
    check=_check_gather,
    reference=reference.gather_tokens,
    plan=_plan_gather,
    fake=_fake_gather,
)
_scatter = register(
    "scatter_tokens_(Tensor(a!) tokens, Tensor index, Tensor rows) -> ()",
    check=check_rows,
    reference=reference.scatter_tokens_,
    plan=_plan_scatter,
)
