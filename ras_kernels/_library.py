"""The ops' registration with PyTorch, so that `torch.compile` sees one node for each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._triton import INTERPRETED, triton

_LIBRARY = torch.library.Library("ras_kernels", "DEF")


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    launch: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define the op `torch.ops.ras_kernels.<name>`, and return it.

    `define` and `impl` cost less per call than `torch.library.custom_op` (see
    `benchmarks.kernels`); arguments are checked before, by the public functions.

    Args:
        schema: Of the op, its name first; what it writes to is marked `(a!)`.
        reference: The PyTorch definition, for all devices without a kernel.
        launch: Launches the Triton kernel, with the same arguments.
        fake: The shapes and dtypes of what it returns; None if that is nothing.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if triton is not None:
        _LIBRARY.impl(name, _on_its_device(launch), "CUDA")  # AMD's GPUs too
    if INTERPRETED:
        _LIBRARY.impl(name, launch, "CPU")
    torch.library.register_fake(f"ras_kernels::{name}", fake or _nothing, lib=_LIBRARY)
    return getattr(torch.ops.ras_kernels, name).default


def _nothing(*_: object) -> None:
    """What an op returns that only writes."""


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be that of the tensors."""

    @functools.wraps(launch)
    def run(*args: Any) -> Any:
        device = next(value.device for value in args if isinstance(value, Tensor))
        if device.index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return run
