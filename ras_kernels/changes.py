"""Tokens that are kept together with how they last changed, to be carried on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from ._checks import check_floats, check_index, check_same, check_written, shapes
from ._library import register
from ._plans import Run, launch
from ._triton import jit, tl
from .rows import GRID, Tiling, elements, place, tiling


def update_tokens_(tokens: Tensor, changes: Tensor, index: Tensor | None, rows: Tensor) -> Tensor:
    """Write rows in place, and beside them by how much they differ from what was there.

    `changes[b, n] = rows[b, j] - tokens[b, n]; tokens[b, n] = rows[b, j]` with `n = index[b, j]`.

    Args:
        tokens: `(B, N, ...)`, written in place.
        changes: `(B, N, ...)`, the dtype of `tokens`, written in place.
        index: `(B, K)` or `(1, K)`, each row once per sample; None for all rows, in order.
        rows: `(B, K, ...)`, the dtype of `tokens`.

    Returns:
        `tokens` itself.
    """
    _update(tokens, changes, index, rows)
    return tokens


def carry_tokens(tokens: Tensor, changes: Tensor, gain: Tensor) -> Tensor:
    """Carry tokens on by a share of their last change: `tokens + gain * changes`, in float32.

    Args:
        tokens: `(B, S, ...)`; those beyond the first N stay as they are.
        changes: `(B, N, ...)`, the dtype of `tokens`.
        gain: `(B, N)` float32, the share of each; 0 for those that stay as they are, even if their
            change is infinite or NaN.

    Returns:
        `(B, S, ...)`, contiguous, the dtype of `tokens`.
    """
    return _carry(tokens, changes, gain)


def carry_keys_and_values(
    key: Tensor, value: Tensor, key_changes: Tensor, value_changes: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """Carry a cache's keys and values on as `carry_tokens` does each, in one launch.

    Args:
        key, value: `(B, S, ...)`, the latter of the former's shape and dtype.
        key_changes, value_changes: `(B, N, ...)`, likewise.
        gain: `(B, N)` float32, for both.

    Returns:
        Keys and values, `(B, S, ...)`, contiguous, the dtype of `key`.
    """
    return _carry_both(key, value, key_changes, value_changes, gain)


def _check_update(tokens: Tensor, changes: Tensor, index: Tensor | None, rows: Tensor) -> None:
    check_floats(tokens=tokens)
    if tokens.ndim < 2:
        raise ValueError(f"tokens must be (B, N, ...); got {shapes(tokens)}")
    if index is not None:
        check_index(index, tokens)
    count = tokens.shape[1] if index is None else index.shape[1]
    if changes.shape != tokens.shape or rows.shape != (len(tokens), count, *tokens.shape[2:]):
        raise ValueError(
            f"changes must be {tuple(tokens.shape)} as tokens, and rows "
            f"{(len(tokens), count, *tokens.shape[2:])}; got {shapes(changes, rows)}"
        )
    check_same(tokens=tokens, changes=changes, rows=rows)
    check_written(tokens, "tokens")
    check_written(changes, "changes")


def _check_carry(tokens: Tensor, changes: Tensor, gain: Tensor, name: str = "tokens") -> None:
    check_floats(**{name: tokens})
    check_same(**{name: tokens}, changes=changes)
    carried = changes.shape[1] if min(tokens.ndim, changes.ndim) > 1 else 0
    if (
        min(tokens.ndim, changes.ndim) < 2
        or changes.shape != (len(tokens), carried, *tokens.shape[2:])
        or carried > tokens.shape[1]
        or gain.shape != (len(tokens), carried)
    ):
        raise ValueError(
            f"{name} must be (B, S, ...), changes (B, N, ...) with N of at most S, and gain "
            f"(B, N); got {shapes(tokens, changes, gain)}"
        )
    if gain.dtype != torch.float32 or gain.device != tokens.device:
        raise ValueError(
            f"gain must be float32 on {tokens.device}; got {gain.dtype} on {gain.device}"
        )


def _check_carry_both(
    key: Tensor, value: Tensor, key_changes: Tensor, value_changes: Tensor, gain: Tensor
) -> None:
    for one, other, names in (
        (key, value, "key and value"),
        (key_changes, value_changes, "key_changes and value_changes"),
    ):
        if one.shape != other.shape:
            raise ValueError(f"{names} must be of one shape; got {shapes(one, other)}")
    check_same(key=key, value=value, key_changes=key_changes, value_changes=value_changes)
    _check_carry(key, key_changes, gain, "key")


@jit(
    *("tokens_b", "tokens_n", "tokens_r", "changes_b", "changes_n", "changes_r"),
    *("rows_b", "rows_k", "rows_r", "index_b", "num_rows", "columns"),
)
def _update_kernel(
    tokens,
    changes,
    index,
    rows,
    tokens_b,
    tokens_n,
    tokens_r,
    changes_b,
    changes_n,
    changes_r,
    rows_b,
    rows_k,
    rows_r,
    index_b,
    index_k,
    num_rows,
    columns,
    ALL: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, r, k, c, within = place(columns, VECTOR, BLOCK_K, BLOCK_C)
    inside = k < num_rows
    n = k
    if not ALL:
        n = tl.load(index + b * index_b + k.to(tl.int64) * index_k, mask=inside, other=0)
    both = inside[:, None] & within
    here = elements(tokens, b, r, n, c, tokens_b, tokens_n, tokens_r, VECTOR)
    there = elements(rows, b, r, k, c, rows_b, rows_k, rows_r, VECTOR)
    beside = elements(changes, b, r, n, c, changes_b, changes_n, changes_r, VECTOR)
    new = tl.load(there, mask=both)
    old = tl.load(here, mask=both)
    tl.store(beside, new.to(tl.float32) - old.to(tl.float32), mask=both)
    tl.store(here, new, mask=both)


@jit(
    *("tokens_b", "tokens_n", "tokens_r", "changes_b", "changes_n", "changes_r"),
    *("output_b", "output_n", "output_r", "other_b", "other_n", "other_r"),
    *("other_changes_b", "other_changes_n", "other_changes_r"),
    *("gain_b", "gain_n", "batch", "num_rows", "carried", "columns"),
)
def _carry_kernel(
    tokens,
    changes,
    output,
    other,
    other_changes,
    other_output,
    gain,
    tokens_b,
    tokens_n,
    tokens_r,
    changes_b,
    changes_n,
    changes_r,
    output_b,  # those of both outputs
    output_n,
    output_r,
    other_b,
    other_n,
    other_r,
    other_changes_b,
    other_changes_n,
    other_changes_r,
    gain_b,
    gain_n,
    batch,
    num_rows,
    carried,
    columns,
    BOTH: tl.constexpr,  # whether there are others, whose samples come after those of the first
    VECTOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b, r, n, c, within = place(columns, VECTOR, BLOCK_K, BLOCK_C)
    if BOTH:
        # Strides of one type, whichever would fit into 32 bits.
        tokens_b, tokens_n, tokens_r = (
            tokens_b.to(tl.int64),
            tokens_n.to(tl.int64),
            tokens_r.to(tl.int64),
        )
        changes_b, changes_n, changes_r = (
            changes_b.to(tl.int64),
            changes_n.to(tl.int64),
            changes_r.to(tl.int64),
        )
        if b >= batch:
            tokens, changes, output = other, other_changes, other_output
            tokens_b, tokens_n, tokens_r = (
                other_b.to(tl.int64),
                other_n.to(tl.int64),
                other_r.to(tl.int64),
            )
            changes_b = other_changes_b.to(tl.int64)
            changes_n = other_changes_n.to(tl.int64)
            changes_r = other_changes_r.to(tl.int64)
            b -= batch
    both = (n < num_rows)[:, None] & within
    here = elements(tokens, b, r, n, c, tokens_b, tokens_n, tokens_r, VECTOR)
    beside = elements(changes, b, r, n, c, changes_b, changes_n, changes_r, VECTOR)
    there = elements(output, b, r, n, c, output_b, output_n, output_r, VECTOR)
    share = tl.load(gain + b * gain_b + n.to(tl.int64) * gain_n, mask=n < carried, other=0.0)
    some = (share != 0)[:, None] & within  # 0 times a change of infinity would be NaN
    value = tl.load(here, mask=both).to(tl.float32)
    change = share[:, None] * tl.load(beside, mask=some, other=0.0).to(tl.float32)
    tl.store(there, value + change, mask=both)


def _tiling(count: int, *tensors: Tensor) -> Tiling | None:
    """As `tiling`, for kernels that take columns side by side."""
    how = tiling(count, *tensors)
    return how if how is not None and all(stride == 1 for stride in how.inner) else None


def _plan_update(tokens: Tensor, changes: Tensor, index: Tensor | None, rows: Tensor) -> Run | None:
    how = _tiling(rows.shape[1], tokens, changes, rows)
    if how is None:
        return None
    update = launch(
        _update_kernel,
        how.grid,
        (tokens, changes, rows if index is None else index, rows),
        *how.strides,
        0 if index is None or len(index) == 1 else index.stride(0),
        0 if index is None else index.stride(1),
        rows.shape[1],
        how.columns,
        ALL=index is None,
        VECTOR=how.vector,
        BLOCK_K=how.block_k,
        BLOCK_C=how.block_c,
        num_warps=4,
    )

    def run(tokens: Tensor, changes: Tensor, index: Tensor | None, rows: Tensor) -> None:
        update(tokens, changes, rows if index is None else index, rows)

    return run


def _launch_carry(gain: Tensor, *pairs: tuple[Tensor, Tensor]) -> Callable[..., None] | None:
    """A launch for tokens and their changes, or for two such pairs."""
    (tokens, changes), (other, other_changes) = pairs[0], pairs[-1]
    output = _fake_carry(tokens, changes, gain)
    how = _tiling(tokens.shape[1], tokens, changes, output, other, other_changes)
    samples = len(tokens) * len(pairs)
    if how is None or samples > GRID:
        return None
    return launch(
        _carry_kernel,
        (*how.grid[:2], samples),
        (tokens, changes, output, other, other_changes, output, gain),
        *how.strides,
        *gain.stride(),
        len(tokens),
        tokens.shape[1],
        changes.shape[1],
        how.columns,
        BOTH=len(pairs) > 1,
        VECTOR=how.vector,
        BLOCK_K=how.block_k,
        BLOCK_C=how.block_c,
        num_warps=4,
    )


def _plan_carry(tokens: Tensor, changes: Tensor, gain: Tensor) -> Run | None:
    carry = _launch_carry(gain, (tokens, changes))
    if carry is None:
        return None

    def run(tokens: Tensor, changes: Tensor, gain: Tensor) -> Tensor:
        output = _fake_carry(tokens, changes, gain)
        carry(tokens, changes, output, tokens, changes, output, gain)
        return output

    return run


def _plan_carry_both(
    key: Tensor, value: Tensor, key_changes: Tensor, value_changes: Tensor, gain: Tensor
) -> Run | None:
    carry = _launch_carry(gain, (key, key_changes), (value, value_changes))
    if carry is None:
        return None

    def run(
        key: Tensor, value: Tensor, key_changes: Tensor, value_changes: Tensor, gain: Tensor
    ) -> tuple[Tensor, Tensor]:
        outputs = _fake_carry_both(key, value)
        carry(key, key_changes, outputs[0], value, value_changes, outputs[1], gain)
        return outputs

    return run


def _fake_carry(tokens: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)


def _fake_carry_both(key: Tensor, value: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return _fake_carry(key), _fake_carry(value)


_update = register(
    "update_tokens_(Tensor(a!) tokens, Tensor(b!) changes, Tensor? index, Tensor rows) -> ()",
    check=_check_update,
    reference=reference.update_tokens_,
    plan=_plan_update,
)
_carry = register(
    "carry_tokens(Tensor tokens, Tensor changes, Tensor gain) -> Tensor",
    check=_check_carry,
    reference=reference.carry_tokens,
    plan=_plan_carry,
    fake=_fake_carry,
)
_carry_both = register(
    "carry_keys_and_values(Tensor key, Tensor value, Tensor key_changes, Tensor value_changes, "
    "Tensor gain) -> (Tensor, Tensor)",
    check=_check_carry_both,
    reference=reference.carry_keys_and_values,
    plan=_plan_carry_both,
    fake=_fake_carry_both,
)
