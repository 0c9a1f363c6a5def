"""Each op in eager PyTorch: its specification, its CPU path and its tests' oracle.

Shapes: B batch, N tokens, K rows out of them, S cached rows, H heads, D head size, C channels.
Arguments have been checked by the public functions of `ras_kernels`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

LEAST_GAP = 1e-6
"""Two positions nearer than that count as so far apart, so that no pace is infinite."""
LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""What the largest of a row becomes in codes of each dtype."""
LEAST_ROW = 2.0**-117
"""Rows of less are zeros in codes: so small a scale would be no normal number in float32."""


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens[_samples(tokens), index].contiguous()


def scatter_tokens_(tokens: Tensor, index: Tensor, rows: Tensor) -> None:
    tokens[_samples(tokens), index] = rows


def update_tokens_(tokens: Tensor, changes: Tensor, index: Tensor | None, rows: Tensor) -> None:
    if index is None:
        torch.sub(rows, tokens, out=changes)
        tokens.copy_(rows)
    else:
        scatter_tokens_(changes, index, rows - gather_tokens(tokens, index))
        scatter_tokens_(tokens, index, rows)


def carry_tokens(tokens: Tensor, changes: Tensor, gain: Tensor) -> Tensor:
    carried = changes.shape[1]
    wide = gain.reshape(*gain.shape, *[1] * (tokens.ndim - 2))
    if tokens.dtype != torch.float64:
        tokens, changes, dtype = tokens.float(), changes.float(), tokens.dtype
    else:
        wide, dtype = wide.double(), tokens.dtype
    # What a gain of 0 keeps out may be NaN, which 0 times is not 0.
    carried_on = (changes * wide).masked_fill_(wide == 0, 0).add_(tokens[:, :carried])
    output = carried_on.to(dtype)
    if carried < tokens.shape[1]:
        output = torch.cat([output, tokens[:, carried:].to(dtype)], dim=1)
    return output.contiguous()


def carry_keys_and_values(
    key: Tensor, value: Tensor, key_changes: Tensor, value_changes: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    return carry_tokens(key, key_changes, gain), carry_tokens(value, value_changes, gain)


def quantize_tokens_(
    codes: Tensor,
    scales: Tensor,
    change_codes: Tensor | None,
    change_scales: Tensor | None,
    index: Tensor | None,
    rows: Tensor,
) -> None:
    if index is None:
        index = torch.arange(rows.shape[1], device=rows.device)[None]
    if change_codes is not None and change_scales is not None:
        there = gather_tokens(codes, index), gather_tokens(scales, index)
        _put_codes(change_codes, change_scales, index, rows.float() - _values(*there))
    _put_codes(codes, scales, index, rows.float())


def _put_codes(codes: Tensor, scales: Tensor, index: Tensor, rows: Tensor) -> None:
    most = LARGEST_CODE[codes.dtype]
    largest, spoilt = rows.abs().amax(dim=3), ~rows.isfinite().all(dim=3)
    scale = torch.where((largest >= LEAST_ROW) & ~spoilt, largest / most, 0.0)
    fits = scale > 0
    ratio = torch.where(fits[..., None], rows / torch.where(fits, scale, 1.0)[..., None], 0.0)
    ratio = ratio.round() if codes.dtype == torch.int8 else ratio
    scatter_tokens_(codes, index, ratio.to(codes.dtype))
    scatter_tokens_(scales, index, scale.masked_fill(spoilt, torch.nan))


def _values(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.float() * scales[..., None]


def dequantize_tokens(
    codes: Tensor,
    scales: Tensor,
    change_codes: Tensor | None,
    change_scales: Tensor | None,
    gain: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    tokens = _values(codes, scales)
    if change_codes is not None and change_scales is not None and gain is not None:
        tokens = carry_tokens(tokens, _values(change_codes, change_scales), gain)
    return tokens.to(dtype).contiguous()


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    scale: float | None,
) -> Tensor:
    if not query.numel():
        return query.new_empty(query.shape)
    # Query heads that share a key head are folded into the sequence, which spares the copies of
    # K and V that repeating them would make.
    heads, groups = key.shape[2], query.shape[2] // key.shape[2]
    if key_lengths is not None:
        key_mask = torch.arange(key.shape[1], device=key.device) < key_lengths[:, None]
    if key_mask is not None:  # a score of NaN stays one, and 0 times NaN is NaN
        key, value = (rows.masked_fill(~key_mask[:, :, None, None], 0) for rows in (key, value))
    output = F.scaled_dot_product_attention(
        rearrange(query, "b k (h g) d -> b h (g k) d", h=heads),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=None if key_mask is None else key_mask[:, None, None],
        scale=scale,
    )
    output = rearrange(output, "b h (g k) d -> b k (h g) d", g=groups).contiguous()
    if key_mask is not None:  # not all of its backends agree on zeros
        output.masked_fill_(~key_mask.any(dim=1)[:, None, None, None], 0)
    return output


def attention_lse(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    scale: float | None,
) -> Tensor:
    """(B, H, K): `log(sum(exp(scale * Q @ K.T)))` over the keys that count."""
    batch, rows, query_heads, size = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if not batch * rows * query_heads:
        return query.new_empty((batch, query_heads, rows), dtype=dtype)
    heads = key.shape[2]
    if key_lengths is not None:
        key_mask = torch.arange(key.shape[1], device=key.device) < key_lengths[:, None]
    scores = torch.einsum(
        "bkhgd,bshd->bhgks",
        rearrange(query.to(dtype), "b k (h g) d -> b k h g d", h=heads),
        key.to(dtype),
    )
    scores *= max(size, 1) ** -0.5 if scale is None else scale
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, None], -torch.inf)
    return scores.logsumexp(dim=-1).flatten(1, 2)


