"""Triton, where it exists, and where its kernels run.

On GPUs ops run by Triton kernels; on CPU tensors by their PyTorch definitions, or by the kernels
in Triton's interpreter if TRITON_INTERPRET=1 was set when this package was imported.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # there is none for macOS and Windows
    triton = tl = None

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def backend(device: torch.device | str) -> str:
    """What runs the ops on tensors of `device`: `"triton"`, or `"torch"` for the definitions."""
    kind = torch.device(device).type
    on_triton = INTERPRETED if kind == "cpu" else triton is not None and kind == "cuda"
    return "triton" if on_triton else "torch"


@functools.cache
def architecture(device: torch.device) -> int:
    """The compute capability of an NVIDIA GPU, such as 90, or 0 for any other device."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; without Triton, the function, which nobody calls."""
    return function if triton is None else triton.jit(function)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
