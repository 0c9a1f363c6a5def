"""Maps and the measure of difference, against values worked out by hand."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ras import pictures
from ras.pictures.maps import ANCHORS, VEIL, colours


def flat(value, size=(4, 4)):
    return Image.new("RGB", size, (value, value, value))


def test_psnr_of_images_one_apart():
    # Every value differs by one: the mean squared error is 1.
    assert pictures.psnr(flat(10), flat(11)) == pytest.approx(20 * math.log10(255))


def test_psnr_of_one_wrong_channel():
    other = flat(0)
    other.putpixel((1, 2), (0, 51, 0))
    # One of 48 values is wrong by a fifth of the peak: MSE / 255² = 1 / (25 · 48).
    assert pictures.psnr(flat(0), other) == pytest.approx(10 * math.log10(25 * 48))


def test_psnr_of_extremes():
    assert pictures.psnr(flat(7), flat(7)) == math.inf
    assert pictures.psnr(flat(0), flat(255)) == 0


def test_psnr_needs_images_of_one_size():
    with pytest.raises(ValueError, match=r"\(4, 4\) and \(8, 4\)"):
        pictures.psnr(flat(0), flat(0, (8, 4)))


def test_colours_grow_lighter():
    ramp = colours(np.linspace(0, 1, 64)).astype(float)
    luminance = ramp @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luminance) > 0).all() and luminance[-1] - luminance[0] > 150
    assert (ramp[0] == ANCHORS[0]).all() and (ramp[-1] == ANCHORS[-1]).all()


def test_heat_map_has_a_flat_patch_for_each_region():
    counts = np.array([[6, 17, 28], [28, 6, 6]])
    image = pictures.heat_map(counts, (24, 32))  # regions of 8 by 16 pixels
    assert image.size == (24, 32)
    pixels = np.asarray(image)
    expected = colours((counts - 6) / 22).repeat(16, 0).repeat(8, 1)
    assert (pixels == expected).all()


def test_heat_map_of_equal_counts():
    pixels = np.asarray(pictures.heat_map(np.full((2, 2), 28), (8, 8)))
    assert (pixels == ANCHORS[-1]).all()


def test_heat_map_of_bool_is_dark_and_light():
    """Where all are False, too."""
    some = np.asarray(pictures.heat_map(torch.tensor([[True, False]]), (2, 1)))
    assert (some[0, 0] == ANCHORS[-1]).all() and (some[0, 1] == ANCHORS[0]).all()
    assert (
        np.asarray(pictures.heat_map(torch.zeros(2, 2, dtype=bool), (4, 4))) == ANCHORS[0]
    ).all()


def test_region_map_veils_what_is_less():
    """The greatest leaves the image as it is, the least is mixed with its colour."""
    counts = torch.tensor([[28, 6], [17, 28]], dtype=torch.bfloat16)
    image = Image.effect_noise((16, 16), 60).convert("RGB")
    own, found = (np.asarray(each, float) for each in (image, pictures.region_map(image, counts)))
    assert (found[:8, :8] == own[:8, :8]).all() and (found[8:, 8:] == own[8:, 8:]).all()
    for part, level in ((np.s_[:8, 8:], 0.0), (np.s_[8:, :8], 0.5)):
        veil = VEIL * (1 - level)
        expected = own[part] * (1 - veil) + colours(level) * veil
        assert np.abs(found[part] - expected).max() <= 1.5


def test_region_map_of_more_regions_than_pixels():
    assert pictures.region_map(flat(9), np.eye(64)).size == (4, 4)


def test_difference_map():
    """By the most unlike channel, the largest lightest."""
    other = flat(10)
    other.putpixel((1, 2), (10, 90, 50))
    other.putpixel((3, 0), (50, 10, 10))
    expected = np.zeros((4, 4))
    expected[2, 1], expected[0, 3] = 1, 0.5
    assert (np.asarray(pictures.difference_map(flat(10), other)) == colours(expected)).all()
    assert (np.asarray(pictures.difference_map(other, other)) == ANCHORS[0]).all()


@pytest.mark.parametrize(
    "regions, told",
    [
        (np.zeros((1, 2, 3)), r"\(rows, columns\)"),
        (np.zeros((0, 3)), r"\(rows, columns\)"),
        (np.array([[math.nan]]), "finite"),
        (np.zeros((1, 2**16)), r"\(rows, columns\)"),
    ],
)
def test_what_is_no_map(regions, told):
    with pytest.raises(ValueError, match=f"regions must be {told}"):
        pictures.heat_map(regions, (4, 4))


@pytest.mark.parametrize("size", [(4,), (4, 0), (4, 2**16)])
def test_what_is_no_size(size):
    with pytest.raises(ValueError, match="size"):
        pictures.heat_map(np.eye(2), size)
