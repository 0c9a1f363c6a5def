"""Key and value projections that write straight into the rows of their caches."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from . import reference
from ._checks import check_floats, check_index, check_same, check_written, shapes
from ._library import register
from ._plans import Run, launch
from ._triton import cdiv, jit, tl


def linear_scatter_(
    key: Tensor,
    value: Tensor,
    index: Tensor,
    tokens: Tensor,
    *,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    key_changes: Tensor | None = None,
    value_changes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Project tokens to keys and values, and write those into rows of the caches, in one launch.

    `key[b, index[b, j]] = tokens[b, j] @ key_weight.T + key_bias`, and likewise for the value, with
    sums in float32.

    Args:
        key, value: `(B, N, G, D)` or `(B, N, G * D)`, written in place.
        index: `(B, K)` or `(1, K)`, each row once per sample.
        tokens: `(B, K, C)`.
        key_weight, value_weight: `(G * D, C)`, as of `torch.nn.Linear`.
        key_bias, value_bias: `(G * D,)`, both or neither.
        key_changes, value_changes: Of the shape of `key` and `value`, both or neither; their rows
            are set to what was added to those of the caches.

    Returns:
        `key` and `value` themselves.
    """
    _linear_scatter(
        key,
        value,
        key_changes,
        value_changes,
        index,
        tokens,
        key_weight,
        key_bias,
        value_weight,
        value_bias,
    )
    return key, value


def _check(
    key: Tensor,
    value: Tensor,
    key_changes: Tensor | None,
    value_changes: Tensor | None,
    index: Tensor,
    tokens: Tensor,
    key_weight: Tensor,
    key_bias: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor | None,
) -> None:
    if tokens.ndim != 3 or key.ndim not in (3, 4) or key.shape != value.shape:
        raise ValueError(
            "tokens must be (B, K, C), and key and value both (B, N, G, D) or (B, N, G * D); got "
            f"{shapes(tokens, key, value)}"
        )
    width = math.prod(key.shape[2:])
    check_index(index, key, "key")
    if tokens.shape[:2] != (len(key), index.shape[1]):
        raise ValueError(
            f"tokens must be ({len(key)}, {index.shape[1]}, C) by key and index; got "
            f"{shapes(tokens)}"
        )
    for name, weight in (("key_weight", key_weight), ("value_weight", value_weight)):
        if weight.shape != (width, tokens.shape[2]):
            raise ValueError(
                f"{name} must be ({width}, {tokens.shape[2]}); got {tuple(weight.shape)}"
            )
    if (key_bias is None) != (value_bias is None):
        raise ValueError("give key_bias and value_bias, or neither")
    for name, bias in (("key_bias", key_bias), ("value_bias", value_bias)):
        if bias is not None and bias.shape != (width,):
            raise ValueError(f"{name} must be ({width},); got {tuple(bias.shape)}")
    if (key_changes is None) != (value_changes is None):
        raise ValueError("give key_changes and value_changes, or neither")
    written = {"key": key, "value": value}
    for name, changes in (("key_changes", key_changes), ("value_changes", value_changes)):
        if changes is not None:
            written[name] = changes
            if changes.shape != key.shape:
                raise ValueError(
                    f"{name} must be {tuple(key.shape)} as key; got {tuple(changes.shape)}"
                )
    check_floats(tokens=tokens)
    read = {"key_weight": key_weight, "value_weight": value_weight}
    if key_bias is not None and value_bias is not None:
        read |= {"key_bias": key_bias, "value_bias": value_bias}
    check_same(tokens=tokens, **written, **read)
    for name, cache in written.items():
        check_written(cache, name)


