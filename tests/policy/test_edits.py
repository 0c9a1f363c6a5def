"""Which regions an edit changes, told by the clean image that a run is heading for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ras.layout import Layout
from ras.policy import edits
from ras.policy.edits import Edit, edited
from ras.references import original

GRID = 8, 8


def scores(*changed, others=0.05, much=1.0):
    """(1, 64): how much each region differs, those at (y, x) by much."""
    found = torch.full(GRID, others)
    for y, x in changed:
        found[y, x] = much
    return found.flatten()[None]


def regions(found, margin=0, rms=1.0):
    return edited(found, torch.full((len(found),), rms), GRID, margin).unflatten(1, GRID)


def test_what_differs_is_edited():
    square = [(y, x) for y in (2, 3) for x in (4, 5)]
    (found,) = regions(scores(*square))
    assert sorted(map(tuple, found.nonzero().tolist())) == square


def test_a_region_alone_is_no_edit_and_two_are():
    assert not regions(scores((2, 2))).any()
    assert regions(scores((2, 2), (3, 3))).sum() == 2


def test_gaps_are_closed():
    ring = [(y, x) for y in (2, 3, 4) for x in (2, 3, 4) if (y, x) != (3, 3)]
    (found,) = regions(scores(*ring))
    assert found[3, 3] and found.sum() == 9


@pytest.mark.parametrize("margin, side", [(0, 2), (1, 4), (2, 6)])
def test_the_margin_widens(margin, side):
    square = [(y, x) for y in (3, 4) for x in (3, 4)]
    assert regions(scores(*square), margin).sum() == side**2


def test_the_margin_stays_within_the_image():
    corner = [(0, 0), (0, 1), (1, 0), (1, 1)]
    (found,) = regions(scores(*corner), 1)
    assert found.sum() == 9 and found[:3, :3].all()


@pytest.mark.parametrize("share", [0.5, 0.8, 1.0])
def test_an_edit_of_most_of_the_image(share):
    """The quantile is one of edited regions then, and must not hide them."""
    count = round(64 * share)
    found = scores(*[divmod(i, 8) for i in range(count)])
    assert regions(found).sum() == count


def test_a_coarse_picture_of_what_is_kept_is_no_edit():
    """Where the model renders all of it coarsely, only what differs much more is edited."""
    square = [(y, x) for y in (2, 3) for x in (4, 5)]
    assert regions(scores(*square, others=0.1, much=0.25)).sum() == 0
    assert regions(scores(*square, others=0.1, much=0.31)).sum() == 4


@given(st.floats(0.01, 100))
def test_scale_is_of_no_account(scale):
    noisy = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) ** 4
    rms = torch.tensor([1.0, 0.5, 2.0])
    assert torch.equal(edited(noisy, rms, GRID, 1), edited(noisy * scale, rms * scale, GRID, 1))


# --- a run that is seen ---------------------------------------------------------------------------


def run(change, sigma=0.5, margin=1, samples=2):
    """An `Edit` that has seen a step in which sample i is heading for a change at `change[i]`."""
    generator = torch.Generator().manual_seed(1)
    picture = torch.randn(samples, 64, 4, generator=generator)
    clean = picture.clone()
    for i, places in enumerate(change):
        for y, x in places:
            clean[i, 8 * y + x] += 3
    noise = torch.randn(samples, 64, 4, generator=generator)
    edit = Edit(picture, GRID, margin)
    edit.observe(torch.lerp(clean, noise, sigma), noise - clean, sigma)
    return edit


SMALL = [(y, x) for y in (1, 2) for x in (1, 2)]
LARGE = [(y, x) for y in range(3, 7) for x in range(3, 7)]
LARGER = [(y, x) for y in range(7) for x in range(8)]


@pytest.mark.parametrize("sigma", [0.999, 0.5, 0.01])
def test_the_clean_image_tells(sigma):
    edit = run([SMALL, LARGE], sigma, margin=0)
    found = edit.regions.unflatten(1, GRID)
    assert [sorted(map(tuple, each.nonzero().tolist())) for each in found] == [SMALL, LARGE]


def test_the_count_is_known_a_step_later_and_rounded_up():
    edit = run([SMALL, LARGE])
    assert edit.count is None
    assert edit.learn_count() and edit.count == 36  # of 6 x 6, in thirty-seconds of 64
    assert not edit.learn_count() and edit.count == 36


@pytest.mark.parametrize("places, count", [(SMALL, 36), (LARGE, 36), (LARGER, 64)])
def test_the_count_grows_by_leaps(places, count):
    edit = run([SMALL, LARGE])
    edit.learn_count()
    again = run([places, places])
    edit._asked = again._asked
    assert edit.learn_count() == (count != 36) and edit.count == count


def test_every_sample_has_regions_of_its_own():
    edit = run([SMALL, LARGE])
    edit.learn_count()
    rows = edit.choose()
    assert rows.shape == (2, 36) and rows.dtype == torch.int32 and (rows.diff() > 0).all()
    for chosen, mine in zip(rows, edit.regions, strict=True):
        inside = set(mine.nonzero().flatten().tolist())
        assert inside <= set(chosen.tolist())
    assert not torch.equal(*rows)


def test_no_edit_at_all_and_one_of_everything():
    nothing = run([[], []])
    assert nothing.learn_count() and nothing.count == 0
    everything = run([[divmod(i, 8) for i in range(64)]] * 2)
    assert everything.learn_count() and everything.count == 64
    assert (everything.choose() == torch.arange(64)).all()


def test_preserved_tokens_are_the_pictures_to_the_bit():
    edit = run([SMALL, LARGE])
    picture, tokens = edit._original, torch.full((2, 64, 4), 7.0)
    kept = edit.preserve(tokens)
    outside = ~edit.regions[..., None].expand_as(kept)
    assert torch.equal(kept[outside], picture[outside])
    core = torch.tensor([8 * y + x for y, x in [(4, 4), (4, 5), (5, 4), (5, 5)]])
    assert (kept[1, core] == 7).all()  # all around is edited, too
    edge = 8 * 2 + 4  # (2, 4) is the margin of LARGE
    assert edit.regions[1, edge]
    share = (kept[1, edge] - picture[1, edge]) / (7 - picture[1, edge])
    assert torch.allclose(share, torch.tensor(6 / 9))


def test_fixed_regions_are_those_of_a_mask():
    edit = Edit(torch.zeros(2, 64, 4), GRID, 1)
    edit.fix(torch.tensor([[0, 5], [1, 63]], dtype=torch.int32))
    assert edit.regions.nonzero().tolist() == [[0, 0], [0, 5], [1, 1], [1, 63]]


# --- the picture ----------------------------------------------------------------------------------


def latents(*sides):
    """Tokens of images with these sides, one after another: (1, n, 2), numbers of the image."""
    return torch.cat([torch.full((1, h * w, 2), float(i)) for i, (h, w) in enumerate(sides)], 1)


@pytest.mark.parametrize(
    "pictures, chosen",
    [
        ([(4, 6)], 1),
        ([(8, 12)], 1),  # twice as large
        ([(6, 4), (4, 6)], 2),  # the first is of another shape
        ([(2, 3), (4, 6)], 1),
        ([(6, 4)], None),
        ([(1, 6), (9, 1)], None),
        ([], None),
    ],
)
def test_the_picture_is_the_first_of_the_images_shape(pictures, chosen):
    count = sum(h * w for h, w in pictures)
    layout = Layout((4, 6), 3, count, tuple(pictures))
    found = original(latents((4, 6), *pictures), layout)
    if chosen is None:
        assert found is None
    else:
        assert found.shape == (1, 24, 2)
        assert torch.allclose(found, torch.tensor(float(chosen)))


def test_a_resampled_picture_is_where_it_was():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
    tokens = torch.stack([rows, columns], -1).reshape(1, 96, 2)
    layout = Layout((4, 6), 0, 96, ((8, 12),))
    found = original(torch.cat([torch.zeros(1, 24, 2), tokens], 1), layout).reshape(4, 6, 2)
    inner = found[1:3, 1:5]
    expected = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
    expected = torch.stack(expected, -1)[1:3, 1:5] * 2 + 0.5
    assert torch.allclose(inner, expected, atol=0.05)


def test_videos_and_padding_have_no_picture():
    assert original(torch.zeros(1, 60, 2), Layout((4, 6), 3, 36)) is None
    assert original(torch.zeros(1, 60, 2), Layout((1, 4, 6), 3, 36, ((6, 6),))) is None


@pytest.mark.parametrize(
    "error, given, told",
    [
        (TypeError, dict(pictures=3), "pictures must be a tuple of grids"),
        (TypeError, dict(pictures=(3,)), "pictures must be a tuple of whole numbers"),
        (ValueError, dict(pictures=((2, 2, 2),)), "height and width"),
        (ValueError, dict(pictures=((0, 2),)), "pictures must be"),
        (ValueError, dict(pictures=((4, 4),)), "among the references, 12 tokens"),
    ],
)
def test_pictures_of_a_layout(error, given, told):
    with pytest.raises(error, match=told):
        Layout((4, 4), 0, 12, **given)
    assert Layout((4, 4), 0, 12, ((3, 4),)).pictures == ((3, 4),)


def test_sizes_are_few():
    """Compilers see few sizes of partial steps, whatever is edited."""
    counts = set()
    for side in range(1, 9):
        edit = run([[(y, x) for y in range(side) for x in range(side)]] * 2, margin=0)
        edit.learn_count()
        counts.add(edit.count)
        assert edit.count >= int(edit.regions.sum(1).max())
    assert all(count % (64 // edits.SIZES) == 0 for count in counts)
