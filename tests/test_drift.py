"""How fast regions change, and the scores that come of it, against plain loops and float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.operands import (
    COMPUTED,
    DEVICE,
    batches,
    bits,
    check,
    indices,
    laid,
    layouts,
    more,
    normal,
    only_rows,
    read,
    wide,
)

import ras_kernels
from ras_kernels import reference


def by_loops(last, pace, since, index, noise, position):
    """Image-shaped noise with patches of 2 x 2, one region at a time, in float64."""
    per_row = noise.shape[3] // 2
    for b, rows in enumerate(index.expand(len(noise), -1).tolist()):
        for n in rows:
            y, x = 2 * (n // per_row), 2 * (n % per_row)
            there = b, slice(None), slice(y, y + 2), slice(x, x + 2)
            change = math.sqrt((noise[there].double() - last[there].double()).square().mean())
            pace[b, n] = change / max(abs(position - since[b, n].item()), 1e-6)
            since[b, n] = position
            last[there] = noise[there]


def test_drift_of_image_shaped_noise():
    noise, last = normal(2, 3, 4, 6), normal(2, 3, 4, 6, seed=1)
    pace, since = normal(2, 6, seed=2).abs(), normal(2, 6, seed=3)
    since[0, 4] = 0.25  # no time has passed
    index = torch.tensor([[4, 1], [0, 5]], device=DEVICE)
    expected = [tensor.clone() for tensor in (last, pace, since)]
    by_loops(*expected, index, noise, 0.25)
    ras_kernels.update_drift_(last, pace, since, index, noise, position=0.25, patch_size=2)
    torch.testing.assert_close([last, pace, since], expected)
    scores = ras_kernels.drift_scores(pace, since, position=1.0)
    torch.testing.assert_close(scores, pace * (1 - since).abs())


@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
@more
@given(
    st.data(),
    batches,
    st.sampled_from([1, 4, 16]),
    st.integers(1, 3),
    st.sampled_from([(1, 1), (3, 5), (12, 11)]),
    st.booleans(),
    st.booleans(),
)
def test_update_drift(dtype, data, batch, channels, patch, sides, packed, all_regions):
    regions = math.prod(sides)
    shape = (regions, patch**2 * channels) if packed else (channels, *(patch * s for s in sides))
    noise = laid(normal(batch, *shape, dtype=dtype), data.draw(read))
    last = laid(normal(batch, *shape, dtype=dtype, seed=1), data.draw(layouts))
    pace = laid(torch.full((batch, regions), math.nan, device=DEVICE), data.draw(layouts))
    # In steps that float32 subtracts exactly, as what is near 0 would lose its digits.
    since = laid(normal(batch, regions, seed=2).mul(8).round() / 8, data.draw(layouts))
    index = None if all_regions else data.draw(indices(batch, regions))
    rows = torch.arange(regions, device=DEVICE)[None] if all_regions else index
    same, exact = [[tensor.clone() for tensor in (last, pace, since)] for _ in range(2)]
    exact = [wide(tensor) for tensor in exact]
    options = dict(position=0.25, patch_size=patch)
    with only_rows(rows, pace, since):
        ras_kernels.update_drift_(last, pace, since, index, noise, **options)
    reference.update_drift_(*same, index, noise, *options.values())
    reference.update_drift_(*exact, index, wide(noise), *options.values())
    assert torch.equal(bits(last), bits(same[0])) and torch.equal(since, same[2])
    found = (reference.gather_tokens(tensor, rows) for tensor in (pace, exact[1], same[1]))
    check(*found)
    scores = reference.gather_tokens(ras_kernels.drift_scores(pace, since, position=2.0), rows)
    reached = (reference.gather_tokens(tensor, rows) for tensor in (pace, since))
    check(scores, *_scores(*reached))


def _scores(pace, since):
    exact = reference.drift_scores(wide(pace), wide(since), 2.0)
    return exact, reference.drift_scores(pace, since, 2.0)
