"""Region scores, and the selection of the regions to compute next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from ._checks import check_finite, check_floats, shapes
from ._library import register
from ._plans import Run, launch
from ._triton import cdiv, jit, tl

METRICS = ("std", "l2norm")
"""The region scores of arXiv 2502.10389, section 3."""

BLOCK = 32  # regions of a program
OTHERS = 128  # regions that it compares with at a time, a multiple of BLOCK
MOST_COMPARED = 8192  # regions of a sample with each other; of more, sorts are less work


def region_scores(noise: Tensor, pixels: int, metric: str = "std") -> Tensor:
    """Score each region: the mean over its pixels of the noise's spread over the channels.

    Args:
        noise: Guided noise, `(B, N, pixels * C)`: a region is a token, whose pixels come one after
            the other, each with its channels together.
        pixels: Of a token: `p**2` of an image's patch, `p_t * p_h * p_w` of a video's.
        metric: `"std"`, the (population) standard deviation, or `"l2norm"`, the L2 norm.

    Returns:
        `(B, N)` float32. The source is arXiv 2502.10389, section 3; a constant factor has no
        effect on a selection.
    """
    return _scores(noise, pixels, metric)


def select_regions(
    scores: Tensor,
    ages: Tensor,
    num_active: int,
    *,
    high_ratio: float,
    starvation_scale: float,
) -> tuple[Tensor, Tensor]:
    """Choose the regions to compute next, and count how long the others have waited.

    With `r` the rank of a region's score (0 for the lowest, ties by position, NaN the highest) and
    `c` the centre of the ranks kept when `high_ratio` of the dropped ones go from the top and the
    rest from the bottom, the `num_active` smallest `|r - c| * exp(-starvation_scale * age)` are
    chosen, ties by position. At equal ages that is the split of arXiv 2502.10389. No region
    starves, whatever the scores: with `M = max(c, N - 1 - c)`, no age exceeds
    `ceil(log(2 * M) / starvation_scale) + ceil((N - 1) / (num_active - 1))`: past the first term
    at most one region a step that is younger by that much can go before, and every other choice
    takes an older region out of the way. Without a `starvation_scale`, or by one region a step
    (always that at `c`, perhaps), there is no bound.

    Args:
        scores: `(B, N)`, compared as float32.
        ages: `(B, N)` integers: steps since a region was last computed, 0 if in the last one.
        num_active: Regions to choose per sample, `1 <= num_active <= N`.
        high_ratio: Share of the dropped regions that have the highest scores, in [0, 1].
        starvation_scale: Weight of the age, at least 0; at 0 regions may starve.

    Returns:
        The chosen regions `(B, num_active)` in ascending order, int32, and the new ages `(B, N)`.
    """
    return _select(scores, ages, num_active, high_ratio, starvation_scale)


def _check_scores(noise: Tensor, pixels: int, metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
    if noise.ndim != 3 or pixels < 1 or noise.shape[2] % pixels or not noise.shape[2]:
        raise ValueError(
            "noise must be (B, N, pixels * C), and pixels and C at least 1; got "
            f"{shapes(noise)} and {pixels} pixels"
        )
    check_floats(noise=noise)


def _check_select(
    scores: Tensor, ages: Tensor, num_active: int, high_ratio: float, starvation_scale: float
) -> None:
    if scores.ndim != 2 or ages.shape != scores.shape or not scores.shape[1]:
        raise ValueError(
            f"scores and ages must both be (B, N), and N at least 1; got {shapes(scores, ages)}"
        )
    if ages.dtype not in (torch.int32, torch.int64) or ages.device != scores.device:
        raise ValueError(
            f"ages must be int32 or int64 on {scores.device}; got {ages.dtype} on {ages.device}"
        )
    check_floats(scores=scores)
    if not 1 <= num_active <= scores.shape[1]:
        raise ValueError(f"num_active must be from 1 to {scores.shape[1]}; got {num_active}")
    check_finite(starvation_scale=starvation_scale)
    if not 0 <= high_ratio <= 1 or starvation_scale < 0:
        raise ValueError(
            "high_ratio must be in [0, 1] and starvation_scale at least 0; got "
            f"{high_ratio} and {starvation_scale}"
        )


# --- scores ---------------------------------------------------------------------------------------


@jit("noise_b", "noise_n", "regions")
def _scores_kernel(
    noise,
    scores,
    noise_b,
    noise_n,
    noise_c,
    regions,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    STD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < regions
    region = noise + b * noise_b + n.to(tl.int64) * noise_n
    score = tl.zeros([BLOCK], tl.float32)
    for pixel in tl.static_range(PIXELS):
        here = region + tl.cast(pixel * CHANNELS, tl.int64) * noise_c
        mean = tl.zeros([BLOCK], tl.float32)
        if STD:
            for c in range(CHANNELS):
                mean += tl.load(here + tl.cast(c, tl.int64) * noise_c, mask=inside, other=0.0).to(
                    tl.float32
                )
            mean /= CHANNELS
        squares = tl.zeros([BLOCK], tl.float32)
        for c in range(CHANNELS):
            value = (
                tl.load(here + tl.cast(c, tl.int64) * noise_c, mask=inside, other=0.0).to(
                    tl.float32
                )
                - mean
            )
            squares += value * value
        score += tl.sqrt(squares / CHANNELS) if STD else tl.sqrt(squares)
    tl.store(scores + b * regions + n, score / PIXELS, mask=inside)


def _plan_scores(noise: Tensor, pixels: int, metric: str) -> Run:
    batch, regions, columns = noise.shape
    score = launch(
        _scores_kernel,
        (batch, cdiv(regions, BLOCK)),
        (noise, _fake_scores(noise, pixels, metric)),
        *noise.stride(),
        regions,
        CHANNELS=columns // pixels,
        PIXELS=pixels,
        STD=metric == "std",
        BLOCK=BLOCK,
        num_warps=4,
    )

    def run(noise: Tensor, pixels: int, metric: str) -> Tensor:
        scores = _fake_scores(noise, pixels, metric)
        score(noise, scores)
        return scores

    return run


def _fake_scores(noise: Tensor, pixels: int, metric: str) -> Tensor:
    return noise.new_empty(noise.shape[:2], dtype=torch.float32)


# --- selection ------------------------------------------------------------------------------------


@jit()
def _ranks(values, n, mine, regions, BLOCK: tl.constexpr, OTHERS: tl.constexpr):
    """How many of a sample's `values` come before each of `mine`, which are at `n`.

    Only in the tile in which `n` lies do ties need a look at positions. Counts are float32,
    exact below 2**24, since one instruction makes such of a comparison; they are summed at the end.
    """
    tile = tl.program_id(1) * BLOCK // OTHERS * OTHERS
    other = tile + tl.arange(0, OTHERS)
    value = _orderly(values + other, other < regions)[None, :]
    mine, n = mine[:, None], n[:, None]
    count = ((value < mine) | ((value == mine) & (other[None, :] < n))).to(tl.float32)
    for first in range(0, tile, OTHERS):
        other = first + tl.arange(0, OTHERS)
        count += (_orderly(values + other, other < regions)[None, :] <= mine).to(tl.float32)
    for first in range(tile + OTHERS, regions, OTHERS):
        other = first + tl.arange(0, OTHERS)
        count += (_orderly(values + other, other < regions)[None, :] < mine).to(tl.float32)
    return tl.sum(count, 1).to(tl.int32)


@jit()
def _orderly(at, inside):
    """Values as float32, with NaN and what is not inside as the highest."""
    value = tl.load(at, mask=inside, other=float("inf")).to(tl.float32)
    return tl.where(value != value, float("inf"), value)


@jit("low", "high")
def _rank_kernel(
    scores,
    ages,
    urgency,
    regions,
    low,
    high,
    centre,
    scale,
    AGED: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """Each region's urgency, the least first; without ages, 0 for the chosen ones and else 1."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < regions
    score = _orderly(scores + b * regions + n, inside)
    rank = _ranks(scores + b * regions, n, score, regions, BLOCK, OTHERS)
    if AGED:
        age = tl.load(ages + b * regions + n, mask=inside, other=0).to(tl.float32)
        value = tl.log(tl.abs(rank.to(tl.float32) - centre)) - scale * age
    else:
        value = tl.where((rank >= low) & (rank < high), 0.0, 1.0)
    tl.store(urgency + b * regions + n, value, mask=inside)