def sparse_attention_into_(
    out: Tensor,
    second_out: Tensor | None,
    lse: Tensor | None,
    second_lse: Tensor | None,
    query: Tensor,
    second: Tensor | None,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    key_lengths: Tensor | None,
    scale: float | None,
) -> None:
    for one, written, sums in ((query, out, lse), (second, second_out, second_lse)):
        if one is not None and written is not None:
            written.copy_(sparse_attention(one, key, value, key_mask, key_lengths, scale))
        if one is not None and sums is not None:
            sums.copy_(attention_lse(one, key, key_mask, key_lengths, scale))


def merge_states(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    merged = torch.zeros_like(out_a, dtype=lse.dtype, memory_format=torch.contiguous_format)
    shares = torch.stack([lse_a, lse_b]).softmax(dim=0)  # of which `lse`, rounded, knows too little
    for out, one, share in zip((out_a, out_b), (lse_a, lse_b), shares):
        share = share.masked_fill(one == -torch.inf, 0).transpose(1, 2)[..., None]
        # What has no share may be NaN, which 0 times is not 0.
        merged += (out.to(lse.dtype) * share).masked_fill_(share == 0, 0)
    return merged.to(out_a.dtype), lse.contiguous()


def norm_rotary(
    tokens: Tensor,
    norm: str | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rotary: Tensor | None,
) -> Tensor:
    wide = tokens if tokens.dtype == torch.float64 else tokens.float()
    if norm == "rms_norm":
        wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    elif norm == "layer_norm_across_heads":
        wide = F.layer_norm(wide.flatten(2), (wide.shape[2] * wide.shape[3],), eps=eps).view(
            wide.shape
        )
    shape = tokens.shape[2:] if norm == "layer_norm_across_heads" else tokens.shape[3:]
    wide = wide if weight is None else wide * weight.view(shape)
    wide = wide if bias is None else wide + bias.view(shape)
    if rotary is not None:
        pairs = torch.complex(wide[..., ::2], wide[..., 1::2])
        if not rotary.is_complex():  # of shape (B, K, D / 2, 2)
            rotary = torch.view_as_complex(rotary)
        wide = torch.view_as_real(pairs * rotary[:, :, None]).flatten(3)
    return wide.to(tokens.dtype, copy=True, memory_format=torch.contiguous_format)


def norm_rotary_scatter_(
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
    _put(out, changes, index, norm_rotary(tokens, norm, weight, bias, eps, rotary))


def linear_scatter_(
    key: Tensor,
    value: Tensor,
    key_changes: Tensor | None,
    value_changes: Tensor | None,
    index: Tensor | None,
    tokens: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
) -> None:
    for cache, changes, weight, bias in (
        (key, key_changes, key_weight, key_bias),
        (value, value_changes, value_weight, value_bias),
    ):
        rows = F.linear(tokens, weight, bias)
        _put(cache, changes, index, rows.view(*rows.shape[:2], *cache.shape[2:]))


def qkv_scatter_(
    key: Tensor,
    value: Tensor,
    key_changes: Tensor | None,
    value_changes: Tensor | None,
    index: Tensor | None,
    tokens: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
    text: Tensor | None,
    text_query_weight: Tensor | None,
    text_key_weight: Tensor | None,
    text_value_weight: Tensor | None,
    text_query_bias: Tensor | None,
    text_key_bias: Tensor | None,
    text_value_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    query = F.linear(tokens, query_weight, query_bias)
    layers: Any = key_weight, value_weight, key_bias, value_bias
    linear_scatter_(key, value, key_changes, value_changes, index, tokens, *layers)
    if text is None or text_query_weight is None:
        return query, query.new_empty(len(query), 0, query.shape[2])
    behind = [cache[:, cache.shape[1] - text.shape[1] :] for cache in (key, value)]
    layers = text_key_weight, text_value_weight, text_key_bias, text_value_bias
    linear_scatter_(behind[0], behind[1], None, None, None, text, *layers)
    return query, F.linear(text, text_query_weight, text_query_bias)


def _put(tokens: Tensor, changes: Tensor | None, index: Tensor | None, rows: Tensor) -> None:
    if index is None:
        tokens = tokens[:, : rows.shape[1]]
        changes = None if changes is None else changes[:, : rows.shape[1]]
    if changes is not None:
        update_tokens_(tokens, changes, index, rows)
    elif index is not None:
        scatter_tokens_(tokens, index, rows)
    else:
        tokens.copy_(rows)


def region_scores(noise: Tensor, pixels: int, metric: str) -> Tensor:
    if not noise.numel():
        return noise.new_empty(noise.shape[:2], dtype=torch.float32)
    noise = noise if noise.dtype == torch.float64 else noise.float()
    # Channels first, and of a square the pixels row by row: on a CPU sums are then rounded as
    # those over an image's patches are.
    row = math.gcd(pixels, math.isqrt(pixels))
    noise = rearrange(noise, "b n (p q c) -> b c p n q", p=pixels // row, q=row).contiguous()
    if metric == "std":
        spread = noise.std(dim=1, correction=0)
    else:
        spread = torch.linalg.vector_norm(noise, dim=1)
    return spread.mean(dim=(1, 3)).float()


def update_drift_(
    last: Tensor, pace: Tensor, since: Tensor, index: Tensor | None, noise: Tensor, position: float
) -> None:
    if index is None:
        index = torch.arange(noise.shape[1], device=noise.device)[None]
    wide = torch.float64 if noise.dtype == torch.float64 else torch.float32
    new, old, then = (gather_tokens(kept, index) for kept in (noise, last, since))
    change = (new.to(wide) - old.to(wide)).square().mean(dim=2).sqrt()
    moved = change / (position - then).abs().clamp_min(LEAST_GAP)
    scatter_tokens_(pace, index, moved.to(pace.dtype))
    scatter_tokens_(since, index, torch.full_like(then, position))
    scatter_tokens_(last, index, new)


def drift_scores(pace: Tensor, since: Tensor, position: float) -> Tensor:
    return (pace * (position - since).abs()).contiguous()


def kept_ranks(regions: int, num_active: int, high_ratio: float) -> tuple[int, float]:
    """The lowest rank that is kept at equal ages, and the centre of those that are."""
    dropped = regions - num_active
    low = dropped - round(high_ratio * dropped)
    return low, low + (num_active - 1) / 2


def select_regions(
    scores: Tensor, ages: Tensor, num_active: int, high_ratio: float, starvation_scale: float
) -> tuple[Tensor, Tensor]:
    regions = scores.shape[1]
    _, centre = kept_ranks(regions, num_active, high_ratio)
    scores = scores.float().masked_fill(scores.isnan(), torch.inf)
    by_score = scores.argsort(dim=1, stable=True)
    place = torch.arange(regions, device=scores.device).expand_as(by_score)
    rank = torch.empty_like(by_score).scatter_(1, by_score, place)
    # The logarithm of |rank - centre| * exp(-starvation_scale * age), which cannot underflow.
    urgency = (rank - centre).abs().log() - starvation_scale * ages
    active = urgency.argsort(dim=1, stable=True)[:, :num_active]
    new_ages = (ages + 1).contiguous().scatter(1, active, 0)
    return active.to(torch.int32).sort(dim=1).values, new_ages


def _samples(tokens: Tensor) -> Tensor:
    """(B, 1): each sample's rows are its own."""
    return torch.arange(len(tokens), device=tokens.device)[:, None]
