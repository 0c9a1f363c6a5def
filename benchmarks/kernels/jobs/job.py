"""A job, the ways to do it, and the shapes that it is done at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

DTYPE = torch.float16
PATCH = 2
COPY = "copy_ of as many rows"
ROUNDING = 1e-2  # how far, relative to the norm, 16-bit results of like jobs may differ


class Shape(NamedTuple):
    """A model at a resolution, of whose image tokens a share is active."""

    model: str
    side: int  # of the image, px
    ratio: float
    heads: int
    groups: int
    size: int
    channels: int  # of the latent
    text: int
    batch: int = 2  # with guidance and without

    @property
    def label(self) -> str:
        return f"{self.model}, {self.side}², {self.ratio:g}"

    @property
    def tokens(self) -> int:
        return (self.side // (8 * PATCH)) ** 2

    @property
    def rows(self) -> int:  # of a cache
        return self.tokens + self.text

    @property
    def active(self) -> int:
        return round(self.ratio * self.tokens)

    @property
    def width(self) -> int:
        return self.heads * self.size


SD3 = partial(Shape, "SD3-medium", heads=24, groups=24, size=64, channels=16, text=333)
LUMINA = partial(Shape, "Lumina-Next", heads=32, groups=8, size=72, channels=4, text=0)
TINY = partial(Shape, "tiny", heads=2, size=8, channels=2)
SHAPES = [
    *(model(1024, ratio) for model in (SD3, LUMINA) for ratio in (0.5, 0.25, 0.125)),
    SD3(512, 0.25),
    SD3(2048, 0.25),
]
TINY_SHAPES = [TINY(64, 0.5, groups=2, text=3), TINY(64, 0.25, groups=1, text=0)]


class Way(NamedTuple):
    """A way to do a job.

    Attributes:
        run: Does it, and returns what `Job.ours` does.
        within: A context to run it in, which is not part of it.
        part: Whether it is only part of the job, for comparison, with other results.
    """

    run: Callable[[], Tensor | Sequence[Tensor]]
    within: Callable[[], AbstractContextManager] = nullcontext
    part: bool = False


class Job(NamedTuple):
    """One op at one shape.

    Attributes:
        moved: Tensors as large as all that has to be read and written.
        flops: Of its products.
        ours: The op of `ras_kernels`.
        plain: Ways to do the same in PyTorch, by name.
        written: What is written in place, so that it can be put back between two ways.
        tolerance: How far results may differ; 0 for copies.
    """

    moved: Sequence[Tensor]
    ours: Way
    plain: dict[str, Way]
    flops: int = 0
    written: Sequence[Tensor] = ()
    tolerance: float = ROUNDING

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.moved)


def normal(device: str, *shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def copied(rows: Tensor) -> Way:
    """What moves rows that lie together, without an index: what those may take that do not."""
    source, target = (
        rows.contiguous(),
        torch.empty_like(rows, memory_format=torch.contiguous_format),
    )
    return Way(lambda: target.copy_(source), part=True)


def active_index(s: Shape, device: str) -> Tensor:
    """(B, K) int32, ascending, as `ras_kernels.select_regions` gives it."""
    order = torch.rand(s.batch, s.tokens, device=device).argsort(1)
    return order[:, : s.active].sort(1).values.to(torch.int32)


def flat_index(index: Tensor, rows: int) -> Tensor:
    """(B * K,) int64 of the same rows in (B * rows, ...), for PyTorch's functions of one index."""
    starts = rows * torch.arange(len(index), device=index.device)[:, None]
    return (index + starts).flatten()