@jit("num_active")
def _choose_kernel(urgency, chosen, regions, num_active, BLOCK: tl.constexpr, OTHERS: tl.constexpr):
    """0 for the regions of least urgency, else 1."""
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < regions
    value = tl.load(urgency + b * regions + n, mask=inside, other=0.0)
    rank = _ranks(urgency + b * regions, n, value, regions, BLOCK, OTHERS)
    tl.store(chosen + b * regions + n, tl.where(rank < num_active, 0.0, 1.0), mask=inside)


@jit("num_active")
def _list_kernel(chosen, ages, active, new_ages, regions, num_active, BLOCK: tl.constexpr):
    """The chosen regions of a sample in ascending order, and the new ages."""
    b = tl.program_id(0).to(tl.int64)
    found = 0
    for first in range(0, regions, BLOCK):
        n = first + tl.arange(0, BLOCK)
        inside = n < regions
        picked = (tl.load(chosen + b * regions + n, mask=inside, other=1.0) == 0.0).to(tl.int32)
        place = found + tl.cumsum(picked, 0) - 1
        tl.store(active + b * num_active + place, n, mask=picked != 0)
        age = tl.load(ages + b * regions + n, mask=inside, other=0)
        tl.store(new_ages + b * regions + n, tl.where(picked != 0, 0, age + 1), mask=inside)
        found += tl.sum(picked, 0)


