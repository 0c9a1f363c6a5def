"""How long regions wait: under random plans, masks and noise levels, and in runs of pipelines."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import pipelines
from support.operands import more
from support.pipelines import normal, sd3_inputs
from support.runs import loop, run

import ras
import ras_kernels
from ras.policy import selection
from ras.policy.selection import Selection

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]

STEPS = 60
PIXELS, CHANNELS = 4, 3
LEVELS = {
    "usual": lambda step: 1 - step / STEPS,
    "noise": lambda step: 1 - step * 1e-6,  # where positions stand still
    "end": lambda step: 0.04 * (1 - step / STEPS),
    "back and forth": lambda step: (0.9, 0.3, 1.0)[step % 3],
}


def noise_of(step, samples, regions, flat):
    """Noise of which a share stays as it is."""
    noise = normal(samples, regions, PIXELS * CHANNELS, seed=step)
    noise[:, : math.ceil(flat * regions)] = 1
    return noise


def waits(config, counts, sigma, samples=1, regions=20, flat=0.5, masked=None, add=None):
    """How long regions wait in a run whose steps compute `counts` tokens: `(steps, S, N)`.

    In what `add(room)` adds for each partial step that leaves one out; 0 by a step that computes
    it. `room` is what the step computes beside the mask.
    """
    add, taken = add or (lambda room: room), 0 if masked is None else masked.shape[1]
    chooser, waited, found = Selection(config, PIXELS, masked), torch.zeros(samples, regions), []
    noise = None
    for step, count in enumerate(counts):
        rows = None
        if 0 < count < regions:
            rows = chooser.choose(noise, count, sigma(step))
            assert rows.shape == (samples, count) and (rows.diff(dim=1) > 0).all()
            waited = (waited + add(count - taken)).scatter(1, rows.long(), 0)
        elif count:
            waited = torch.zeros(samples, regions)
        if masked is not None and rows is not None:
            under = torch.zeros(samples, regions).scatter(1, masked.long(), 1) > 0
            assert not waited[under].any()
        noise = noise_of(step, samples, regions, flat)
        if count:
            chooser.observe(noise, rows, sigma(step))
        found.append(waited)
    return torch.stack(found)


@st.composite
def plans(draw, regions, least=1):
    """How many tokens each step computes: the first one all of them, others at least `least`."""
    whole = st.sampled_from(draw(st.sampled_from([[0], [0, regions]])))
    few = st.integers(min(least, regions), min(least + 2, regions))
    step = st.one_of(few, few, st.integers(min(least, regions), regions), whole)
    second = draw(st.sampled_from([0, regions]))  # one dense step, or two
    return [regions, second, *draw(st.lists(step, min_size=STEPS - 2, max_size=STEPS - 2))]


@pytest.mark.parametrize("levels", LEVELS)
@more
@given(st.data(), st.integers(1, 2), st.integers(1, 12), st.sampled_from([0.0, 0.5, 1.0]))
def test_no_region_starves_by_drift(levels, data, samples, regions, flat):
    """The docstring's bound, with and without a mask."""
    size = data.draw(st.integers(0, regions))
    order = normal(samples, regions, seed=size).argsort(dim=1)
    masked = order[:, :size].sort(dim=1).values.to(torch.int32) if size else None
    counts = data.draw(plans(regions, max(size, 1)))
    longest = waits(ras.RASConfig(), counts, LEVELS[levels], samples, regions, flat, masked).max()
    room = max([count - size for count in counts if 0 < count < regions], default=0)
    assert longest < (selection.PATIENCE + 1) * regions + max(room, 1)


@pytest.mark.parametrize("metric", ras_kernels.METRICS)
@more
@given(st.data(), st.integers(2, 12), st.sampled_from([0.3, 1.0, 5.0]))
def test_no_region_starves_by_the_papers_metrics(metric, data, regions, scale):
    """The bound of `select_regions`, by the smallest step."""
    counts = data.draw(plans(regions, 2))
    config = ras.RASConfig(metric=metric, starvation_scale=scale)
    longest = waits(config, counts, LEVELS["usual"], 2, regions, add=lambda room: 1).max()
    least = min(count for count in [*counts, regions] if count)
    most = math.ceil(math.log(2 * (regions - 1)) / scale) + math.ceil((regions - 1) / (least - 1))
    assert longest <= most


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_what_was_never_measured_comes_first(share):
    """After one dense step each region is computed once before any is computed twice."""
    count = round(share * 20)
    found = waits(ras.RASConfig(), [20, *[count] * 12], LEVELS["usual"])
    turns = math.ceil(20 / count)
    computed = (found[1 : 1 + turns] == 0).sum(dim=0)
    assert computed.min() == 1 and computed.sum() == turns * count


