"""Tensors with a row per token: all of them, or some."""

from __future__ import annotations

import torch
from torch import Tensor

import ras_kernels


def read(kept: Tensor, rows: Tensor | None) -> Tensor:
    """The rows `(B, k)` of `(B, N, ...)`, or all (None)."""
    return kept if rows is None else ras_kernels.gather_tokens(kept, rows)


def write(kept: Tensor, rows: Tensor | None, new: Tensor) -> None:
    """Overwrite the rows `(B, k)` of `(B, N, ...)`, or all (None)."""
    if rows is None:
        kept.copy_(new)
    else:
        ras_kernels.scatter_tokens_(kept, rows, new)


def there(rows: Tensor | None, beside: Tensor) -> Tensor | None:
    """Rows on the device of a tensor: with a `device_map`, layers are on devices of their own."""
    return None if rows is None else rows.to(beside.device)


def normal_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor that may be written to both inside and outside inference mode."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device)


def room(
    kept: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Zeros, in the place of `kept` if that is like them."""
    if kept is None or (kept.shape, kept.dtype, kept.device) != (shape, dtype, device):
        kept = normal_empty(shape, dtype, device)
    return kept.zero_()


def compute_dtype(latents: Tensor | list[Tensor] | None) -> torch.dtype | None:
    """What a transformer's layers return for its latents."""
    if latents is None or not isinstance(latents[0], Tensor):
        return None
    kind, dtype = latents[0].device.type, latents[0].dtype
    if dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return dtype
    return torch.get_autocast_dtype(kind)


def for_batch(active: Tensor | None, batch: int) -> Tensor | None:
    """The samples' rows for all guidance copies, which pipelines stack copy by copy."""
    if active is None or batch % len(active):
        return None
    return active.repeat(batch // len(active), 1)
