"""The ops of `ras_kernels` against plain loops and float64, in every dtype and with odd strides."""

import math

import pytest
import torch
from support.operands import COMPUTED, laid

import ras_kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rows(batch, tokens, k, seed=0):
    order = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order[:, :k].sort(1).values


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", ["dense", "gaps"])
def test_gather_and_scatter(dtype, index_dtype, layout):
    tokens = laid(normal(3, 7, 2, 5).to(dtype), layout)
    index = rows(3, 7, 4).to(index_dtype)
    gathered = ras_kernels.gather_tokens(tokens, index)
    assert gathered.shape == (3, 4, 2, 5) and gathered.dtype == dtype
    new = laid(normal(3, 4, 2, 5, seed=1).to(dtype), layout)
    before = tokens.clone()
    assert ras_kernels.scatter_tokens_(tokens, index, new) is tokens
    for b in range(3):
        for n in range(7):
            at = (index[b] == n).nonzero().flatten().tolist()
            if at:
                assert torch.equal(gathered[b, at[0]], before[b, n])
                assert torch.equal(tokens[b, n], new[b, at[0]])
            else:
                assert torch.equal(tokens[b, n], before[b, n])


def test_scatter_writes_into_part_of_a_buffer():
    """A cache's image rows are a view: the text rows behind them stay."""
    buffer = normal(2, 9, 3)
    before = buffer.clone()
    ras_kernels.scatter_tokens_(buffer[:, :6], rows(2, 6, 6), torch.zeros(2, 6, 3).double())
    assert (buffer[:, :6] == 0).all() and torch.equal(buffer[:, 6:], before[:, 6:])