@pytest.mark.parametrize("more, late", [(-4, []), (-3, [2]), (-2, [2, 0]), (-1, [2, 0, 3])])
def test_overdue_regions_come_first(more, late):
    """Those that have waited longest before others, and then the highest scores."""
    chooser = Selection(ras.RASConfig(), PIXELS)
    alone = [2, 0, 3, 1, *[4] * (selection.PATIENCE * 5 + more)]
    for step, region in enumerate([None, None, *alone]):
        noise = noise_of(step, 1, 5, flat=0.5)
        noise[:, 4] *= 1000  # changes most, by far
        rows = None if region is None else torch.tensor([[region]])
        chooser.observe(noise, rows, LEVELS["usual"](step))
    order = [*late, 4]
    for count in range(1, len(order) + 1):
        assert chooser.choose(noise, count, 0.1).tolist() == [sorted(order[:count])]


def test_beside_a_mask_waits_are_of_the_room_it_leaves():
    masked = torch.tensor([[0, 2]], dtype=torch.int32)
    chooser, rows = Selection(ras.RASConfig(), PIXELS, masked), torch.tensor([[0, 2, 4]])
    for step in range(2 + selection.PATIENCE * 5):
        noise = noise_of(step, 1, 5, flat=0.5)
        noise[:, 4] *= 1000
        if step > 1:  # nothing is overdue yet
            assert torch.equal(chooser.choose(noise, 3, 0.1), rows.int())
        chooser.observe(noise, rows if step > 1 else None, LEVELS["usual"](step))
    assert chooser.choose(noise, 4, 0.1).tolist() == [[0, 1, 2, 3]]


def test_a_mask_without_room_leaves_the_rest_to_dense_steps():
    masked = torch.tensor([[3, 4, 11]], dtype=torch.int32)
    counts = [20, *[3] * 50, 20]
    steps = waits(ras.RASConfig(), counts, LEVELS["usual"], masked=masked, add=lambda room: 1)
    others = [n for n in range(20) if n not in (3, 4, 11)]
    assert (steps[-2, 0, others] == 50).all() and not steps[-1].any()


# --- other samples --------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("before, after", [(2, 4), (4, 2), (2, 3)])
def test_other_samples_begin_anew(before, after, mask):
    """All tokens are computed, until a step has seen to that."""
    masked = torch.tensor([[1, 5]], dtype=torch.int32) if mask else None
    chooser = Selection(ras.RASConfig(), PIXELS, masked)
    first, then = (normal(n, 20, 12, seed=n) for n in (before, after))
    assert chooser.choose(first, 5, 0.9) is None
    chooser.observe(first, torch.tensor([[0], [1]]).repeat(before // 2, 1), 0.9)
    assert chooser.choose(first, 5, 0.9) is None and not chooser.tensors
    chooser.observe(first, None, 0.9)
    assert chooser.choose(then, 5, 0.8) is None
    rows = chooser.choose(first, 5, 0.8)
    chooser.observe(then, rows, 0.8)
    assert chooser.choose(then, 5, 0.7) is None and chooser.choose(first, 5, 0.7) is None
    chooser.observe(then, None, 0.7)
    assert chooser.choose(then, 5, 0.6).shape == (after, 5)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("metric", ras.config.SELECTIONS)
def test_a_run_that_goes_on_with_other_samples(metric, mask):
    """Four of them, where guidance made two before: calls of the transformer are of the same form.

    By drift one more step is dense.
    """
    pipe, made = pipelines.sd3(), []
    marked = torch.zeros(128, 128)
    marked[:32, :64] = 1

    def step(noise, t, x):
        if len(made) > 4:
            noise, x = (torch.cat([each, each + 1]) for each in (noise, x))
        made.append(len(noise))
        return pipe.scheduler.step(noise, t, x, return_dict=False)[0][:2]

    settings = dict(metric=metric, mask=marked if mask else None, mask_margin=0)
    with ras.enabled(pipe, plan=[1, 1, *[0.5] * 8], **settings):
        latents = loop(pipe.transformer, pipe.scheduler, sd3_inputs(pipe, 2), 10, step=step)
        assert ras.stats(pipe).steps_dense == (3 if metric == "drift" else 2)
    assert made == [2] * 5 + [4] * 5 and latents.isfinite().all()


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ras.config.SELECTIONS)
def test_a_run_computes_each_region_again(metric):
    """After one dense step, though nothing is known then of how regions change."""
    pipe = pipelines.sd3()
    with ras.enabled(pipe, plan=[1, *[0.9] * 9], metric=metric):
        run(pipe, sd3_inputs(pipe, 2), steps=10)
        assert ras.stats(pipe).region_counts.min() > 1
