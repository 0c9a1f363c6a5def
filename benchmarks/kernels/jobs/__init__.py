"""What `benchmarks.kernels` times: each op's job at each shape, ours and in plain PyTorch.

Shapes: B batch, N image tokens, T text tokens, K active ones, H query heads, G heads of keys and
values, D head size, C = H * D channels. The caches have N + T rows; of SD3's text, all rows are
computed in each step, and Lumina-Next's is read by attention of its own, so that T = 0.

A job on the device "meta" has no data, but tells its bytes and operations. Bytes are those that
have to be read or written once, indices included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import layers, regions, rows
from .job import DTYPE, LUMINA, SD3, SHAPES, TINY_SHAPES, Job, Shape, Way

__all__ = ["DTYPE", "JOBS", "LUMINA", "SD3", "SHAPES", "TINY_SHAPES", "Shape", "Way", "prepare"]

JOBS: dict[str, Callable[[Shape, str], Job]] = {
    job.__name__: job for room in (rows, layers, regions) for job in room.JOBS
}


def prepare(op: str, shape: Shape, device: str) -> Job:
    """A job with its data, the same each time."""
    torch.manual_seed(0)
    return JOBS[op](shape, device)
