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
OLDEST = 80  # the compute capability that Triton supports NVIDIA's GPUs from


def backend(device: torch.device | str) -> str:
    """What runs the ops on tensors of `device`: `"triton"`, or `"torch"` for the definitions.

    The latter on NVIDIA's GPUs before sm_80, too, which Triton does not support.
    """
    device = torch.device(device)
    if device.type == "cpu":
        on_triton = INTERPRETED
    else:
        on_triton = triton is not None and device.type == "cuda"
        on_triton = on_triton and not 0 < architecture(device) < OLDEST
    return "triton" if on_triton else "torch"


def supports(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Tell whether the kernels take tensors of a device and a dtype; else the definitions run.

    They do on devices of `backend` "triton", but for float64 and complex128, in which no kernel
    computes, and in the interpreter for bfloat16, with which Triton's computes as if its bits were
    an integer's. A layout that a kernel does not take has the definition run all the same; the
    README's table of the ops says which.
    """
    if backend(device) != "triton" or dtype in (torch.float64, torch.complex128):
        return False
    return torch.device(device).type != "cpu" or dtype != torch.bfloat16


@torch.compiler.assume_constant_result  # Dynamo warns of caches that it comes upon
def architecture(device: torch.device) -> int:
    """The compute capability of an NVIDIA GPU, such as 90, or 0 for any other device."""
    return capability(device) if device.type == "cuda" else 0


@functools.cache
def capability(device: torch.device) -> int:
    if torch.version.hip or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@torch.compiler.assume_constant_result
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has."""
    on_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1


def jit(*unspecialised: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a kernel of a function; without Triton it stays one, which nobody calls.

    Args:
        unspecialised: Names of its numbers of which no code is to be made that is for 1 or for
            multiples of 16: that would gain nothing, and compile anew for another count of rows.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        if triton is None:
            return function
        return triton.jit(function, do_not_specialize=unspecialised)

    return decorate


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
