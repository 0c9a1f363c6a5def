"""Jobs of a transformer's layer: projections, norms with rotary positions, attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ras_kernels

from .job import Job, Shape, Way, active_index, flat_index, normal

ALONE = "one linear, nothing written"


def linear_scatter_(s: Shape, device: str) -> Job:
    """Keys and values of the active rows into the caches."""
    key, value = (normal(device, s.batch, s.rows, s.groups * s.size) for _ in range(2))
    index, tokens = active_index(s, device), normal(device, s.batch, s.active, s.width)
    weights = normal(device, 2 * s.groups * s.size, s.width) / math.sqrt(s.width)
    bias = normal(device, 2 * s.groups * s.size)
    (key_weight, value_weight), (key_bias, value_bias) = weights.chunk(2), bias.chunk(2)
    at = flat_index(index, s.rows)

    def put(cache: Tensor, rows: Tensor) -> None:
        cache.flatten(0, 1).index_copy_(0, at, rows.flatten(0, 1))

    def ours() -> Sequence[Tensor]:
        return ras_kernels.linear_scatter_(
            key[:, : s.tokens],
            value[:, : s.tokens],
            index,
            tokens,
            key_weight=key_weight,
            value_weight=value_weight,
            key_bias=key_bias,
            value_bias=value_bias,
        )

    def each() -> Sequence[Tensor]:
        put(key, F.linear(tokens, key_weight, key_bias))
        put(value, F.linear(tokens, value_weight, value_bias))
        return key[:, : s.tokens], value[:, : s.tokens]

    def together() -> Sequence[Tensor]:
        keys, values = F.linear(tokens, weights, bias).chunk(2, 2)
        put(key, keys)
        put(value, values)
        return key[:, : s.tokens], value[:, : s.tokens]

    rows = key[:, : s.active]
    return Job(
        [tokens, weights, bias, rows, rows, index],
        Way(ours),
        {
            "two linear, index_copy_": Way(each),
            "one linear, index_copy_": Way(together),
            ALONE: Way(lambda: F.linear(tokens, weights, bias), part=True),
        },
        flops=4 * s.batch * s.active * s.width * s.groups * s.size,
        written=[key, value],
    )


def qkv_scatter_(s: Shape, device: str) -> Job:
    """Queries, keys and values of the active rows, and of the text, in a layer with as many heads.

    Lumina-Next, without text and with fewer heads of keys, would need norms in between.
    """
    key, value = (normal(device, s.batch, s.rows, s.groups * s.size) for _ in range(2))
    index, tokens = active_index(s, device), normal(device, s.batch, s.active, s.width)
    text = normal(device, s.batch, s.text, s.width)
    widths = s.width, s.groups * s.size, s.groups * s.size
    weights, text_weights = (
        [normal(device, width, s.width) / math.sqrt(s.width) for width in widths] for _ in range(2)
    )
    biases, text_biases = ([normal(device, width) for width in widths] for _ in range(2))
    at = flat_index(index, s.rows)

    def ours() -> Sequence[Tensor]:
        queries = ras_kernels.qkv_scatter_(
            key,
            value,
            index,
            tokens,
            weights=weights,
            biases=biases,
            text=text,
            text_weights=text_weights,
            text_biases=text_biases,
        )
        return *(query for query in queries if query.numel()), key, value

    def each() -> Sequence[Tensor]:
        query, *image = (F.linear(tokens, *layer) for layer in zip(weights, biases))
        text_query, *behind = (F.linear(text, *layer) for layer in zip(text_weights, text_biases))
        for cache, rows, last in zip((key, value), image, behind):
            cache.flatten(0, 1).index_copy_(0, at, rows.flatten(0, 1))
            cache[:, s.tokens :].copy_(last)
        return *(some for some in (query, text_query) if some.numel()), key, value

    rows, behind = key[:, : s.active], key[:, s.tokens :]
    layers = [*weights, *biases, *text_weights, *text_biases]
    return Job(
        [tokens, tokens, text, text, rows, rows, behind, behind, index, *layers],
        Way(ours),
        {"six linear, index_copy_, copy_": Way(each)},
        flops=2 * s.batch * (s.active + s.text) * s.width * sum(widths),
        written=[key, value],
    )


def _normed(s: Shape, device: str, heads: int) -> tuple[dict, Callable[[Tensor], Tensor]]:
    """The options for `ras_kernels.norm_rotary`, and a function that does the same in PyTorch.

    Lumina-Next normalises over all heads and turns; SD3.5, of SD3's shape, over each head alone.
    """
    if s.text:
        weight = normal(device, s.size)
        options = {"norm": "rms_norm", "weight": weight}
        return options, lambda x: F.rms_norm(x, (s.size,), weight, 1e-6)
    width = heads * s.size
    weight, bias = normal(device, width), normal(device, width)
    angles = normal(device, 1, s.active, s.size // 2, dtype=torch.float32)
    rotary = torch.polar(torch.ones_like(angles), angles)
    options = {"norm": "layer_norm_across_heads", "weight": weight, "bias": bias, "rotary": rotary}

    def plain(x: Tensor) -> Tensor:
        normed = F.layer_norm(x.flatten(2), (width,), weight, bias, 1e-6)
        pairs = torch.view_as_complex(normed.float().view(*x.shape[:3], -1, 2))
        return torch.view_as_real(pairs * rotary[:, :, None]).flatten(3).to(x.dtype)

    return options, plain


def _vectors(options: dict) -> list[Tensor]:
    return [value for value in options.values() if isinstance(value, Tensor)]


def norm_rotary(s: Shape, device: str) -> Job:
    """The active rows' queries, (B, K, H, D)."""
    tokens = normal(device, s.batch, s.active, s.heads, s.size)
    options, plain = _normed(s, device, s.heads)
    return Job(
        [tokens, tokens, *_vectors(options)],
        Way(lambda: ras_kernels.norm_rotary(tokens, **options)),
        {"norm, complex product" if s.text == 0 else "rms_norm": Way(lambda: plain(tokens))},
    )


