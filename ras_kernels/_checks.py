"""What the public functions check of their arguments before anything is written."""

from __future__ import annotations

import os

import torch
from torch import Tensor

FLOATS = torch.float32, torch.float16, torch.bfloat16
CHECKS_INDICES = os.environ.get("RAS_KERNELS_CHECK_INDICES") == "1"
"""Whether indices are checked on GPUs, too, which waits for them; on a CPU they always are."""


def check_index(index: Tensor, tokens: Tensor, name: str = "tokens") -> None:
    """An index `(B, K)`, or `(1, K)` for all samples, into `tokens`, `(B, N, ...)`."""
    if index.ndim != 2 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"index must be (B, K), int32 or int64; got {index.dtype} of shape {shapes(index)}"
        )
    if tokens.ndim < 2 or index.shape[0] not in (1, tokens.shape[0]):
        raise ValueError(
            f"{name} must be (B, N, ...), and index (B, K) or (1, K); got {shapes(tokens, index)}"
        )
    if index.device != tokens.device:
        raise ValueError(f"index is on {index.device}, {name} on {tokens.device}")
    if torch.compiler.is_compiling() or not index.numel():
        return
    if index.device.type == "cpu" or (CHECKS_INDICES and index.device.type != "meta"):
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= tokens.shape[1]:
            raise ValueError(
                f"index must be in [0, {tokens.shape[1]}); it goes from {low} to {high}"
            )


def check_rows(
    tokens: Tensor, index: Tensor, rows: Tensor, names: tuple[str, str] = ("tokens", "rows")
) -> None:
    """Rows `(B, K, ...)` for the places `index` in `tokens`, which are to be written."""
    check_index(index, tokens, names[0])
    expected = (tokens.shape[0], index.shape[1], *tokens.shape[2:])
    if rows.shape != expected:
        raise ValueError(f"{names[1]} must be {expected}; got {tuple(rows.shape)}")
    check_same(**dict(zip(names, (tokens, rows))))
    check_written(tokens, names[0])


def check_written(tensor: Tensor, name: str) -> None:
    """A tensor that can be written to: each element has a place of its own."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)):
        raise ValueError(
            f"{name} is written in place and must not be expanded; its strides are "
            f"{tensor.stride()} for the shape {tuple(tensor.shape)}"
        )


def check_floats(**tensors: Tensor | None) -> None:
    """Dtypes that the kernels compute with."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (*FLOATS, torch.float64):
            raise ValueError(f"{name} must be float32, float16 or bfloat16; it is {tensor.dtype}")


def check_same(**tensors: Tensor) -> None:
    """One dtype and one device."""
    if len({(t.dtype, t.device) for t in tensors.values()}) > 1:
        found = ", ".join(f"{name} is {t.dtype} on {t.device}" for name, t in tensors.items())
        raise ValueError(f"{found}; they must have one dtype and one device")


def shapes(*tensors: Tensor) -> str:
    return " and ".join(str(tuple(t.shape)) for t in tensors)
