"""Masks: which regions are under one, and the mask that an inpainting pipeline is given."""

from __future__ import annotations

import functools
import inspect
import math
import types
import weakref
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .checks import shown


def as_mask(value: Any) -> Tensor:
    """A mask, `(S, 1, height, width)` float32 on the CPU, from what pipelines take for one.

    Args:
        value: Non-zero (above one half of the range) where the image is to change: a PIL image,
            an array or tensor `(height, width)`, `(1, height, width)` or
            `(S, 1, height, width)` of bool, of integers up to 255, or of floats up to 1.

    Raises:
        TypeError: Something else.
        ValueError: Another shape, or nothing under the mask.
    """
    if isinstance(value, Image.Image):
        value = np.asarray(value.convert("L"))
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value.copy())
    if not isinstance(value, Tensor):
        raise TypeError(f"mask must be a PIL image, an array or a tensor, got {shown(value)}")
    mask = value.detach().cpu()
    top = 255 if not mask.is_floating_point() and mask.dtype != torch.bool else 1
    mask = mask.float() / top
    if mask.ndim in (2, 3):
        mask = mask.reshape(1, *mask.shape[-2:]) if mask.ndim == 2 else mask
        mask = mask[None]
    if mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(
            "mask must be (height, width), (1, height, width) or (samples, 1, height, width), "
            f"got {tuple(value.shape)}"
        )
    if not (mask > 0.5).flatten(1).any(dim=1).all():
        raise ValueError("mask has nothing under it: it must be above one half somewhere")
    return mask


def masked_regions(mask: Tensor, grid: tuple[int, ...], margin: int) -> Tensor:
    """The regions that a mask touches, widened by `margin` regions, `(S, k)` ascending int32.

    Args:
        mask: `(S, 1, height, width)`, of any size.
        grid: Regions in height and width, and frames before, which all have the same mask.
        margin: How far regions beside the mask belong to it, in regions.

    Returns:
        k is that of the sample with most; the others take in the regions next to theirs.
    """
    frames, sides = math.prod(grid[:-2]), grid[-2:]
    touched = F.adaptive_max_pool2d((mask > 0.5).float(), sides)
    distance = torch.zeros_like(touched)
    reached = touched
    for _ in range(max(sides)):  # how many widenings it takes to reach each region
        distance += 1 - reached
        reached = F.max_pool2d(reached, 3, stride=1, padding=1)
    distance = distance.flatten(1)
    count = int((distance <= margin).sum(dim=1).max())
    nearest = distance.argsort(dim=1, stable=True)[:, :count]
    regions = nearest.sort(dim=1).values.to(torch.int32)
    starts = torch.arange(frames, dtype=torch.int32) * math.prod(sides)
    return (starts[None, :, None] + regions[:, None]).flatten(1)


def _as_mask_if_one(value: Any) -> Tensor | None:
    """A pipeline's own mask, or None where it is no mask that we know, or has nothing under it."""
    try:
        return as_mask(value)
    except (TypeError, ValueError):
        return None


class MaskWatch:
    """Keeps the mask that an inpainting pipeline prepares for its run.

    Attributes:
        mask: The mask; None before there is one.
        picture: What the pipeline has made of the picture beside the mask, as its model may get it.
    """

    def __init__(self, pipe: Any) -> None:
        self.mask: Tensor | None = None
        self.picture: Tensor | None = None
        self._pipe = weakref.ref(pipe)
        prepare, watch = type(pipe).prepare_mask_latents, weakref.ref(self)

        signature = inspect.signature(prepare)

        @functools.wraps(prepare)
        def prepare_mask_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen = watch()
            if seen is not None and self is seen._pipe():
                given = signature.bind(self, *args, **kwargs).arguments
                seen.mask = _as_mask_if_one(given.get("mask", given.get("mask_image")))
            prepared = prepare(self, *args, **kwargs)
            if seen is not None and self is seen._pipe():
                pair = isinstance(prepared, tuple) and len(prepared) == 2
                seen.picture = prepared[1] if pair else None
            return prepared

        pipe.prepare_mask_latents = types.MethodType(prepare_mask_latents, pipe)

    def remove(self) -> None:
        pipe = self._pipe()
        if pipe is not None:
            vars(pipe).pop("prepare_mask_latents", None)
