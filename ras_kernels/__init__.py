"""Token-sparse building blocks of diffusion transformers: gather, scatter, attend, select.

Each function checks its arguments, then runs; `ras_kernels.reference` defines what it computes.
Shapes: B batch, N tokens, K rows out of them, S cached rows, H heads, D head size, C channels.
Floating-point tensors are float32, float16 or bfloat16 and of one device per call; any strides do.
An `index` is `(B, K)`, int32 or int64, of rows in `[0, N)`, each row once per sample. All raise
`ValueError` for a wrong shape, dtype, device, value or index (an index's range is checked on the
CPU alone, since reading it would stall a GPU).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference

__version__ = "0.1.0"
__all__ = [
    "METRICS",
    "backend",
    "gather_tokens",
    "merge_noise_",
    "region_scores",
    "scatter_tokens_",
    "select_regions",
    "sparse_attention",
]

METRICS = ("std", "l2norm")
"""The region scores of arXiv 2502.10389, section 3."""


def backend(device: torch.device | str) -> str:
    """Name what runs the ops on tensors of `device`: `"torch"` for the PyTorch definitions."""
    torch.device(device)
    return "torch"


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Take each sample's own rows: `out[b, j] = tokens[b, index[b, j]]`.

    Args:
        tokens: `(B, N, ...)`, any dtype.
        index: `(B, K)`.

    Returns:
        `(B, K, ...)`, the dtype of `tokens`.
    """
    _check_index(index, tokens, "tokens")
    return reference.gather_tokens(tokens, index)


