"""Which of PyTorch's fused attentions work runs, and cuDNN's where it is not PyTorch's choice."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

BY_CUDNN = "dense by cuDNN"  # the setting
UNFUSED = "math"  # as PyTorch calls it
FUSED = "_scaled_dot_product_"
ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class Attentions(TorchDispatchMode):
    """Notes the attentions that are run eagerly within it, by their operators' names."""

    def __init__(self) -> None:
        super().__init__()
        self._found: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func._opname
        if name.startswith(FUSED):
            self._found.add(name.removeprefix(FUSED).replace("_attention", ""))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        """Sorted; where none is fused, PyTorch's products of matrices do it."""
        return sorted(self._found) or [UNFUSED]


def has_cudnn(device: str) -> bool:
    """Whether there is another attention to time: PyTorch may not take cuDNN's by itself."""
    return torch.device(device).type == "cuda" and torch.backends.cudnn.is_available()


def cudnn_first() -> AbstractContextManager[None]:
    """Have cuDNN's attention run wherever it takes the shapes; eager work alone goes by it."""
    return sdpa_kernel(ORDER, set_priority=True)