def _plan_select(
    scores: Tensor, ages: Tensor, num_active: int, high_ratio: float, starvation_scale: float
) -> Run | None:
    if scores.shape[1] > MOST_COMPARED:  # since each is compared with all
        return None
    scores, ages = scores.contiguous(), ages.contiguous()
    active, new_ages = _fake_select(scores, ages, num_active, high_ratio, starvation_scale)
    batch, regions = scores.shape
    low, centre = reference.kept_ranks(regions, num_active, high_ratio)
    aged = starvation_scale > 0
    chosen = _chosen(scores)
    grid = batch, cdiv(regions, BLOCK)  # the second axis ends at 65,535
    tiles: dict[str, Any] = dict(BLOCK=BLOCK, OTHERS=OTHERS, num_warps=4)
    rank = launch(
        _rank_kernel,
        grid,
        (scores, ages, chosen),
        regions,
        low,
        low + num_active,
        centre,
        starvation_scale,
        AGED=aged,
        **tiles,
    )
    if aged:
        choose = launch(_choose_kernel, grid, (chosen, chosen), regions, num_active, **tiles)
    write = launch(
        _list_kernel,
        (batch,),
        (chosen, ages, active, new_ages),
        regions,
        num_active,
        BLOCK=1024,
        num_warps=4,
    )

    def run(scores: Tensor, ages: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        scores, ages = scores.contiguous(), ages.contiguous()
        active, new_ages = _fake_select(scores, ages, *options)
        chosen = _chosen(scores)
        rank(scores, ages, chosen)
        if aged:
            urgency, chosen = chosen, _chosen(scores)
            choose(urgency, chosen)
        write(chosen, ages, active, new_ages)
        return active, new_ages

    return run


def _chosen(scores: Tensor) -> Tensor:
    return torch.empty_like(scores, dtype=torch.float32)


def _fake_select(
    scores: Tensor, ages: Tensor, num_active: int, high_ratio: float, starvation_scale: float
) -> tuple[Tensor, Tensor]:
    active = scores.new_empty(scores.shape[0], num_active, dtype=torch.int32)
    return active, ages.new_empty(ages.shape)


_scores = register(
    "region_scores(Tensor noise, int pixels, str metric) -> Tensor",
    check=_check_scores,
    reference=reference.region_scores,
    plan=_plan_scores,
    fake=_fake_scores,
)
_select = register(
    "select_regions(Tensor scores, Tensor ages, int num_active, float high_ratio, "
    "float starvation_scale) -> (Tensor, Tensor)",
    check=_check_select,
    reference=reference.select_regions,
    plan=_plan_select,
    fake=_fake_select,
)
