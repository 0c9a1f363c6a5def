"""Regions' scores against float64, and their selection to the last tie."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.operands import COMPUTED, INTERPRETED, batches, check, laid, more, normal, read, wide

import ras_kernels
from ras_kernels import reference
from ras_kernels.regions import MOST_COMPARED


@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
@pytest.mark.parametrize("metric", ras_kernels.METRICS)
@more
@given(
    st.data(),
    batches,
    st.sampled_from([1, 15, 132]),
    st.integers(1, 9),
    st.sampled_from([1, 4, 16]),
)
def test_region_scores(dtype, metric, data, batch, regions, pixels, channels):
    noise = normal(batch, regions, pixels * channels, dtype=dtype)
    noise = laid(noise, data.draw(read))
    found = ras_kernels.region_scores(noise, pixels, metric)
    exact = reference.region_scores(wide(noise), pixels, metric).double()
    check(found, exact, reference.region_scores(noise, pixels, metric))


@pytest.mark.parametrize("starvation_scale", [0.0, 0.7310585])
@more
@given(
    st.data(),
    batches,
    st.sampled_from([1, 2, 7, 128, 129, 300, 1030]),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.booleans(),
)
def test_selection_is_the_definitions_to_the_last_tie(
    starvation_scale, data, batch, regions, high_ratio, unusual
):
    num_active = data.draw(st.sampled_from([1, regions]) | st.integers(1, regions))
    scores = (5 * normal(batch, regions)).round().abs()
    if unusual:
        for at, value in enumerate([math.nan, math.inf, -0.0, -math.inf, math.nan]):
            scores[:, 3 * at :: 29] = value
    ages = normal(batch, regions, seed=1).abs().mul(3)
    ages = ages.to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    scores, ages = (laid(tensor, data.draw(read)) for tensor in (scores, ages))
    before = ages.clone()
    active, after = ras_kernels.select_regions(
        scores, ages, num_active, high_ratio=high_ratio, starvation_scale=starvation_scale
    )
    expected = reference.select_regions(scores, ages, num_active, high_ratio, starvation_scale)
    assert active.dtype == torch.int32 and after.dtype == ages.dtype
    assert torch.equal(active, expected[0]) and torch.equal(after, expected[1])
    assert torch.equal(ages, before)


@pytest.mark.parametrize("regions", [8192, 8193, 32_760, 75_600])
def test_selection_of_many_regions(regions):
    """As Python sorts them, with ties and NaN; and with ages, where those that go first are."""
    if INTERPRETED and regions <= MOST_COMPARED:
        pytest.skip("minutes in the interpreter, which has 1,030 above")
    k, high_ratio, scale = regions // 4, 0.3, 0.7310585
    scores, ages = (
        (regions * normal(2, regions)).round().div(16).round(),
        normal(2, regions, seed=1),
    )
    scores[:, ::1001] = math.nan
    ages = ages.abs().mul(3).to(torch.int32)
    options = dict(num_active=k, high_ratio=high_ratio)
    active, _ = ras_kernels.select_regions(scores, ages, **options, starvation_scale=0.0)
    low = regions - k - round(high_ratio * (regions - k))
    ranks = []
    for row, found in zip(scores.nan_to_num(nan=math.inf).tolist(), active.tolist()):
        order = sorted(range(regions), key=row.__getitem__)
        assert found == sorted(order[low : low + k])
        ranks.append(torch.tensor(order).argsort())

    active, after = ras_kernels.select_regions(scores, ages, **options, starvation_scale=scale)
    centre = low + (k - 1) / 2
    urgency = (torch.stack(ranks).to(ages.device) - centre).abs().double().log() - scale * ages
    chosen = torch.zeros_like(ages, dtype=torch.bool).scatter_(1, active.long(), True)
    assert (active.diff(dim=1) > 0).all() and (chosen.sum(dim=1) == k).all()
    assert torch.equal(after, torch.where(chosen, 0, ages + 1))
    for mine, picked in zip(urgency, chosen):
        assert mine[picked].max() <= mine[~picked].min() + 1e-5
