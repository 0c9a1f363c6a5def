"""What counts as a mask, and the regions under it."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from support import pipelines
from support.boxes import box, rows_and_columns
from support.snapshot import Snapshot, check_undone

import ras
from ras.masks import as_mask, masked_regions

pytestmark = pytest.mark.filterwarnings("error::ras.RASWarning")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# --- what counts as a mask ------------------------------------------------------------------------


MASK = box(3, 2, 2, 4, (8, 6))
BYTES = (255 * MASK).astype(np.uint8)
FORMS = {
    "PIL, grey": Image.fromarray(BYTES),
    "PIL, black and white": Image.fromarray(BYTES).convert("1"),
    "PIL, colours": Image.fromarray(BYTES).convert("RGB"),
    "floats": MASK,
    "doubles": MASK.astype(np.float64),
    "bools": MASK > 0,
    "bytes": BYTES,
    "integers": BYTES.astype(np.int64),
    "just above a half": 0.51 * MASK + 0.49 * (1 - MASK),
    "a view": np.repeat(MASK, 2, axis=1)[:, ::2],
    "a tensor": torch.from_numpy(MASK),
    "half precision": torch.from_numpy(MASK).half(),
    "a tensor of bools": torch.from_numpy(MASK > 0),
    "with a channel": MASK[None],
    "with a sample and a channel": torch.from_numpy(BYTES)[None, None],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_mask(form):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask = as_mask(FORMS[form])
    assert mask.dtype == torch.float32 and mask.shape == (1, 1, 8, 6)
    assert torch.equal(mask[0, 0] > 0.5, torch.from_numpy(MASK > 0))


def test_a_mask_per_sample():
    masks = np.stack([MASK, 1 - MASK])[:, None]
    assert torch.equal(as_mask(masks), torch.from_numpy(masks))


@pytest.mark.parametrize(
    "error, value, named",
    [
        (TypeError, "mask.png", "mask.png"),
        (TypeError, None, "None"),
        (TypeError, MASK.tolist(), "PIL image"),
        (ValueError, np.ones(4), r"\(4,\)"),
        (ValueError, np.ones((3, 4, 4)), r"\(3, 4, 4\)"),
        (ValueError, np.ones((2, 3, 4, 4)), r"\(2, 3, 4, 4\)"),
        (ValueError, np.ones((1, 1, 1, 4, 4)), "5?"),
        (ValueError, np.zeros((4, 4)), "nothing under it"),
        (ValueError, np.full((4, 4), 0.5), "nothing under it"),
        (ValueError, np.stack([MASK, 0 * MASK])[:, None], "nothing under it"),
    ],
)
def test_what_is_no_mask(error, value, named):
    with pytest.raises(error, match=named):
        as_mask(value)
    if value is None:  # enable's None is no mask at all
        return
    pipe = pipelines.sd3()
    before = Snapshot(pipe)
    with pytest.raises(error, match=named):
        ras.enable(pipe, mask=value)
    check_undone(before, pipe, ran=False)


# --- the regions under it -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "margin, rows, columns",
    [(0, [2, 3], [4]), (1, [1, 2, 3, 4], [3, 4, 5]), (2, range(6), [2, 3, 4, 5]), (9, None, None)],
)
def test_regions_of_a_box(margin, rows, columns):
    """A box of 2 by 1 regions in a grid of 8 by 6, and what is around it."""
    mask = as_mask(box(32, 64, 32, 16, (128, 96)))
    rows, columns = (range(8), range(6)) if rows is None else (rows, columns)
    regions = masked_regions(mask, (8, 6), margin)
    assert regions.dtype == torch.int32
    assert regions.tolist() == [rows_and_columns((8, 6), rows, columns)]


def test_one_pixel_is_enough():
    for y, x in itertools.product((0, 15, 16, 127), (0, 47, 48, 95)):
        regions = masked_regions(as_mask(box(y, x, 1, 1, (128, 96))), (8, 6), 0)
        assert regions.tolist() == [[y // 16 * 6 + x // 16]]


@pytest.mark.parametrize("size", [(8, 6), (16, 24), (100, 100), (4, 3)])
def test_a_mask_of_any_size(size):
    """The upper half, however many pixels that is."""
    mask = np.zeros(size)
    mask[: size[0] // 2] = 1
    regions = masked_regions(as_mask(mask), (8, 6), 0)
    assert regions.tolist() == [list(range(24))]


def test_samples_with_masks_of_different_sizes():
    """The one with less under its mask takes in what is next to that."""
    masks = np.stack([box(0, 0, 64, 48), box(48, 80, 16, 16)])[:, None]
    large, small = masked_regions(as_mask(masks), (8, 8), 0).tolist()
    assert large == rows_and_columns((8, 8), range(4), range(3))
    around = rows_and_columns((8, 8), (2, 3, 4), (4, 5, 6))
    assert len(small) == 12 and set(around) < set(small)
    assert set(small) < set(rows_and_columns((8, 8), range(1, 6), range(3, 8)))
    assert small == sorted(small)
