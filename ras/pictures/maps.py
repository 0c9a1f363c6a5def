"""Maps of regions and of differences in colours, and the measure of how two images differ."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..checks import check_count, check_kind, shown

MOST_PIXELS = 2**15  # of a side
VEIL = 0.6  # how much of a pixel's colour is the map's where the number is the least

# Dark to light, evenly spaced anchors of matplotlib's viridis: the order survives printing in
# grey and colour blindness.
ANCHORS = np.array(
    [
        (68, 1, 84),
        (70, 50, 127),
        (54, 92, 141),
        (39, 127, 142),
        (31, 161, 135),
        (74, 194, 109),
        (159, 218, 58),
        (253, 231, 37),
    ],
    np.float64,
)


def psnr(image: Image.Image, other: Image.Image) -> float:
    """Measure the peak signal-to-noise ratio of two images, in dB.

    `10 · log10(255² / MSE)`, with the mean squared error over all pixels and channels of the
    8-bit RGB values; infinite for equal images.

    Raises:
        TypeError: No PIL images.
        ValueError: Images of unlike size.
    """
    a, b = _values(image, other)
    error = float(np.mean((a - b) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def difference_map(image: Image.Image, other: Image.Image) -> Image.Image:
    """Draw where two images differ: the largest difference is lightest, and none is dark.

    Args:
        image, other: Of one size. A pixel differs by what the most unlike of its channels does.

    Returns:
        An RGB image of that size.

    Raises:
        TypeError: No PIL images.
        ValueError: Images of unlike size.
    """
    a, b = _values(image, other)
    difference = np.abs(a - b).max(axis=-1)
    return Image.fromarray(colours(difference / max(1, difference.max())))


def heat_map(regions: Any, size: tuple[int, int]) -> Image.Image:
    """Draw a number for each region as a map, one flat patch each.

    Args:
        regions: `(rows, columns)` of numbers or bool, an array or a tensor, such as
            `ras.stats(pipe).region_counts[0]`. The least is darkest and the greatest lightest;
            equal ones are all light, but for False, which is dark.
        size: Width and height in pixels.

    Returns:
        An RGB image of that size.

    Raises:
        TypeError: No numbers.
        ValueError: Numbers that are not finite, or of another shape; a size out of range.
    """
    check_kind("size", size, tuple | list, "width and height")
    if len(size) != 2:
        raise ValueError(f"size must be width and height, got {shown(size)}")
    for side in size:
        check_count("size's width and height", side, most=MOST_PIXELS)
    return _patches(colours(_levels(regions)), (size[0], size[1]))


def region_map(image: Image.Image, regions: Any) -> Image.Image:
    """Lay a map of regions over an image: the greatest number leaves it clear, less veils it.

    Args:
        image: Of any size.
        regions: As `heat_map` takes them: how often each region was computed
            (`ras.stats(pipe).region_counts[0]`), which ones are edited (`edited[0]`), or which
            ones a step computed (`walked[step, 0]`).

    Returns:
        An RGB image of the image's size.

    Raises:
        TypeError: No PIL image, or no numbers.
        ValueError: Numbers that are not finite, or of another shape.
    """
    check_kind("image", image, Image.Image, "a PIL image")
    levels = _levels(regions)
    veil = Image.fromarray(np.rint(255 * VEIL * (1 - levels)).astype(np.uint8))
    found = image.convert("RGB")
    veil = veil.resize(image.size, Image.Resampling.NEAREST)
    found.paste(_patches(colours(levels), image.size), (0, 0), veil)
    return found


def colours(levels: NDArray[np.floating] | float) -> NDArray[np.uint8]:
    """Numbers from 0 (dark) to 1 (light), of any shape `S` -> sRGB, `(*S, 3)` uint8."""
    steps = np.linspace(0, 1, len(ANCHORS))
    channels = [np.interp(levels, steps, anchors) for anchors in ANCHORS.T]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def _patches(found: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(found).resize(size, Image.Resampling.NEAREST)


def _levels(regions: Any) -> NDArray[np.float64]:
    """Numbers from 0 to 1 for regions."""
    if isinstance(regions, torch.Tensor):
        regions = regions.detach().cpu()
        regions = (regions.float() if regions.is_floating_point() else regions).numpy()
    if not isinstance(regions, np.ndarray) or regions.dtype.kind not in "biuf":
        raise TypeError(f"regions must be an array or a tensor of numbers, got {shown(regions)}")
    if regions.ndim != 2 or not regions.size > 0 or max(regions.shape) > MOST_PIXELS:
        raise ValueError(f"regions must be (rows, columns), got {regions.shape}")
    if not np.isfinite(regions).all():
        raise ValueError("regions must be finite numbers")
    if regions.dtype == np.bool_:
        return regions.astype(np.float64)
    found = regions.astype(np.float64)
    low, high = found.min(), found.max()
    return 1 - (high - found) / ((high - low) or 1)


def _values(image: Any, other: Any) -> list[NDArray[np.float64]]:
    for name, each in (("image", image), ("other", other)):
        check_kind(name, each, Image.Image, "a PIL image")
    if image.size != other.size:
        raise ValueError(f"images of different sizes: {image.size} and {other.size}")
    return [np.asarray(each.convert("RGB"), np.float64) for each in (image, other)]