def attention(query, key, value, mask, scale):
    """The definition, one head of one sample at a time, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    out = torch.empty_like(query)
    groups = query.shape[2] // key.shape[2]
    for b in range(query.shape[0]):
        seen = torch.ones(key.shape[1], dtype=torch.bool) if mask is None else mask[b]
        for h in range(query.shape[2]):
            k, v = key[b, seen, h // groups], value[b, seen, h // groups]
            out[b, :, h] = (scale * query[b, :, h] @ k.T).softmax(1) @ v
    return out


@pytest.mark.parametrize("dtype", COMPUTED)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("size", [64, 72, 96, 128])
@pytest.mark.parametrize("masked, scale", [(False, None), (True, 0.3)])
def test_attention(dtype, heads, kv_heads, size, masked, scale):
    query = normal(2, 5, heads, size, seed=1, dtype=dtype)
    key = laid(normal(2, 11, kv_heads, size, seed=2, dtype=dtype), "heads first")
    value = normal(2, 11, kv_heads, size, seed=3, dtype=dtype)
    mask = torch.arange(11) < torch.tensor([[7], [11]]) if masked else None
    found = ras_kernels.sparse_attention(query, key, value, key_mask=mask, scale=scale)
    expected = attention(query, key, value, mask, size**-0.5 if scale is None else scale)
    assert found.shape == query.shape and found.dtype == dtype
    # Rounding of the scores (whose size is about 1) and of the output: a few units each.
    error = (found.double() - expected).norm() / expected.norm()
    assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", COMPUTED)
@pytest.mark.parametrize("metric", ras_kernels.METRICS)
@pytest.mark.parametrize("pixels", [1, 4, 6, 9])
def test_region_scores(dtype, metric, pixels):
    noise = normal(2, 5, pixels * 4, dtype=dtype)
    scores = ras_kernels.region_scores(noise, pixels, metric)
    assert scores.dtype == torch.float32 and scores.shape == (2, 5)
    one = {
        "std": lambda p: (p - p.mean()).square().mean().sqrt(),
        "l2norm": lambda p: p.square().sum().sqrt(),
    }[metric]
    for b in range(2):
        for n in range(5):
            expected = sum(one(p).item() for p in noise[b, n].double().split(4)) / pixels
            assert scores[b, n].item() == pytest.approx(expected, rel=1e-5)


# --- selection ------------------------------------------------------------------------------------


def naive_selection(scores, ages, k, high_ratio, scale):
    """`select_regions` for one sample, in Python numbers."""
    n = len(scores)
    ranks = {region: r for r, region in enumerate(sorted(range(n), key=scores.__getitem__))}
    low = (n - k) - round(high_ratio * (n - k))
    centre = low + (k - 1) / 2
    urgency = [abs(ranks[i] - centre) * math.exp(-scale * ages[i]) for i in range(n)]
    active = sorted(sorted(range(n), key=urgency.__getitem__)[:k])
    return active, [0 if i in active else ages[i] + 1 for i in range(n)]


@pytest.mark.parametrize("high_ratio", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 10, 32, 63, 64])
def test_selection_without_near_ties(high_ratio, k):
    """Scores a step apart, in a random order; ages and a scale that make no two regions tie."""
    scores = torch.stack(
        [torch.randperm(64, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    ).float()
    ages = torch.stack(
        [torch.randint(0, 6, (64,), generator=torch.Generator().manual_seed(s)) for s in range(3)]
    )
    active, after = ras_kernels.select_regions(
        scores, ages, k, high_ratio=high_ratio, starvation_scale=0.7310585
    )
    assert active.dtype == torch.int32 and after.dtype == ages.dtype
    for b in range(3):
        expected = naive_selection(scores[b].tolist(), ages[b].tolist(), k, high_ratio, 0.7310585)
        assert (active[b].tolist(), after[b].tolist()) == expected


@pytest.mark.parametrize("high_ratio, kept", [(0, range(5, 10)), (1, range(5)), (0.4, range(3, 8))])
def test_at_equal_ages_it_is_the_papers_split(high_ratio, kept):
    scores = torch.tensor([[3.0, 9, 1, 0, 7, 2, 5, 8, 6, 4]])
    ages = torch.full((1, 10), 3)
    active, _ = ras_kernels.select_regions(
        scores, ages, 5, high_ratio=high_ratio, starvation_scale=1.0
    )
    assert sorted(scores[0, active[0]].tolist()) == list(kept)


def test_ties_are_broken_by_position():
    active, _ = ras_kernels.select_regions(
        torch.zeros(1, 8),
        torch.zeros(1, 8, dtype=torch.int32),
        3,
        high_ratio=1.0,
        starvation_scale=1.0,
    )
    assert active.tolist() == [[0, 1, 2]]


def longest_wait(select, regions=256, k=128, steps=22, scores=None):
    """The greatest age in a run of sparse steps with the same scores in all of them."""
    if scores is None:
        scores = torch.rand(1, regions, generator=torch.Generator().manual_seed(0))
    ages, longest = torch.zeros(1, regions, dtype=torch.int32), 0
    for _ in range(steps):
        _, ages = select(scores, ages, k)
        longest = max(longest, int(ages.max()))
    return longest


def age_bound(regions, k, high_ratio, scale):
    """The bound that `select_regions` states."""
    dropped = regions - k
    centre = dropped - round(high_ratio * dropped) + (k - 1) / 2
    reach = max(centre, regions - 1 - centre)
    return math.ceil(math.log(2 * reach) / scale) + math.ceil((regions - 1) / (k - 1))


@pytest.mark.parametrize("high_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_no_region_starves(high_ratio, scale):
    """No resets, 22 sparse steps in a row, static scores, ratio 0.5."""

    def select(scores, ages, k):
        return ras_kernels.select_regions(
            scores, ages, k, high_ratio=high_ratio, starvation_scale=scale
        )

    bound = age_bound(256, 128, high_ratio, scale)
    assert bound < 22
    assert 1 <= longest_wait(select) <= bound


@pytest.mark.parametrize("high_ratio", [0.0, 0.3, 1.0])
def test_the_published_rule_breaks_the_bound(high_ratio):
    """It multiplies a dropped region's score, and drops the highest: what was dropped stays so."""

    def published(scores, ages, k):
        weighted = scores * torch.exp(1.0 * ages)
        order = weighted.argsort(1)
        low = (256 - k) - round(high_ratio * (256 - k))
        active = order[:, low : low + k]
        return active, (ages + 1).scatter(1, active, 0)

    waited = longest_wait(published)
    if high_ratio:  # at 0 the sign happens to be the right one
        assert waited == 22 > age_bound(256, 128, high_ratio, 1.0)
    else:
        assert waited <= age_bound(256, 128, high_ratio, 1.0)