# Not rows_per_sample: by a multiple of 16, rows next to each other are of one sample.
@jit(
    *("key_b", "key_n", "value_b", "value_n", "key_changes_b", "key_changes_n"),
    *(
        "value_changes_b",
        "value_changes_n",
    ),
    *("index_b", "num_rows", "outputs", "inputs"),
)
def _linear_scatter_kernel(
    key,
    value,
    key_changes,
    value_changes,
    index,
    tokens,
    key_weight,
    value_weight,
    key_bias,
    value_bias,
    key_b,
    key_n,
    value_b,
    value_n,
    key_changes_b,
    key_changes_n,
    value_changes_b,
    value_changes_n,
    tokens_b,
    tokens_k,
    weight_o,
    index_b,
    index_k,
    num_rows,  # B * K
    rows_per_sample,
    outputs,  # in units of VECTOR, as all strides above but those of index
    inputs,
    BIAS: tl.constexpr,
    CHANGES: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Programs that run together share rows of tokens and of weights, which L2 then holds.
    width, depth = outputs * VECTOR, inputs * VECTOR
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), 2 * tl.cdiv(width, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP * tiles_n)
    rows_in_group = tl.minimum(tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + program % (GROUP * tiles_n) % rows_in_group
    tile_n = program % (GROUP * tiles_n) // rows_in_group
    is_value = tile_n >= tiles_n // 2
    weight, bias, output, changes = key_weight, key_bias, key, key_changes
    # Strides of one type, whichever of the caches' would fit into 32 bits.
    output_b, output_n = key_b.to(tl.int64), key_n.to(tl.int64)
    changes_b, changes_n = key_changes_b.to(tl.int64), key_changes_n.to(tl.int64)
    if is_value:
        weight, bias, output, changes = value_weight, value_bias, value, value_changes
        output_b, output_n = value_b.to(tl.int64), value_n.to(tl.int64)
        changes_b, changes_n = value_changes_b.to(tl.int64), value_changes_n.to(tl.int64)
        tile_n -= tiles_n // 2
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_K)
    inside = m < num_rows
    b, k = (m // rows_per_sample).to(tl.int64), (m % rows_per_sample).to(tl.int64)
    x = tokens + ((b * tokens_b + k * tokens_k) * VECTOR)[:, None] + c[None, :]
    w = weight + (o.to(tl.int64) * weight_o * VECTOR)[:, None] + c[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, depth, BLOCK_K):
        left = (first + c < depth)[None, :]
        x_tile = tl.load(x + first, mask=inside[:, None] & left, other=0.0)
        w_tile = tl.load(w + first, mask=(o < width)[:, None] & left, other=0.0)
        total = tl.dot(x_tile, tl.trans(w_tile), acc=total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + o, mask=o < width, other=0.0).to(tl.float32)[None, :]
    n = tl.load(index + b * index_b + k * index_k, mask=inside, other=0).to(tl.int64)
    both = inside[:, None] & (o < width)[None, :]
    row = output + ((b * output_b + n * output_n) * VECTOR)[:, None] + o[None, :]
    if CHANGES:
        new = total.to(output.dtype.element_ty).to(tl.float32)
        old = tl.load(row, mask=both, other=0.0).to(tl.float32)
        beside = changes + ((b * changes_b + n * changes_n) * VECTOR)[:, None] + o[None, :]
        tl.store(beside, new - old, mask=both)
    tl.store(row, total, mask=both)


class Tile(NamedTuple):
    """How the kernel is cut and run."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


GROUP = 8  # tiles of rows that run together


def tile(element_size: int, vector: int) -> Tile:
    """The rule of tiles: within 64 KB of shared memory, the least that a supported chip has.

    Elements that are read one by one (`vector` 1) take more registers for their addresses.
    """
    if element_size == 2:
        return Tile(128, 128 if vector > 1 else 64, 32, 8, 4)
    return Tile(64, 64, 32, 4, 2)


def _operands(
    key: Tensor,
    value: Tensor,
    key_changes: Tensor | None,
    value_changes: Tensor | None,
    index: Tensor,
    tokens: Tensor,
    key_weight: Tensor,
    key_bias: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor | None,
) -> tuple[Tensor, ...]:
    """The kernel's tensors; for one that is not given, and then not read, any other."""
    return (
        key,
        value,
        key if key_changes is None else key_changes,
        value if value_changes is None else value_changes,
        index,
        tokens,
        key_weight,
        value_weight,
        tokens if key_bias is None else key_bias.contiguous(),
        tokens if value_bias is None else value_bias.contiguous(),
    )


def _plan(
    key: Tensor,
    value: Tensor,
    key_changes: Tensor | None,
    value_changes: Tensor | None,
    index: Tensor,
    tokens: Tensor,
    key_weight: Tensor,
    key_bias: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor | None,
) -> Run | None:
    written = [t for t in (key, value, key_changes, value_changes) if t is not None]
    read = [tokens, key_weight, value_weight]
    if (
        any(tensor.stride(-1) != 1 for tensor in (*read, *written))
        or any(cache.ndim == 4 and cache.stride(2) != cache.shape[3] for cache in written)
        or key_weight.stride() != value_weight.stride()
    ):
        return None

    caches, weights = (key, value, key_changes, value_changes), (key_weight, key_bias)
    operands = _operands(*caches, index, tokens, *weights, value_weight, value_bias)
    batch, count, depth = tokens.shape
    width = len(key_weight)
    strides = [stride for cache in operands[:4] for stride in cache.stride()[:2]]
    strides += [*tokens.stride()[:2], key_weight.stride(0)]
    size = tokens.element_size()
    starts = [tensor.data_ptr() // size for tensor in (*read, *written)]
    vector = math.gcd(16 // size, width, depth, *strides, *starts)
    block = tile(size, vector)
    project = launch(
        _linear_scatter_kernel,
        (cdiv(batch * count, block.rows) * 2 * cdiv(width, block.outputs),),
        operands,
        *(stride // vector for stride in strides),
        0 if len(index) == 1 else index.stride(0),
        index.stride(1),
        batch * count,
        count,
        width // vector,
        depth // vector,
        BIAS=key_bias is not None,
        CHANGES=key_changes is not None,
        VECTOR=vector,
        BLOCK_M=block.rows,
        BLOCK_N=block.outputs,
        BLOCK_K=block.inputs,
        GROUP=GROUP,
        num_warps=block.warps,
        num_stages=block.stages,
    )
    return lambda *args: project(*_operands(*args))


_linear_scatter = register(
    "linear_scatter_(Tensor(a!) key, Tensor(b!) value, Tensor(c!)? key_changes, "
    "Tensor(d!)? value_changes, Tensor index, Tensor tokens, Tensor key_weight, "
    "Tensor? key_bias, Tensor value_weight, Tensor? value_bias) -> ()",
    check=_check,
    reference=reference.linear_scatter_,
    plan=_plan,
)