def scatter_tokens_(tokens: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Write rows in place: `tokens[b, index[b, j]] = rows[b, j]`.

    Args:
        tokens: `(B, N, ...)`, any dtype, written in place.
        index: `(B, K)`.
        rows: `(B, K, ...)`, the dtype of `tokens`.

    Returns:
        `tokens` itself.
    """
    _check_rows(tokens, index, rows)
    return reference.scatter_tokens_(tokens, index, rows)


def merge_noise_(cached: Tensor, index: Tensor, fresh: Tensor) -> Tensor:
    """Overwrite rows of the cached noise and return a copy of the whole.

    Args:
        cached: `(B, N, C)`, each token's last predicted noise, written in place.
        index: `(B, K)`, the active tokens.
        fresh: `(B, K, C)`, their noise.

    Returns:
        `(B, N, C)`, the merged noise, which shares no memory with `cached`.
    """
    _check_rows(cached, index, fresh)
    return reference.merge_noise_(cached, index, fresh)


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Let a few queries attend over all cached rows: `softmax(scale * Q @ K.T) @ V` per head.

    Args:
        query: `(B, K, H, D)`.
        key, value: `(B, S, G, D)`; query head `h` uses key head `h // (H / G)` (grouped-query).
        key_mask: `(B, S)` bool, False for rows that nobody attends to.
        scale: Of the scores; `D ** -0.5` if None.

    Returns:
        `(B, K, H, D)`, the dtype of `query`.
    """
    if query.ndim != 4 or key.ndim != 4 or key.shape != value.shape:
        raise ValueError(
            "query must be (B, K, H, D), and key and value both (B, S, G, D); got "
            f"{_shapes(query, key, value)}"
        )
    if (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]) or (
        query.shape[2] % key.shape[2]
    ):
        raise ValueError(
            "query and key must agree in batch and head size, and the key's heads divide the "
            f"query's; got {_shapes(query, key)}"
        )
    _check_same(query, key, value)
    if key_mask is not None and (key_mask.shape != key.shape[:2] or key_mask.dtype != torch.bool):
        raise ValueError(
            f"key_mask must be bool of shape {tuple(key.shape[:2])}; got {key_mask.dtype} "
            f"of shape {tuple(key_mask.shape)}"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return reference.sparse_attention(query, key, value, key_mask, scale)


def region_scores(noise: Tensor, patch_size: int, metric: str = "std") -> Tensor:
    """Score each region: the mean over its pixels of the noise's spread over the channels.

    Args:
        noise: `(B, C, height, width)`, guided noise; a region is a patch, row by row.
        patch_size: Pixels per side of a region; divides height and width.
        metric: `"std"`, the (population) standard deviation, or `"l2norm"`, the L2 norm.

    Returns:
        `(B, N)` float32 with `N = height / patch_size * width / patch_size`. The source is
        arXiv 2502.10389, section 3; a constant factor has no effect on a selection.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
    if noise.ndim != 4 or noise.shape[2] % patch_size or noise.shape[3] % patch_size:
        raise ValueError(
            f"noise must be (B, C, height, width) with sides that the patch size {patch_size} "
            f"divides; got {_shapes(noise)}"
        )
    return reference.region_scores(noise, patch_size, metric)


def select_regions(
    scores: Tensor,
    ages: Tensor,
    num_active: int,
    *,
    high_ratio: float,
    starvation_scale: float,
) -> tuple[Tensor, Tensor]:
    """Choose the regions to compute next, and count how long the others have waited.

    With `r` the rank of a region's score (0 for the lowest, ties by position) and `c` the centre
    of the ranks kept when `high_ratio` of the dropped ones go from the top and the rest from the
    bottom, the `num_active` smallest `|r - c| * exp(-starvation_scale * age)` are chosen. At equal
    ages that is the split of arXiv 2502.10389. No region starves, whatever the scores: with
    `M = max(c, N - 1 - c)`, no age exceeds
    `ceil(log(2 * M) / starvation_scale) + ceil((N - 1) / (num_active - 1))`: past the first term
    at most one region a step that is younger by that much can go before, and every other choice
    takes an older region out of the way.

    Args:
        scores: `(B, N)`.
        ages: `(B, N)` integers: steps since a region was last computed, 0 if in the last one.
        num_active: Regions to choose per sample, `1 <= num_active <= N`.
        high_ratio: Share of the dropped regions that have the highest scores, in [0, 1].
        starvation_scale: Weight of the age, at least 0; at 0 regions may starve.

    Returns:
        The chosen regions `(B, num_active)` in ascending order, int64, and the new ages `(B, N)`.
    """
    if scores.ndim != 2 or ages.shape != scores.shape:
        raise ValueError(f"scores and ages must both be (B, N); got {_shapes(scores, ages)}")
    if not 1 <= num_active <= scores.shape[1]:
        raise ValueError(f"num_active must be from 1 to {scores.shape[1]}; got {num_active}")
    if not 0 <= high_ratio <= 1 or not starvation_scale >= 0:
        raise ValueError(
            "high_ratio must be in [0, 1] and starvation_scale at least 0; got "
            f"{high_ratio} and {starvation_scale}"
        )
    return reference.select_regions(scores, ages, num_active, high_ratio, starvation_scale)


def _check_index(index: Tensor, tokens: Tensor, name: str) -> None:
    if index.ndim != 2 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"index must be (B, K), int32 or int64; got {index.dtype} of shape {_shapes(index)}"
        )
    if tokens.ndim < 2 or tokens.shape[0] != index.shape[0]:
        raise ValueError(
            f"{name} must be (B, N, ...) with the batch of index; got {_shapes(tokens, index)}"
        )
    if index.device != tokens.device:
        raise ValueError(f"index is on {index.device}, {name} on {tokens.device}")
    if index.device.type == "cpu" and index.numel():
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= tokens.shape[1]:
            raise ValueError(
                f"index must be in [0, {tokens.shape[1]}); it goes from {low} to {high}"
            )


def _check_rows(tokens: Tensor, index: Tensor, rows: Tensor) -> None:
    _check_index(index, tokens, "tokens")
    if rows.shape != (*index.shape, *tokens.shape[2:]):
        raise ValueError(
            f"rows must be {(*index.shape, *tokens.shape[2:])}; got {tuple(rows.shape)}"
        )
    _check_same(tokens, rows)


def _check_same(*tensors: Tensor) -> None:
    """One dtype and one device."""
    kinds = {(t.dtype, t.device) for t in tensors}
    if len(kinds) > 1:
        found = ", ".join(f"{dtype} on {device}" for dtype, device in kinds)
        raise ValueError(f"tensors must have one dtype and one device; got {found}")


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(tuple(t.shape)) for t in tensors)
