"""The pictures and the measure of difference, against values worked out by hand."""

import math

import numpy as np
import pytest
from PIL import Image, ImageFont

from ras.cli import pictures


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
    ramp = pictures.colours(np.linspace(0, 1, 64)).astype(float)
    luminance = ramp @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luminance) > 0).all() and luminance[-1] - luminance[0] > 150
    assert (ramp[0] == pictures.ANCHORS[0]).all() and (ramp[-1] == pictures.ANCHORS[-1]).all()


def test_heat_map_has_a_flat_patch_for_each_region():
    counts = np.array([[6, 17, 28], [28, 6, 6]])
    image = pictures.heat_map(counts, (24, 32))  # regions of 8 by 16 pixels
    assert image.size == (24, 32)
    pixels = np.asarray(image)
    expected = pictures.colours((counts - 6) / 22).repeat(16, 0).repeat(8, 1)
    assert (pixels == expected).all()


def test_heat_map_of_equal_counts():
    pixels = np.asarray(pictures.heat_map(np.full((2, 2), 28), (8, 8)))
    assert (pixels == pictures.ANCHORS[-1]).all()


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (512, 256), (256, 512)])
@pytest.mark.parametrize("counts", [np.arange(16).reshape(4, 4), np.full((4, 4), 28)])
def test_nothing_leaves_the_comparison(size, counts):
    prompt = "a very long prompt " * 30 + "w" * 300
    picture = pictures.comparison(
        [("Dense · 12345.67 s" * 9, flat(40, size)), ("RAS", flat(90, size))],
        counts,
        "map",
        (prompt, "x"),
    )
    pixels = np.asarray(picture)
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == pictures.PAPER).all()
    for value in (40, 90):
        assert (pixels == value).all(-1).sum() >= size[0] * size[1]


def test_wrap_keeps_words_and_width():
    font = ImageFont.load_default(12)
    lines = pictures.wrap("one two three four five", font, 60)
    assert " ".join(lines) == "one two three four five" and len(lines) > 1
    assert all(font.getlength(line) <= 60 for line in lines)


def test_wrap_shortens_what_does_not_fit():
    font = ImageFont.load_default(12)
    lines = pictures.wrap("word " * 100, font, 60, most=2)
    assert len(lines) == 2 and lines[-1].endswith("…")
    (line,) = pictures.wrap("w" * 100, font, 60)
    assert line.endswith("…") and font.getlength(line) <= 60
