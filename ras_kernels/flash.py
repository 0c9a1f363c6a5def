"""The kernel of sparse-query attention, its tiles and its launch.

Scores are taken block by block with their running maximum and sum, as in FlashAttention
(arXiv 2205.14135), in powers of 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import _triton
from ._plans import launch
from ._triton import cdiv, jit, next_power_of_2, tl

LOG2_E = math.log2(math.e)
TWO_BLOCKS = 128  # registers of a thread, with which two blocks of 8 warps fit a multiprocessor


@jit()
def _attend(
    top,
    total,
    out1,
    out2,
    query1,
    query2,
    keys,
    values,
    mask,
    key_n,
    value_n,
    mask_n,
    first,
    last,
    num_keys,
    scale,
    SIZE: tl.constexpr,
    SIZE1: tl.constexpr,
    SIZE2: tl.constexpr,
    MASKED: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Take in the keys from `first` to `last`; with TAIL, some of them may be past the end.

    The largest score is scaled and rounded, others are scaled and subtracted in one instruction:
    of up to 2**24 the exponent of the largest is within 1 of 0; from 2**28 on its weight could
    overflow in float16.
    """
    d1 = tl.arange(0, SIZE1)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = n < num_keys
        seen = there
        if MASKED:
            seen = tl.load(mask + n.to(tl.int64) * mask_n, mask=there, other=0) != 0
        key1 = keys + n.to(tl.int64)[:, None] * key_n + d1[None, :]
        value1 = values + n.to(tl.int64)[:, None] * value_n + d1[None, :]
        if TAIL or SIZE1 > SIZE:
            inside = there[:, None] & (d1 < SIZE)[None, :]
            k1 = tl.load(key1, mask=inside, other=0.0)
        else:
            k1 = tl.load(key1)
        # No weight of 0 hides a NaN or an infinity: the values of masked keys are not read.
        if MASKED or (TAIL or SIZE1 > SIZE):  # Triton 3.2 takes no chain of three
            v1 = tl.load(value1, mask=seen[:, None] & (d1 < SIZE)[None, :], other=0.0)
        else:
            v1 = tl.load(value1)
        scores = tl.dot(query1, tl.trans(k1), input_precision="ieee")
        if SIZE2 > 0:
            d2 = tl.arange(0, SIZE2)
            key2 = keys + n.to(tl.int64)[:, None] * key_n + (SIZE1 + d2)[None, :]
            value2 = values + n.to(tl.int64)[:, None] * value_n + (SIZE1 + d2)[None, :]
            inside = (SIZE1 + d2 < SIZE)[None, :]
            k2 = tl.load(key2, mask=there[:, None] & inside if TAIL else inside, other=0.0)
            counts = seen[:, None] & inside if MASKED or TAIL else inside
            v2 = tl.load(value2, mask=counts, other=0.0)
            scores = tl.dot(query2, tl.trans(k2), acc=scores, input_precision="ieee")
        if MASKED or TAIL:
            scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        # Where all keys so far are masked, -inf - -inf would be NaN.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
        weights = tl.exp2(tl.fma(scores, scale, -shift[:, None]))
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
        weights = weights.to(v1.dtype)
        out1 = tl.dot(weights, v1, acc=out1 * decay[:, None], input_precision="ieee")
        if SIZE2 > 0:
            out2 = tl.dot(weights, v2, acc=out2 * decay[:, None], input_precision="ieee")
    return top, total, out1, out2


