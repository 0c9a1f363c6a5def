"""What is done to the image of an edit once it is decoded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .checks import check_kind, shown


def put_back(image: Image.Image, picture: Image.Image, edited: Any) -> Image.Image:
    """Put the pixels of the picture back where its edit has changed nothing.

    Args:
        image: The result of an edit.
        picture: What was edited, of the same size.
        edited: `(rows, columns)` bool, the regions that are edited: of `ras.stats(pipe).edited`
            that of the sample.

    Returns:
        An RGB image whose pixels are the picture's outside of the edited regions, to the bit, and
        the image's inside, but for a mixture along their edges, half a region wide.

    Raises:
        TypeError: Something else.
        ValueError: Images of unlike size, or more regions than pixels.
    """
    for name, value in (("image", image), ("picture", picture)):
        check_kind(name, value, Image.Image, "a PIL image")
    if image.size != picture.size:
        raise ValueError(
            f"picture must be of the image's size, {image.size}, got {picture.size}; resize one"
        )
    if isinstance(edited, np.ndarray):
        edited = torch.from_numpy(edited.copy())
    if not isinstance(edited, Tensor):
        raise TypeError(f"edited must be an array or a tensor, got {shown(edited)}")
    width, height = image.size
    rows, columns = edited.shape if edited.ndim == 2 else (0, 0)
    if edited.dtype != torch.bool or not 0 < rows <= height or not 0 < columns <= width:
        raise ValueError(
            "edited must be (rows, columns) bool, of no more regions than pixels; got "
            f"{tuple(edited.shape)} {edited.dtype}"
        )
    inside = pixels_of(edited, image.size).float()[None, None]
    side = max(1, height // rows // 2, width // columns // 2) | 1
    around = F.avg_pool2d(inside, side, stride=1, padding=side // 2, count_include_pad=False)
    weight = (inside * around)[0, 0, :, :, None].numpy()
    own, new = (np.asarray(each.convert("RGB"), np.float32) for each in (picture, image))
    return Image.fromarray(np.rint(own + weight * (new - own)).astype(np.uint8))


def pixels_of(regions: Tensor, size: tuple[int, int]) -> Tensor:
    """The pixels `(height, width)` bool of regions `(rows, columns)`; `size` is as PIL has it."""
    values = regions.cpu().float()[None, None]
    return F.interpolate(values, size[::-1], mode="nearest")[0, 0] > 0.5
