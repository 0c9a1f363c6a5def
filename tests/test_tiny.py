"""What everything else rests on, in a minute: `python -m pytest tests/test_tiny.py`.

Dense runs are exact, plans and partial steps do what they say, and nothing is left of it all. The
rooms beside this file look at each of these from all sides.
"""

import pytest
import torch
from support import pipelines
from support.pipelines import sd3_inputs
from support.runs import run
from support.snapshot import Snapshot, check_undone
from support.zoo import ENTRIES

import ras

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]
STEPS = 12


def test_a_run_without_a_speed_up_is_dense_to_the_bit_and_nothing_is_left():
    pipe = pipelines.sd3()
    before, inputs = Snapshot(pipe), sd3_inputs(pipe)
    expected = run(pipe, inputs, STEPS)
    with ras.enabled(pipe, speedup=1):
        assert torch.equal(run(pipe, inputs, STEPS), expected)
    with ras.enabled(pipe):
        assert not torch.equal(run(pipe, inputs, STEPS), expected)
    check_undone(before, pipe)
    assert torch.equal(run(pipe, inputs, STEPS), expected)


def test_the_plan_is_what_runs():
    pipe = pipelines.sd3()
    ras.enable(pipe, speedup=2)
    planned = ras.plan(pipe, STEPS)
    run(pipe, sd3_inputs(pipe), STEPS)
    stats = ras.stats(pipe)
    assert stats.plan == planned.plan and stats.steps_dense + stats.steps_skipped == STEPS
    assert stats.speedup_ceiling == pytest.approx(2, rel=0.03)


@pytest.mark.parametrize("name", ["sd3", "flux", "flux-kontext", "wan"])
def test_partial_steps_compute_the_share_that_is_planned(name):
    pipe, call = ENTRIES[name].build()
    ras.enable(pipe, plan=(1, 1, 0.5, 0, 0.25, 1))
    call(6)
    stats = ras.stats(pipe)
    assert (stats.steps_dense, stats.steps_sparse, stats.steps_skipped) == (3, 2, 1)
    counts = stats.region_counts.flatten(1)
    share = (0.5, 0.25)
    size = counts.shape[1]
    assert (counts.sum(1) == 3 * size + sum(round(each * size) for each in share)).all()


def test_nonsense_is_refused_before_anything_changes():
    pipe = pipelines.sd3()
    before = Snapshot(pipe)
    for settings in (dict(speedup=0), dict(plan=[0, 1]), dict(sample_ratio=2), dict(mask=[])):
        with pytest.raises((ValueError, TypeError)):
            ras.enable(pipe, **settings)
    check_undone(before, pipe, ran=False)