@jit(
    *("query_b", "query_m", "query_h", "key_b", "key_n", "key_h", "value_b", "value_n", "value_h"),
    *("second_b", "second_m", "second_h", "lengths_b", "num_queries", "num_second", "num_keys"),
)
def _attention_kernel(
    query,
    second,
    key,
    value,
    mask,
    lengths,
    output,
    second_output,
    lse,
    second_lse,
    query_b,
    query_m,
    query_h,
    second_b,
    second_m,
    second_h,
    key_b,
    key_n,
    key_h,
    value_b,
    value_n,
    value_h,
    mask_b,
    mask_n,
    lengths_b,
    num_queries,
    num_second,
    num_keys,
    scale,
    SIGN: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE1: tl.constexpr,
    SIZE2: tl.constexpr,
    PAIR: tl.constexpr,
    LSE: tl.constexpr,
    MASKED: tl.constexpr,
    LENGTHS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Strides come in units of VECTOR elements: the product tells the compiler of the alignment.
    # The grid has one axis, since the others end at 65,535.
    tiles = tl.cdiv(num_queries, BLOCK_M)
    all_tiles = tiles
    if PAIR:
        all_tiles += tl.cdiv(num_second, BLOCK_M)
    b = (tl.program_id(0) // all_tiles // HEADS).to(tl.int64)
    h = (tl.program_id(0) // all_tiles % HEADS).to(tl.int64)
    tile = tl.program_id(0) % all_tiles
    query += (b * query_b + h * query_h) * VECTOR
    query_m = query_m.to(tl.int64) * VECTOR
    if PAIR:
        of_second = tile >= tiles
        tile = tl.where(of_second, tile - tiles, tile)
        num_queries = tl.where(of_second, num_second, num_queries)
        second += (b * second_b + h * second_h) * VECTOR
        query = tl.where(of_second, second, query)
        query_m = tl.where(of_second, second_m.to(tl.int64) * VECTOR, query_m)
        output = tl.where(of_second, second_output, output)
        lse = tl.where(of_second, second_lse, lse)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d1 = tl.arange(0, SIZE1)
    here = (m < num_queries)[:, None]
    row = query + (m.to(tl.int64) * query_m)[:, None]
    query1 = tl.load(row + d1[None, :], mask=here & (d1 < SIZE)[None, :], other=0.0)
    if SIGN != 1:  # which would cost Hopper's products registers
        query1 *= SIGN
    query2 = query1
    out1 = tl.zeros([BLOCK_M, SIZE1], tl.float32)
    out2 = out1
    if SIZE2 > 0:
        d2 = SIZE1 + tl.arange(0, SIZE2)
        query2 = tl.load(row + d2[None, :], mask=here & (d2 < SIZE)[None, :], other=0.0)
        if SIGN != 1:
            query2 *= SIGN
        out2 = tl.zeros([BLOCK_M, SIZE2], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    keys = key + (b * key_b + h // GROUPS * key_h) * VECTOR
    values = value + (b * value_b + h // GROUPS * value_h) * VECTOR
    mask += b * mask_b
    if LENGTHS:
        length = tl.load(lengths + b * lengths_b).to(tl.int64)
        num_keys = tl.maximum(tl.minimum(length, num_keys), 0).to(tl.int32)
    whole = num_keys // BLOCK_N * BLOCK_N
    key_n *= VECTOR
    value_n *= VECTOR
    top, total, out1, out2 = _attend(
        top, total, out1, out2, query1, query2, keys, values, mask, key_n, value_n, mask_n,
        0, whole, num_keys, scale, SIZE, SIZE1, SIZE2, MASKED, False, BLOCK_N,
    )  # fmt: skip
    top, total, out1, out2 = _attend(
        top, total, out1, out2, query1, query2, keys, values, mask, key_n, value_n, mask_n,
        whole, num_keys, num_keys, scale, SIZE, SIZE1, SIZE2, MASKED, True, BLOCK_N,
    )  # fmt: skip
    if LSE:
        natural = (top + tl.log2(total)) * 0.6931471805599453  # minus infinity without a key
        tl.store(lse + (b * HEADS + h) * num_queries + m, natural, mask=m < num_queries)
    share = tl.where(top > float("-inf"), 1 / total, 0.0)[:, None]
    row = output + ((b * num_queries + m) * HEADS + h)[:, None] * SIZE
    tl.store(row + d1[None, :], out1 * share, mask=here & (d1 < SIZE)[None, :])
    if SIZE2 > 0:
        d2 = SIZE1 + tl.arange(0, SIZE2)
        tl.store(row + d2[None, :], out2 * share, mask=here & (d2 < SIZE)[None, :])


class Tile(NamedTuple):
    """How the kernel is cut and run.

    Attributes:
        queries, keys: Of one block at a time.
        warps: Of a block.
        stages: Tiles of keys in shared memory, the next ones to be loaded among them.
        registers: Of a thread at most, if that is not left to the compiler.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


def chunks(head_size: int) -> tuple[int, int]:
    """A head size as one power of two, or from 64 to 128 two: 72 is 64 + 16, of which 8 are masked.

    `tl.dot` wants at least 16 of what it sums over.
    """
    whole = next_power_of_2(max(head_size, 16))
    if whole == max(head_size, 16) or not 64 < head_size <= 128:
        return whole, 0
    return whole // 2, max(next_power_of_2(head_size - whole // 2), 16)


def tile(head_size: int, element_size: int, architecture: int, plain: bool) -> Tile:
    """The rule of tiles: within the chip's shared memory, and no more registers than there are.

    `plain` are products of what lies in whole 16-byte vectors, with neither a mask nor a negative
    scale, which take registers: without them Hopper's products wait for each other. Shared memory
    is 227 KB on Hopper and at least 99 KB on other chips.
    `python -m benchmarks.kernels.compiled` tells what they take up on each chip.
    """
    width = sum(chunks(head_size))
    if element_size > 2:
        return Tile(64, 32, 8, 2) if width <= 96 else Tile(32, 32 if width <= 128 else 16, 8, 2)
    if architecture == 90 and width <= 256:
        # The third stage, since the next tile is asked for when this one's products are done.
        if width <= 64:
            return Tile(128, 64, 4, 3)  # its matrix units work for warp groups of 4
        if width <= 96:
            return Tile(128, 64, 8, 3, TWO_BLOCKS if plain else None)
        return Tile(128, 64 if width <= 128 else 32, 8, 3)
    if width > 128:
        return Tile(64, 32, 8, 2)
    if width <= 64:
        return Tile(128, 64, 8, 3 if width == 64 else 2)
    return Tile(128, 64 if 100 <= architecture < 120 or width < 128 else 32, 8, 2)


def _in_log2(scale: float) -> tuple[int, float]:
    """A scale for powers of 2, as a sign for the queries and a positive factor for the scores.

    So the largest scaled score is the largest score, scaled, and one instruction can scale the
    others and subtract it. The scale of 0 is in the sign, since a masked score is minus infinity.
    """
    factor = abs(scale) * LOG2_E
    if factor < torch.finfo(torch.float32).tiny:
        return 0, 1.0
    return 1 if scale > 0 else -1, factor


Pair = tuple[Tensor, Tensor | None]


def attending(
    outputs: Pair,
    lses: tuple[Tensor | None, Tensor | None],
    queries: Pair,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    scale: float | None,
) -> Callable[..., None] | None:
    """What launches the kernel on arguments of this kind, without the scale; None for no work.

    Args:
        outputs, lses, queries: Two of each, the second None if there is but one query; both `lses`
            None if none is asked for. Outputs are contiguous, as are these.
        key, value, key_mask, key_lengths, scale: As `sparse_attention` takes them.
    """
    query, second = queries
    batch, _, heads, size = query.shape
    rows = [0 if one is None else one.shape[1] for one in queries]
    if not (batch * heads * size * sum(rows) and key.shape[1]):
        return None
    read = [_side_by_side(t) for t in (query, query if second is None else second, key, value)]
    architecture = _triton.architecture(query.device)
    size1, size2 = chunks(size)
    strides = [stride for t in read for stride in t.stride()[:3]]
    bytes_ = query.element_size()
    sign, factor = _in_log2(size**-0.5 if scale is None else scale)
    starts = [t.data_ptr() // bytes_ for t in read]
    vector = math.gcd(16 // bytes_, *strides, *starts)
    plain = key_mask is None and sign == 1 and vector * bytes_ == 16
    block = tile(size, bytes_, architecture, plain)
    mask, lengths = (query if t is None else t for t in (key_mask, key_lengths))
    written = [query if t is None else t for t in (*outputs, *lses)]
    attend = launch(
        _attention_kernel,
        (sum(cdiv(count, block.queries) for count in rows) * heads * batch,),
        (*read, mask, lengths, *written),
        *(stride // vector for stride in strides),
        *((0, 0) if key_mask is None else key_mask.stride()),
        0 if key_lengths is None else key_lengths.stride(0),
        *rows,
        key.shape[1],
        factor,
        SIGN=sign,
        HEADS=heads,
        GROUPS=heads // key.shape[2],
        SIZE=size,
        SIZE1=size1,
        SIZE2=size2,
        PAIR=second is not None,
        LSE=lses[0] is not None,
        MASKED=key_mask is not None,
        LENGTHS=key_lengths is not None,
        VECTOR=vector,
        BLOCK_M=block.queries,
        BLOCK_N=block.keys,
        num_warps=block.warps,
        num_stages=block.stages,
        **({} if block.registers is None else {"maxnreg": block.registers}),
    )

    def run(
        outputs: Pair,
        lses: tuple[Tensor | None, Tensor | None],
        queries: Pair,
        key: Tensor,
        value: Tensor,
        key_mask: Tensor | None,
        key_lengths: Tensor | None,
    ) -> None:
        query, second = queries
        query = _side_by_side(query)
        (output, second_output), (lse, second_lse) = outputs, lses
        attend(
            query,
            query if second is None else _side_by_side(second),
            _side_by_side(key),
            _side_by_side(value),
            query if key_mask is None else key_mask,
            query if key_lengths is None else key_lengths,
            output,
            output if second_output is None else second_output,
            query if lse is None else lse,
            query if second_lse is None else second_lse,
        )

    return run


def _side_by_side(tensor: Tensor) -> Tensor:
    """What is read by rows has to have its elements so."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()
