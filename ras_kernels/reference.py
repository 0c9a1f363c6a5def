"""Each op in eager PyTorch: its specification, its CPU path and its tests' oracle.

Shapes: B batch, N tokens, K rows out of them, S cached rows, H heads, D head size, C channels.
Arguments have been checked by the public functions of `ras_kernels`.
"""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens[_samples(index), index]


def scatter_tokens_(tokens: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    tokens[_samples(index), index] = rows
    return tokens


def merge_noise_(cached: Tensor, index: Tensor, fresh: Tensor) -> Tensor:
    return scatter_tokens_(cached, index, fresh).clone()


def sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, scale: float
) -> Tensor:
    # Query heads that share a key head are folded into the sequence, which spares the copies of
    # K and V that repeating them would make.
    heads, groups = key.shape[2], query.shape[2] // key.shape[2]
    output = F.scaled_dot_product_attention(
        rearrange(query, "b k (h g) d -> b h (g k) d", h=heads),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if key_mask is None else key_mask[:, None, None],
        scale=scale,
    )
    return rearrange(output, "b h (g k) d -> b k (h g) d", g=groups)


def region_scores(noise: Tensor, patch_size: int, metric: str) -> Tensor:
    noise = noise.float()
    if metric == "std":
        spread = noise.std(dim=1, correction=0)
    else:
        spread = torch.linalg.vector_norm(noise, dim=1)
    return reduce(spread, "b (h p) (w q) -> b (h w)", "mean", p=patch_size, q=patch_size)


def select_regions(
    scores: Tensor, ages: Tensor, num_active: int, high_ratio: float, starvation_scale: float
) -> tuple[Tensor, Tensor]:
    regions = scores.shape[1]
    dropped = regions - num_active
    centre = dropped - round(high_ratio * dropped) + (num_active - 1) / 2
    by_score = scores.argsort(dim=1, stable=True)
    place = torch.arange(regions, device=scores.device).expand_as(by_score)
    rank = torch.empty_like(by_score).scatter_(1, by_score, place)
    # The logarithm of |rank - centre| * exp(-starvation_scale * age), which cannot underflow.
    urgency = (rank - centre).abs().log() - starvation_scale * ages
    active = urgency.argsort(dim=1, stable=True)[:, :num_active].sort(dim=1).values
    return active, (ages + 1).scatter(1, active, 0)


def _samples(index: Tensor) -> Tensor:
    """(B, 1): each row of `index` counts in its own sample."""
    return torch.arange(len(index), device=index.device)[:, None]
