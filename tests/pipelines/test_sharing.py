"""Pipelines that share a transformer, each with its own scheduler, in threads and in turns."""

import copy
import dataclasses
import gc
import inspect
import types
import warnings
import weakref

import pytest
import torch
from support.pipelines import sd3_inputs
from support.runs import loop
from support.sharing import PLAN, STEPS, twins
from support.snapshot import Snapshot, check_undone

import ras
from ras.denoisers import families_of
from ras.mount import Mount

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.filterwarnings("ignore:a .* calls the transformer:ras.RASWarning"),
    pytest.mark.filterwarnings("ignore:a thread calls:ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]


@pytest.mark.parametrize("enables", [True, False])
def test_a_run_within_a_run(enables):
    """In one thread: between two steps of the one, a run of the other."""
    pipe, other, draw = twins("flux")
    ras.enable(pipe, plan=PLAN)
    alone, within = draw(on=pipe), []
    if enables:
        ras.enable(other, speedup=2)
    expected = draw(on=other)

    def run_other(pipe, step, t, tensors):
        within.append(draw(on=other))
        return tensors

    assert torch.equal(draw(on=pipe, callback_on_step_end=run_other), alone)
    assert len(within) == STEPS and all(torch.equal(each, expected) for each in within)


def test_the_other_ones_runs_leave_their_word():
    """A pipeline that is not enabled is dense, with one warning that says so."""
    pipe, other, draw = twins("sd3")
    ras.enable(pipe, plan=PLAN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        draw(on=other), draw(on=other)
    (warning,) = [each for each in caught if issubclass(each.category, ras.RASWarning)]
    assert "StableDiffusion3Pipeline" in str(warning.message)
    assert ras.stats(pipe).runs == 0 and "not enabled itself" in ras.stats(pipe).warnings[0]


def test_on_and_off_one_by_one():
    """Of either alone; of the transformer for both, and all is as it was."""
    pipe, other, draw = twins("flux")
    dense, before = draw(on=other), Snapshot(pipe)
    ras.enable(pipe, plan=PLAN)
    assert ras.is_enabled(pipe) and not ras.is_enabled(other)
    with pytest.raises(ValueError, match="not enabled"):
        ras.stats(other)
    ras.enable(other, speedup=2)
    ours = draw(on=pipe)
    ras.disable(other)
    assert ras.is_enabled(pipe) and not ras.is_enabled(other)
    assert torch.equal(draw(on=other), dense) and torch.equal(draw(on=pipe), ours)
    ras.disable(pipe)
    check_undone(before, pipe)
    ras.enable(other, plan=PLAN)
    ras.enable(pipe, plan=PLAN)
    ras.disable(pipe.transformer)
    assert not ras.is_enabled(other)
    check_undone(before, pipe)
    assert torch.equal(draw(on=pipe), dense)


def test_enabled_again_is_not_enabled_twice():
    """By the pipeline, or by hand with its scheduler."""
    pipe, _, draw = twins("flux")
    ras.enable(pipe, plan=PLAN)
    expected = draw(on=pipe)
    for model, more in (
        (pipe, {}),
        (pipe.transformer, dict(scheduler=pipe.scheduler)),
        (pipe.transformer, dict(scheduler=pipe.scheduler)),
        (pipe, {}),
    ):
        ras.enable(model, plan=PLAN, **more)
        assert torch.equal(draw(on=pipe), expected) and ras.stats(pipe).runs == 1
    ras.disable(pipe)
    assert not ras.is_enabled(pipe.transformer)


def test_one_record_for_all_who_share():
    pipe, other, draw = twins("flux")
    ((_, family),) = families_of(pipe)
    ras.enable(pipe, plan=PLAN)
    expected, before = draw(on=pipe), Snapshot(other)
    with pytest.raises(ValueError, match=r"another record; call ras\.disable on the transformer"):
        ras.enable(other, plan=PLAN, family=dataclasses.replace(family, note="mine"))
    before.same_as(Snapshot(other), ignoring=("scheduler", "pipe"))
    assert not ras.is_enabled(other) and torch.equal(draw(on=pipe), expected)


def test_loops_by_hand_beside_pipelines():
    """A loop of a session's scheduler is its run, whatever has been run before, or has gone."""
    pipe, other, draw = twins("sd3")
    gone = copy.copy(pipe)
    gone.scheduler = copy.deepcopy(pipe.scheduler)
    ras.enable(gone, plan=PLAN)
    draw(on=gone)
    del gone
    inputs = sd3_inputs(pipe, 1)
    ras.enable(pipe, plan=PLAN)
    ras.enable(other, speedup=2)
    for _ in range(2):
        draw(on=other), draw(on=pipe)
        loop(pipe.transformer, pipe.scheduler, inputs, STEPS)
        stats = ras.stats(pipe)
        assert stats.runs % 2 == 0 and stats.steps_sparse == 3
        loop(pipe.transformer, other.scheduler, inputs, STEPS)
        assert ras.stats(other).runs % 2 == 0 and ras.stats(other).steps_skipped == 4


def test_schedulers_of_two_that_are_set():
    """Nobody says whose a loop by hand is then: dense, with one warning."""
    pipe, other, _ = twins("sd3")
    inputs = sd3_inputs(pipe, 1)
    dense = loop(pipe.transformer, pipe.scheduler, inputs, STEPS)
    ras.enable(pipe, plan=PLAN)
    ras.enable(other, plan=PLAN)
    other.scheduler.set_timesteps(STEPS)
    with pytest.warns(ras.RASWarning, match="several enabled schedulers"):
        assert torch.equal(loop(pipe.transformer, pipe.scheduler, inputs, STEPS), dense)


@pytest.mark.parametrize("keep_caches", [False, True])
def test_pipelines_that_are_gone_leave_nothing(keep_caches):
    """Once another one is enabled: neither sessions nor what these kept."""
    pipe, _, draw = twins("flux")
    for _ in range(4):
        other = copy.copy(pipe)
        other.scheduler = copy.deepcopy(pipe.scheduler)
        ras.enable(other, plan=PLAN, keep_caches=keep_caches)
        draw(on=other)
        del other
        gc.collect()
        assert len(Mount.of(pipe.transformer).sessions) == 1
    ras.enable(pipe, plan=PLAN)
    (left,) = Mount.of(pipe.transformer).sessions
    assert left.origin.pipeline is pipe


def test_pipelines_of_one_scheduler():
    """Each has its own settings and statistics, and `disable` of one leaves the other."""
    pipe, _, draw = twins("flux")
    other = copy.copy(pipe)
    ras.enable(pipe, plan=PLAN)
    ras.enable(other, speedup=2)
    draw(on=pipe), draw(on=other)
    assert ras.stats(pipe).steps_sparse == 3 and ras.stats(other).steps_sparse == 0
    assert ras.stats(pipe).runs == ras.stats(other).runs == 1
    ras.disable(other)
    draw(on=other)  # by the session of its scheduler
    assert ras.stats(pipe).runs == 2 and ras.is_enabled(other)


def test_taken_off_within_a_call():
    """Another pipeline's session ends in a call, which keeps the turn that it has."""
    pipe, other, draw = twins("flux")
    ras.enable(pipe, plan=PLAN)
    expected = draw(on=pipe)
    ras.enable(other, plan=PLAN)
    mine = []

    def off(*_):
        ras.disable(other)
        copy.deepcopy(pipe.transformer)
        mine.append(Mount.of(pipe.transformer)._turn.mine)

    pipe.transformer.norm_out.register_forward_pre_hook(off)
    assert torch.equal(draw(on=pipe), expected) and mine and all(mine)


def test_a_call_by_another_name(monkeypatch):
    pipe, other, draw = twins("flux")
    kind = type(pipe)
    ras.enable(pipe, plan=PLAN)
    ras.enable(other, plan=PLAN)
    expected, inner = draw(on=pipe), kind.__call__

    def fast_call(pipeline, *args, **kwargs):
        return plain(pipeline, *args, **kwargs)

    plain = types.FunctionType(
        inspect.unwrap(inner).__code__.replace(co_name="plain"),
        inspect.unwrap(inner).__globals__,
        "plain",
        inspect.unwrap(inner).__defaults__,
    )
    monkeypatch.setattr(kind, "__call__", fast_call)
    with torch.no_grad():
        assert torch.equal(draw(on=pipe), expected) and ras.stats(pipe).runs == 2


def test_nothing_of_a_call_is_kept():
    """What a pipeline lets go of in its call is gone: here, its latents between two steps."""
    pipe, _, draw = twins("flux")
    ras.enable(pipe, plan=PLAN)
    seen = []

    def note(pipe, step, t, tensors):
        gc.collect()
        assert all(each() is None for each in seen[:-1]), step
        seen.append(weakref.ref(tensors["latents"]))
        return tensors

    draw(on=pipe, callback_on_step_end=note)
    assert len(seen) == STEPS
