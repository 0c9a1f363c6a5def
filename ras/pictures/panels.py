"""Images side by side with a map, titles and a caption: the pictures of the command line."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .maps import colours, heat_map

PAPER = (255, 255, 255)
INK = (28, 28, 32)
GREY = (105, 105, 115)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def comparison(
    images: Sequence[tuple[str, Image.Image]],
    counts: NDArray[np.integer],
    title: str,
    caption: Sequence[str],
) -> Image.Image:
    """Images of one size, and the heat map of `counts` with its legend, side by side.

    `counts` is `(rows, columns)`: how often each region was computed. A title stands above each
    panel, `title` above the map; the caption's lines stand below, the first one in black, each
    wrapped to the width.
    """
    width, height = images[0][1].size
    panels = [*images, (title, heat_map(counts, (width, height)))]
    # The text's size, from which every distance follows.
    unit = max(12, round(min(width, height) / 16))
    font, small = ImageFont.load_default(unit), ImageFont.load_default(0.85 * unit)
    line, gap = round(1.5 * unit), unit
    low, high = int(counts.min()), int(counts.max())
    marks = [str(high), str(low)] if high > low else [str(high)]
    legend = unit + round(max(small.getlength(mark) for mark in marks))

    total = gap + len(panels) * (gap + width) + gap // 2 + legend + gap // 4
    rows = [wrap(text, font, total - 2 * gap) for text in caption]
    top = gap // 2 + line
    bottom = top + height + gap
    canvas = Image.new("RGB", (total, bottom + sum(map(len, rows)) * line + gap // 2), PAPER)
    draw = ImageDraw.Draw(canvas)

    for index, (above, panel) in enumerate(panels):
        x = gap + index * (width + gap)
        draw.text((x, gap // 2), shorten(above, font, width), INK, font)
        canvas.paste(panel, (x, top))

    x = len(panels) * (width + gap) + gap // 2
    ramp = np.linspace(1, 0 if high > low else 1, height)[:, None].repeat(gap // 2, axis=1)
    canvas.paste(Image.fromarray(colours(ramp)), (x, top))
    for mark, y, anchor in zip(marks, (top, top + height), ("lt", "lb"), strict=False):
        draw.text((x + gap * 3 // 4, y), mark, GREY, small, anchor=anchor)

    y = bottom
    for index, row in enumerate(rows):
        for text in row:
            draw.text((gap, y), text, GREY if index else INK, font)
            y += line
    return canvas


def shorten(text: str, font: Font, width: float) -> str:
    """The text, or as much of its beginning as fits `width` pixels with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    kept = len(text)
    while kept and font.getlength(text[:kept].rstrip() + "…") > width:
        kept -= 1
    return text[:kept].rstrip() + "…"


def wrap(text: str, font: Font, width: float, most: int = 4) -> list[str]:
    """The text in at most `most` lines of `width` pixels, broken between words.

    A word wider than a line is shortened; so is the last line if words are left over.
    """
    words = text.split()
    lines: list[str] = []
    while words and len(lines) < most:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        if len(lines) == most - 1:
            count = len(words)
        lines.append(shorten(" ".join(words[:count]), font, width))
        words = words[count:]
    return lines
