"""What the public functions check of their arguments before anything is written."""

from __future__ import annotations

import os
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATS = torch.float32, torch.float16, torch.bfloat16
LARGEST = torch.finfo(torch.float32).max
CHECKS_INDICES = os.environ.get("RAS_KERNELS_CHECK_INDICES") == "1"
"""Whether indices are checked on GPUs, too, which waits for them; on a CPU they always are."""


KINDS: dict[str, tuple[Any, str]] = {
    "Tensor": (Tensor, "a tensor"),
    "float": ((Real, torch.SymFloat, torch.SymInt), "a number"),
    "int": ((Integral, torch.SymInt), "a whole number"),
    "str": (str, "text"),
    "ScalarType": (torch.dtype, "a torch.dtype"),
}
"""What an op's schema declares arguments as, and what that means."""


def check_types(schema: Any, args: tuple[Any, ...]) -> None:
    """Raise TypeError, with the name, for an argument of an op that is not of its schema's type."""
    for argument, value in zip(schema.arguments, args):
        declared = str(argument.real_type)
        optional = declared.startswith("Optional")
        kind, what = KINDS[declared.removeprefix("Optional[").removesuffix("]")]
        if isinstance(value, kind) or (optional and value is None):
            continue
        what += ", or None" if optional else ""
        raise TypeError(f"{argument.name} must be {what}; got a {type(value).__name__}") from None


def check_finite(**numbers: float) -> None:
    """Numbers that an op computes with, in float32."""
    for name, number in numbers.items():
        if not -LARGEST < number < LARGEST:
            found = number if isinstance(number, float) else "a larger one"
            raise ValueError(f"{name} must be a finite number in float32; got {found}")


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
    if index.shape[1] and not tokens.shape[1]:
        raise ValueError(
            f"{name} has no rows for an index to name, which then must be (B, 0); got "
            f"{shapes(tokens, index)}"
        )


def check_range(index: Tensor, rows: int) -> None:
    """The values of an index into so many rows."""
    if not index.numel():
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(f"index must be in [0, {rows}); it goes from {low} to {high}")


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


def check_apart(written: dict[str, Tensor], read: dict[str, Tensor | None]) -> None:
    """Tensors that are written, each of memory of its own, of which nothing is read.

    Of the spans from first to last element; the values of these are not looked at.
    """
    every = {**written, **read}
    spans = {name: _span(one) for name, one in every.items() if one is not None and one.numel()}
    for name in [name for name in written if name in spans]:
        storage, begin, end = spans.pop(name)
        for other, (its, start, stop) in spans.items():
            if its == storage and begin < stop and start < end:
                raise ValueError(f"{name} is written, and must share no memory with {other}")


def _span(tensor: Tensor) -> tuple[int, int, int]:
    """The storage that a tensor lies in, and within which of its bytes; without its data."""
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape))
    first, size = tensor.storage_offset(), tensor.element_size()
    storage = tensor.untyped_storage()._cdata
    return int(storage), int(first * size), int((first + last + 1) * size)


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
