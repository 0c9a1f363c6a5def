"""Images side by side: nothing leaves the picture, and texts keep to their width."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from ras.pictures import panels


def flat(value, size):
    return Image.new("RGB", size, (value, value, value))


@pytest.mark.parametrize("size", [(64, 64), (256, 256), (512, 256), (256, 512)])
@pytest.mark.parametrize("counts", [np.arange(16).reshape(4, 4), np.full((4, 4), 28)])
def test_nothing_leaves_the_comparison(size, counts):
    prompt = "a very long prompt " * 30 + "w" * 300
    picture = panels.comparison(
        [("Dense · 12345.67 s" * 9, flat(40, size)), ("RAS", flat(90, size))],
        counts,
        "map",
        (prompt, "x"),
    )
    pixels = np.asarray(picture)
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == panels.PAPER).all()
    for value in (40, 90):
        assert (pixels == value).all(-1).sum() >= size[0] * size[1]


def test_wrap_keeps_words_and_width():
    font = ImageFont.load_default(12)
    lines = panels.wrap("one two three four five", font, 60)
    assert " ".join(lines) == "one two three four five" and len(lines) > 1
    assert all(font.getlength(line) <= 60 for line in lines)


def test_wrap_shortens_what_does_not_fit():
    font = ImageFont.load_default(12)
    lines = panels.wrap("word " * 100, font, 60, most=2)
    assert len(lines) == 2 and lines[-1].endswith("…")
    (line,) = panels.wrap("w" * 100, font, 60)
    assert line.endswith("…") and font.getlength(line) <= 60
