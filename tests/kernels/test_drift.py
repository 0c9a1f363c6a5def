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


def test_drift_region_by_region():
    noise, last = normal(2, 6, 12), normal(2, 6, 12, seed=1)
    pace, since = normal(2, 6, seed=2).abs(), normal(2, 6, seed=3)
    since[0, 4] = 0.25  # no time has passed
    index = torch.tensor([[4, 1], [0, 5]], device=DEVICE)
    expected = [tensor.clone() for tensor in (last, pace, since)]
    for b, n in [(0, 4), (0, 1), (1, 0), (1, 5)]:
        change = (noise[b, n].double() - last[b, n].double()).square().mean().sqrt().item()
        values = noise[b, n], change / max(abs(0.25 - since[b, n].item()), 1e-6), 0.25
        for tensor, value in zip(expected, values):
            tensor[b, n] = value
    ras_kernels.update_drift_(last, pace, since, index, noise, position=0.25)
    torch.testing.assert_close([last, pace, since], expected)
    scores = ras_kernels.drift_scores(pace, since, position=1.0)
    torch.testing.assert_close(scores, pace * (1 - since).abs())


@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
@more
@given(
    st.data(),
    batches,
    st.sampled_from([1, 15, 132]),
    st.sampled_from([1, 4, 63, 144]),
    st.booleans(),
)
def test_update_drift(dtype, data, batch, regions, columns, all_regions):
    shape = batch, regions, columns
    noise = laid(normal(*shape, dtype=dtype), data.draw(read))
    last = laid(normal(*shape, dtype=dtype, seed=1), data.draw(layouts))
    pace = laid(torch.full((batch, regions), math.nan, device=DEVICE), data.draw(layouts))
    # In steps that float32 subtracts exactly, as what is near 0 would lose its digits.
    since = laid(normal(batch, regions, seed=2).mul(8).round() / 8, data.draw(layouts))
    index = None if all_regions else data.draw(indices(batch, regions))
    rows = torch.arange(regions, device=DEVICE)[None] if all_regions else index
    same, exact = [[tensor.clone() for tensor in (last, pace, since)] for _ in range(2)]
    exact = [wide(tensor) for tensor in exact]
    with only_rows(rows, pace, since):
        ras_kernels.update_drift_(last, pace, since, index, noise, position=0.25)
    reference.update_drift_(*same, index, noise, 0.25)
    reference.update_drift_(*exact, index, wide(noise), 0.25)
    assert torch.equal(bits(last), bits(same[0])) and torch.equal(since, same[2])
    found = (reference.gather_tokens(tensor, rows) for tensor in (pace, exact[1], same[1]))
    check(*found)
    scores = reference.gather_tokens(ras_kernels.drift_scores(pace, since, position=2.0), rows)
    reached = (reference.gather_tokens(tensor, rows) for tensor in (pace, since))
    check(scores, *_scores(*reached))


def _scores(pace, since):
    exact = reference.drift_scores(wide(pace), wide(since), 2.0)
    return exact, reference.drift_scores(pace, since, 2.0)
