"""Masks of boxes, and the regions under them."""

import numpy as np


def box(top, left, height, width, size=(128, 128)):
    """A mask of ones in a box, `(height, width)`; 16 pixels are a region."""
    mask = np.zeros(size, np.float32)
    mask[top : top + height, left : left + width] = 1
    return mask


def rows_and_columns(grid, rows, columns):
    """The regions of those rows and columns, in ascending order."""
    return [row * grid[1] + column for row in rows for column in columns]