def norm_rotary_scatter_(s: Shape, device: str) -> Job:
    """The active rows' keys, into the cache, (B, N + T, G, D)."""
    tokens = normal(device, s.batch, s.active, s.groups, s.size)
    cache, index = normal(device, s.batch, s.rows, s.groups, s.size), active_index(s, device)
    options, plain = _normed(s, device, s.groups)
    at, image = flat_index(index, s.rows), cache[:, : s.tokens]

    def index_copy() -> Tensor:
        cache.flatten(0, 1).index_copy_(0, at, plain(tokens).flatten(0, 1))
        return image

    return Job(
        [tokens, tokens, index, *_vectors(options)],
        Way(lambda: ras_kernels.norm_rotary_scatter_(image, index, tokens, **options)),
        {"norm, index_copy_": Way(index_copy)},
        written=[cache],
    )


BACKENDS = {
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA, efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA, math": SDPBackend.MATH,
}


def sparse_attention(s: Shape, device: str) -> Job:
    """The active rows' queries and the text's, over all keys."""
    query = normal(device, s.batch, s.active + s.text, s.heads, s.size)
    key, value = (normal(device, s.batch, s.rows, s.groups, s.size) for _ in range(2))

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        grouped = {"enable_gqa": True} if s.groups < s.heads else {}
        turned = (t.transpose(1, 2) for t in (query, keys, values))
        return F.scaled_dot_product_attention(*turned, **grouped).transpose(1, 2)

    plain = {
        name: Way(lambda: attend(key, value), partial(sdpa_kernel, backend))
        for name, backend in BACKENDS.items()
    }
    if s.text:  # whose keys and values are kept apart from the image's, and joined in each layer
        parts = [(t[:, : s.tokens], t[:, s.tokens :]) for t in (key, value)]
        for name, backend in BACKENDS.items():
            plain[f"cat, {name}"] = Way(
                lambda: attend(*(torch.cat(part, 1) for part in parts)),
                partial(sdpa_kernel, backend),
            )
    return Job(
        [query, query, key, value],
        Way(lambda: ras_kernels.sparse_attention(query, key, value)),
        plain,
        flops=4 * s.batch * s.heads * query.shape[1] * key.shape[1] * s.size,
    )


JOBS = linear_scatter_, qkv_scatter_, norm_rotary, norm_rotary_scatter_, sparse_attention
