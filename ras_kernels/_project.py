"""The kernel of up to six projections, whose results go to rows of outputs and caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ._triton import cdiv, jit, tl


@jit(
    *("key_b", "key_n", "value_b", "value_n", "key_changes_b", "key_changes_n"),
    *("value_changes_b", "value_changes_n", "tokens_b", "tokens_k", "text_b", "text_k"),
    *("index_b", "num_rows", "rows_per_sample"),
    *("text_rows", "text_per_sample", "first_text", "query_outputs", "outputs", "inputs"),
)
def _project_kernel(
    key,
    value,
    key_changes,
    value_changes,
    index,
    tokens,
    query_weight,
    key_weight,
    value_weight,
    query_bias,
    key_bias,
    value_bias,
    text,
    text_query_weight,
    text_key_weight,
    text_value_weight,
    text_query_bias,
    text_key_bias,
    text_value_bias,
    query,
    text_query,
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
    text_b,
    text_k,
    weight_o,
    index_b,
    index_k,
    num_rows,  # B * K
    rows_per_sample,
    text_rows,  # B * T
    text_per_sample,
    first_text,  # of the caches' rows
    query_outputs,  # in units of VECTOR, as all strides above but those of index
    outputs,
    inputs,
    QUERY: tl.constexpr,
    TEXT: tl.constexpr,
    INDEX: tl.constexpr,
    BIAS: tl.constexpr,
    CHANGES: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Each program has a tile of one of up to six products, those of the image's tokens first.
    width, depth = outputs * VECTOR, inputs * VECTOR
    tiles_q = tl.cdiv(query_outputs * VECTOR, BLOCK_N)
    tiles_kv = tl.cdiv(width, BLOCK_N)
    tiles_n = tiles_q + 2 * tiles_kv
    program = tl.program_id(0)
    # Strides of one type, whichever would fit into 32 bits.
    rows_b, rows_k = tokens_b.to(tl.int64), tokens_k.to(tl.int64)
    if TEXT:
        before = tl.cdiv(num_rows, BLOCK_M) * tiles_n
        of_text = program >= before
        if of_text:
            program -= before
            tokens, query = text, text_query
            query_weight, key_weight = text_query_weight, text_key_weight
            value_weight = text_value_weight
            query_bias, key_bias, value_bias = text_query_bias, text_key_bias, text_value_bias
            rows_b, rows_k = text_b.to(tl.int64), text_k.to(tl.int64)
            num_rows, rows_per_sample = text_rows, text_per_sample
    # Programs that run together share rows of tokens and of weights, which L2 then holds.
    group = program // (GROUP * tiles_n)
    rows_in_group = tl.minimum(tl.cdiv(num_rows, BLOCK_M) - group * GROUP, GROUP)
    tile_m = group * GROUP + program % (GROUP * tiles_n) % rows_in_group
    tile_n = program % (GROUP * tiles_n) // rows_in_group
    weight, bias, output, changes = key_weight, key_bias, key, key_changes
    output_b, output_n = key_b.to(tl.int64), key_n.to(tl.int64)
    changes_b, changes_n = key_changes_b.to(tl.int64), key_changes_n.to(tl.int64)
    of_query = tile_n < tiles_q
    if QUERY:
        if of_query:
            weight, bias, output = query_weight, query_bias, query
            width = query_outputs * VECTOR
            output_n = query_outputs.to(tl.int64)
            output_b = output_n * rows_per_sample
        else:
            tile_n -= tiles_q
    if (tile_n >= tiles_kv) & (not of_query):
        weight, bias, output, changes = value_weight, value_bias, value, value_changes
        output_b, output_n = value_b.to(tl.int64), value_n.to(tl.int64)
        changes_b, changes_n = value_changes_b.to(tl.int64), value_changes_n.to(tl.int64)
        tile_n -= tiles_kv
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_K)
    inside = m < num_rows
    b, k = m // rows_per_sample, m % rows_per_sample
    x = tokens + ((b * rows_b + k * rows_k) * VECTOR)[:, None] + c[None, :]
    w = weight + (o.to(tl.int64) * weight_o * VECTOR)[:, None] + c[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, depth, BLOCK_K):
        left = (first + c < depth)[None, :]
        x_tile = tl.load(x + first, mask=inside[:, None] & left, other=0.0)
        w_tile = tl.load(w + first, mask=(o < width)[:, None] & left, other=0.0)
        total = tl.dot(x_tile, tl.trans(w_tile), acc=total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + o, mask=o < width, other=0.0).to(tl.float32)[None, :]
    n = k
    if TEXT:
        n += tl.where(of_text & (not of_query), first_text, 0)
    of_image = inside
    if QUERY:
        of_image &= not of_query
    if TEXT:
        of_image &= not of_text
    if INDEX:
        listed = index + b.to(tl.int64) * index_b + k.to(tl.int64) * index_k
        n = tl.load(listed, mask=of_image, other=0).to(tl.int32) + tl.where(of_image, 0, n)
    both = inside[:, None] & (o < width)[None, :]
    row = output + ((b * output_b + n * output_n) * VECTOR)[:, None] + o[None, :]
    if CHANGES:
        noted = both & of_image[:, None]
        new = total.to(output.dtype.element_ty).to(tl.float32)
        old = tl.load(row, mask=noted, other=0.0).to(tl.float32)
        beside = changes + ((b * changes_b + n * changes_n) * VECTOR)[:, None] + o[None, :]
        tl.store(beside, new - old, mask=noted)
    tl.store(row, total, mask=both)


class Tile(NamedTuple):
    """How the kernel is cut and run."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int


GROUP = 8  # tiles of rows that run together
WARP_GROUP_ROWS = 64  # that a matrix unit of Hopper's takes at a time
HOPPER = Tile(128, 128, 64, 4, 3), Tile(64, 128, 64, 4, 3)
"""By half as many barriers per product than elsewhere; 96 KB of shared memory, and 72."""


def tile(
    element_size: int,
    vector: int,
    products: Sequence[tuple[int, int]],
    architecture: int,
    multiprocessors: int,
) -> Tile:
    """The rule of tiles: on Hopper by the number of them, elsewhere within 64 KB of shared memory.

    That is the least that a supported chip has. On Hopper shared memory bounds the loop: each warp
    group's product reads its rows and all columns, and both are written once. The multiprocessor
    with the most tiles is to move the least.

    Args:
        element_size: Bytes.
        vector: Elements that one access takes; those that are read one by one (1) take more
            registers for their addresses.
        products: Rows and outputs of each.
        architecture: See `_triton.architecture`.
        multiprocessors: Of the chip.
    """
    if element_size > 2:
        return Tile(64, 64, 32, 4, 2)
    if vector == 1:
        return Tile(128, 64, 32, 8, 4)
    if architecture != 90:
        return Tile(128, 128, 32, 8, 4)

    def moved(block: Tile) -> int:
        count = sum(cdiv(m, block.rows) * cdiv(n, block.outputs) for m, n in products)
        groups = block.rows // WARP_GROUP_ROWS
        read = groups * (WARP_GROUP_ROWS + block.outputs)
        return cdiv(count, multiprocessors) * (read + block.rows + block.outputs)

    return min(HOPPER, key=moved)
