"""Drift: how fast each region's noise was changing when it was last computed."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from ._checks import (
    check_finite,
    check_floats,
    check_index,
    check_same,
    check_written,
    shapes,
)
from ._library import register
from ._plans import Run, launch
from ._triton import cdiv, jit, tl
from .regions import BLOCK

PART = 16  # columns that are summed up by themselves


def update_drift_(
    last: Tensor,
    pace: Tensor,
    since: Tensor,
    index: Tensor | None,
    noise: Tensor,
    *,
    position: float,
) -> None:
    """Note new noise of some regions, and how fast it was changing.

    For a region `n = index[b, j]` with the values `x` in `noise` and `y` in `last`:
    `pace[b, n] = sqrt(mean((x - y)**2)) / max(|position - since[b, n]|, 1e-6)`, in float32;
    then `last` takes over `x`, and `since[b, n] = position`.

    Args:
        last: Of the shape and dtype of `noise`, each region's noise when it was last computed;
            written in place.
        pace: `(B, N)` float32, written in place.
        since: `(B, N)` float32, the positions at which regions were last computed; written in
            place.
        index: `(B, K)` or `(1, K)`, each region once per sample; None for all.
        noise: `(B, N, C)`, a token for each region.
        position: Where the noise was predicted, in any unit of time.
    """
    _update(last, pace, since, index, noise, position)


def drift_scores(pace: Tensor, since: Tensor, *, position: float) -> Tensor:
    """How far each region's noise has gone since, at its last pace: `pace * |position - since|`.

    Args:
        pace, since: `(B, N)` float32, as `update_drift_` keeps them.
        position: Of the step to come, in the same unit.

    Returns:
        `(B, N)` float32, scores for `select_regions` with `high_ratio=0`, which keeps the highest.
    """
    return _scores(pace, since, position)


def _check_update(
    last: Tensor, pace: Tensor, since: Tensor, index: Tensor | None, noise: Tensor, position: float
) -> None:
    if noise.ndim != 3 or not noise.shape[2]:
        raise ValueError(f"noise must be (B, N, C), and C at least 1; got {shapes(noise)}")
    check_floats(noise=noise)
    if last.shape != noise.shape:
        raise ValueError(f"last must be {tuple(noise.shape)} as noise; got {shapes(last)}")
    check_same(noise=noise, last=last)
    _check_columns(noise.shape[:2], pace=pace, since=since)
    if pace.device != noise.device:
        raise ValueError(f"pace is on {pace.device}, noise on {noise.device}")
    if index is not None:
        check_index(index, pace, "pace")
    for name, tensor in (("last", last), ("pace", pace), ("since", since)):
        check_written(tensor, name)
    check_finite(position=position)


def _check_scores(pace: Tensor, since: Tensor, position: float) -> None:
    if pace.ndim != 2:
        raise ValueError(f"pace must be (B, N); got {shapes(pace)}")
    _check_columns(pace.shape, pace=pace, since=since)
    check_finite(position=position)


def _check_columns(shape: tuple[int, ...], **columns: Tensor) -> None:
    for name, column in columns.items():
        if column.shape != shape or column.dtype != torch.float32:
            raise ValueError(
                f"{name} must be float32 of shape {tuple(shape)}; got {column.dtype} of shape "
                f"{shapes(column)}"
            )
    check_same(**columns)


@jit(
    *("last_b", "last_n", "noise_b", "noise_n", "pace_b", "pace_n", "since_b", "since_n"),
    *("index_b", "num_rows"),
)
def _update_drift_kernel(
    last,
    pace,
    since,
    index,
    noise,
    last_b,
    last_n,
    last_c,
    noise_b,
    noise_n,
    noise_c,
    pace_b,
    pace_n,
    since_b,
    since_n,
    index_b,
    index_k,
    num_rows,
    position,
    least_gap,
    ALL: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = k < num_rows
    n = k.to(tl.int64)
    if not ALL:
        n = tl.load(index + b * index_b + n * index_k, mask=inside, other=0).to(tl.int64)
    old = last + b * last_b + n * last_n
    new = noise + b * noise_b + n * noise_n
    squares = tl.zeros([BLOCK], tl.float32)
    for first in range(0, COLUMNS, PART):
        part = tl.zeros([BLOCK], tl.float32)  # sums of sums, which are rounded less
        for c in range(first, tl.minimum(first + PART, COLUMNS)):
            column = tl.cast(c, tl.int64)
            value = tl.load(new + column * noise_c, mask=inside, other=0.0)
            before = tl.load(old + column * last_c, mask=inside, other=0.0)
            change = value.to(tl.float32) - before.to(tl.float32)
            part += change * change
            tl.store(old + column * last_c, value, mask=inside)
        squares += part
    known = since + b * since_b + n * since_n
    gap = tl.abs(position - tl.load(known, mask=inside, other=0.0))
    change = tl.sqrt(squares / COLUMNS)
    tl.store(pace + b * pace_b + n * pace_n, change / tl.maximum(gap, least_gap), mask=inside)
    tl.store(known, tl.zeros([BLOCK], tl.float32) + position, mask=inside)


@jit()
def _drift_scores_kernel(
    pace, since, scores, pace_b, pace_n, since_b, since_n, regions, position, BLOCK: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    n = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = n < regions
    speed = tl.load(pace + b * pace_b + n * pace_n, mask=inside, other=0.0)
    then = tl.load(since + b * since_b + n * since_n, mask=inside, other=0.0)
    tl.store(scores + b * regions + n, speed * tl.abs(position - then), mask=inside)


def _plan_update(
    last: Tensor, pace: Tensor, since: Tensor, index: Tensor | None, noise: Tensor, position: float
) -> Run:
    batch, regions, columns = noise.shape
    count = regions if index is None else index.shape[1]
    update = launch(
        _update_drift_kernel,
        (batch, cdiv(count, BLOCK)),
        (last, pace, since, pace if index is None else index, noise),
        *last.stride(),
        *noise.stride(),
        *pace.stride(),
        *since.stride(),
        0 if index is None or len(index) == 1 else index.stride(0),
        0 if index is None else index.stride(1),
        count,
        position,
        reference.LEAST_GAP,
        ALL=index is None,
        COLUMNS=columns,
        PART=PART,
        BLOCK=BLOCK,
        num_warps=1,
    )

    def run(
        last: Tensor,
        pace: Tensor,
        since: Tensor,
        index: Tensor | None,
        noise: Tensor,
        position: float,
    ) -> None:
        update(last, pace, since, pace if index is None else index, noise)

    return run


def _plan_scores(pace: Tensor, since: Tensor, position: float) -> Run:
    batch, regions = pace.shape
    score = launch(
        _drift_scores_kernel,
        (batch, cdiv(regions, 1024)),
        (pace, since, _fake_scores(pace, since, position)),
        *pace.stride(),
        *since.stride(),
        regions,
        position,
        BLOCK=1024,
        num_warps=4,
    )

    def run(pace: Tensor, since: Tensor, position: float) -> Tensor:
        scores = _fake_scores(pace, since, position)
        score(pace, since, scores)
        return scores

    return run


def _fake_scores(pace: Tensor, since: Tensor, position: float) -> Tensor:
    return torch.empty_like(pace, memory_format=torch.contiguous_format)


_update = register(
    "update_drift_(Tensor(a!) last, Tensor(b!) pace, Tensor(c!) since, Tensor? index, "
    "Tensor noise, float position) -> ()",
    check=_check_update,
    reference=reference.update_drift_,
    plan=_plan_update,
)
_scores = register(
    "drift_scores(Tensor pace, Tensor since, float position) -> Tensor",
    check=_check_scores,
    reference=reference.drift_scores,
    plan=_plan_scores,
    fake=_fake_scores,
)
