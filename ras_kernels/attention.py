"""Sparse-query attention: a few queries over all cached keys and values."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import reference
from ._checks import check_apart, check_finite, check_floats, check_same, shapes
from ._library import register
from ._plans import Run
from .flash import attending

Pair = tuple[Tensor, Tensor]


@overload
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    out: Tensor | None = None,
) -> Tensor: ...
@overload
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    out: Tensor | None = None,
) -> Pair: ...
@overload
def sparse_attention(
    query: Pair,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    out: Pair | None = None,
) -> Pair: ...
@overload
def sparse_attention(
    query: Pair,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    out: Pair | None = None,
) -> tuple[Pair, Pair]: ...
def sparse_attention(
    query: Tensor | Pair,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: Tensor | Pair | None = None,
) -> Any:
    """Let a few queries attend over all cached rows: `softmax(scale * Q @ K.T) @ V` per head.

    Scores and sums are in float32; scores, scaled, are to be within 2**24. A query without any key
    to attend to gets zeros. Rows of keys and values that do not count may hold anything, NaN and
    infinities included.

    Args:
        query: `(B, K, H, D)`, or a pair of such, as of image and text tokens, each with its own K.
        key, value: `(B, S, G, D)`; query head `h` uses key head `h // (H / G)` (grouped-query).
        key_mask: `(B, S)` bool, False for rows that nobody attends to.
        key_lengths: `(B,)` int32 or int64, in its place: only the first so many rows count.
        scale: Of the scores; `D ** -0.5` if None.
        return_lse: Also return the natural logarithm of the sum of each query's exponentiated
            scores, for `merge_states`.
        out: What to write to and return: contiguous, of the query's shape and dtype; a pair if
            `query` is one. It may share no memory with any other argument, which is checked in each
            call that is not compiled.

    Returns:
        `(B, K, H, D)`, contiguous, the dtype of `query`; a pair of such for a pair. With
        `return_lse` that, and `(B, H, K)` float32 (or float64, as the query), minus infinity for a
        query without any key; a pair of such for a pair.
    """
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse must be True or False; got a {type(return_lse).__name__}")
    if isinstance(query, Tensor) and not return_lse and out is None:
        return _attention(query, key, value, key_mask, key_lengths, scale)
    queries = query if isinstance(query, tuple) else (query,)
    if not 1 <= len(queries) <= 2 or not all(isinstance(one, Tensor) for one in queries):
        raise TypeError(
            f"query must be a tensor or a pair of tensors; got a {type(query).__name__}"
        )
    outs: Any = out if isinstance(query, tuple) or out is None else (out,)
    if outs is None:
        outs = tuple(_fake(one) for one in queries)
    elif not isinstance(outs, tuple) or len(outs) != len(queries):
        raise TypeError("out must be a tensor, or for a pair of queries a pair of tensors")
    elif not torch.compiler.is_compiling() and all(isinstance(one, Tensor) for one in outs):
        read: dict[str, Any] = {"query": queries[0], "the second query": (*queries, None)[1]}
        read |= {"key": key, "value": value, "key_mask": key_mask, "key_lengths": key_lengths}
        if all(one is None or isinstance(one, Tensor) for one in read.values()):
            check_apart(dict(zip(("out", "the second out"), outs)), read)
    # Of a query of another shape, which is told of by the checks, there is none.
    lses = tuple(_fake_lse(one) if return_lse and one.ndim == 4 else None for one in queries)
    none = (None,) * (2 - len(queries))
    _attention_into(
        *(*outs, *none, *lses, *none, *queries, *none),
        *(key, value, key_mask, key_lengths, scale),
    )
    if not isinstance(query, tuple):
        return (outs[0], lses[0]) if return_lse else outs[0]
    return (outs, lses) if return_lse else outs


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    scale: float | None,
) -> None:
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            "query must be (B, K, H, D), and key and value both (B, S, G, D); got "
            f"{shapes(query, key, value)}"
        )
    if (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]) or (
        query.shape[2] % key.shape[2] if key.shape[2] else query.shape[2]
    ):
        raise ValueError(
            "query and key must agree in batch and head size, and the key's heads divide the "
            f"query's; got {shapes(query, key)}"
        )
    check_floats(query=query)
    check_same(query=query, key=key, value=value)
    if key_mask is not None and key_lengths is not None:
        raise ValueError("give key_mask or key_lengths, not both")
    if key_mask is not None and (key_mask.shape != key.shape[:2] or key_mask.dtype != torch.bool):
        raise ValueError(
            f"key_mask must be bool of shape {tuple(key.shape[:2])}; got {key_mask.dtype} "
            f"of shape {tuple(key_mask.shape)}"
        )
    if key_lengths is not None and (
        key_lengths.shape != key.shape[:1] or key_lengths.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"key_lengths must be ({len(key)},), int32 or int64; got {key_lengths.dtype} of "
            f"shape {tuple(key_lengths.shape)}"
        )
    for name, tensor in (("key_mask", key_mask), ("key_lengths", key_lengths)):
        if tensor is not None and tensor.device != key.device:
            raise ValueError(f"{name} is on {tensor.device}, key on {key.device}")
    if scale is not None:
        check_finite(scale=scale)


def _check_second(query: Tensor, second: Tensor) -> None:
    if second.ndim != 4 or second[:, :0].shape != query[:, :0].shape:
        raise ValueError(
            f"the second query must have the first's shape but for K; got {shapes(query, second)}"
        )
    check_same(query=query, second=second)


def _check_into(
    out: Tensor,
    second_out: Tensor | None,
    lse: Tensor | None,
    second_lse: Tensor | None,
    query: Tensor,
    second: Tensor | None,
    *others: Any,
) -> None:
    _check(query, *others)
    if second is None:
        if second_out is not None or second_lse is not None:
            raise ValueError("without a second query there is no second out, nor a second lse")
    else:
        _check_second(query, second)
        if second_out is None or (second_lse is None) != (lse is None):
            raise ValueError(
                "a second query needs a second out, and an lse where the first has one"
            )
    for one, written, sums in ((query, out, lse), (second, second_out, second_lse)):
        if one is None or written is None:
            continue
        if written.shape != one.shape or not written.is_contiguous():
            raise ValueError(
                f"out must be contiguous and {tuple(one.shape)}, as query is; got "
                f"{tuple(written.shape)} with strides {written.stride()}"
            )
        check_same(query=one, out=written)
        expected = _fake_lse(one)
        if sums is not None and (sums.shape, sums.dtype, sums.device, sums.is_contiguous()) != (
            *(expected.shape, expected.dtype, expected.device),
            True,
        ):
            raise ValueError(
                f"lse must be contiguous, {tuple(expected.shape)} and {expected.dtype}; got "
                f"{tuple(sums.shape)} and {sums.dtype}"
            )


def _plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    scale: float | None,
) -> Run:
    cache = key, value, key_mask, key_lengths
    attend = attending((_fake(query), None), (None, None), (query, None), *cache, scale)
    if attend is None:
        return lambda query, *_: torch.zeros_like(query, memory_format=torch.contiguous_format)

    def run(query: Tensor, *others: Any) -> Tensor:
        output = _fake(query)
        attend((output, None), (None, None), (query, None), *others[:4])
        return output

    return run


def _plan_into(
    out: Tensor,
    second_out: Tensor | None,
    lse: Tensor | None,
    second_lse: Tensor | None,
    query: Tensor,
    second: Tensor | None,
    *others: Any,
) -> Run | None:
    attend = attending((out, second_out), (lse, second_lse), (query, second), *others)
    if attend is None:
        return None

    def run(
        out: Tensor,
        second_out: Tensor | None,
        lse: Tensor | None,
        second_lse: Tensor | None,
        query: Tensor,
        second: Tensor | None,
        *others: Any,
    ) -> None:
        attend((out, second_out), (lse, second_lse), (query, second), *others[:4])

    return run


def _fake(query: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _fake_lse(query: Tensor) -> Tensor:
    batch, rows, heads, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((batch, heads, rows), dtype=dtype)


_CACHE = "Tensor key, Tensor value, Tensor? key_mask, Tensor? key_lengths, float? scale"

_attention = register(
    f"sparse_attention(Tensor query, {_CACHE}) -> Tensor",
    check=_check,
    reference=reference.sparse_attention,
    plan=_plan,
    fake=_fake,
)
_attention_into = register(
    "sparse_attention_into_(Tensor(a!) out, Tensor(b!)? second_out, Tensor(c!)? lse, "
    f"Tensor(d!)? second_lse, Tensor query, Tensor? second, {_CACHE}) -> ()",
    check=_check_into,
    reference=reference.sparse_attention_into_,
    plan=_plan_into,
)
