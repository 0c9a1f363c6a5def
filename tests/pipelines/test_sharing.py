"""Pipelines that share a transformer, each with its own scheduler, in threads and in turns."""

import copy
import dataclasses
import functools
import gc
import inspect
import threading
import types
import warnings
import weakref

import pytest
import torch
from support.pipelines import sd3_inputs
from support.runs import loop
from support.snapshot import Snapshot, check_undone
from support.zoo import ENTRIES

import ras
from ras import session
from ras.denoisers import families_of
from ras.mount import Mount

PLAN = (1, 1, 0.5, 0, 1, 0.25, 0.5, 0)
STEPS = len(PLAN)
NAMES = ["sd3", "flux", "qwen", "wan", "z-image"]  # guidance in one call, none, in two; lists

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.filterwarnings("ignore:a .* calls the transformer:ras.RASWarning"),
    pytest.mark.filterwarnings("ignore:a thread calls:ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]


def twins(name):
    """A pipeline, another one of its parts with a scheduler of its own, and what runs either."""
    pipe, call = ENTRIES[name].build()
    other = copy.copy(pipe)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    assert other.transformer is pipe.transformer and other.scheduler is not pipe.scheduler
    return pipe, other, functools.partial(call, STEPS)


def in_threads(*jobs):
    """Run all jobs at once, each in a thread: their results in order, or what they raise."""
    results = [None] * len(jobs)

    def work(at):
        with torch.no_grad():
            try:
                results[at] = jobs[at]()
            except BaseException as error:
                results[at] = error

    threads = [threading.Thread(target=work, args=(at,), daemon=True) for at in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return results


def taking_turns(*runs):
    """Run all at once, each in a thread: a step of the one, then a step of the next."""
    turns = [threading.Semaphore(int(at == 0)) for at in range(len(runs))]

    def stepping(at):
        following, steps = turns[(at + 1) % len(runs)], []

        def hand_over(pipe, step, t, tensors):
            steps.append(step)
            following.release()
            if len(steps) < STEPS:
                assert turns[at].acquire(timeout=60)
            return tensors

        def job():
            assert turns[at].acquire(timeout=60)
            return runs[at](callback_on_step_end=hand_over)

        return job

    return in_threads(*map(stepping, range(len(runs))))


@pytest.mark.parametrize("name", NAMES)
def test_one_enabled_of_two(name):
    """Step by step and all at once: the other one is dense to the bit, and neither is disturbed."""
    pipe, other, draw = twins(name)
    dense = draw(on=other)
    ras.enable(pipe, plan=PLAN)
    alone, stats = draw(on=pipe), ras.stats(pipe)
    jobs = functools.partial(draw, on=pipe), functools.partial(draw, on=other)
    for together in (taking_turns, in_threads):
        ours, theirs = together(*jobs)
        assert torch.equal(theirs, dense) and torch.equal(ours, alone)
        again = ras.stats(pipe)
        assert again.steps_sparse == stats.steps_sparse == 3 and again.steps_skipped == 2


@pytest.mark.parametrize("name", NAMES)
def test_both_enabled(name):
    """Each has its own settings, statistics and caches."""
    pipe, other, draw = twins(name)
    settings = {pipe: dict(plan=PLAN), other: dict(speedup=2.0)}
    alone = {}
    for which, each in settings.items():
        with ras.enabled(which, **each):
            alone[which] = draw(on=which)
    for which, each in settings.items():
        ras.enable(which, **each)
    jobs = [functools.partial(draw, on=which) for which in settings]
    for together in (taking_turns, in_threads):
        for which, result in zip(settings, together(*jobs)):
            assert torch.equal(result, alone[which])
    assert ras.stats(pipe).steps_sparse == 3 and ras.stats(other).steps_sparse == 0
    assert ras.stats(pipe).steps_skipped == 2 and ras.stats(other).steps_skipped == 4


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


def test_loops_by_hand_in_two_threads():
    """The run under way is one thread's; another one's calls are dense until it is over."""
    pipe, other, _ = twins("sd3")
    inputs, transformer = sd3_inputs(pipe, 1), pipe.transformer
    ours, theirs = pipe.scheduler, other.scheduler
    dense = loop(transformer, theirs, inputs, STEPS)
    ras.enable(transformer, plan=PLAN, scheduler=ours)
    alone = loop(transformer, ours, inputs, STEPS)
    turns = threading.Semaphore(1), threading.Semaphore(0)

    def stepping(at, scheduler):
        def step(noise, t, latents):
            turns[1 - at].release()
            assert at or turns[at].acquire(timeout=60)
            return scheduler.step(noise, t, latents, return_dict=False)[0]

        assert turns[at].acquire(timeout=60)
        return loop(transformer, scheduler, inputs, STEPS, step=step)

    jobs = functools.partial(stepping, 0, ours), functools.partial(stepping, 1, theirs)
    first, second = in_threads(*jobs)
    assert torch.equal(first, alone) and torch.equal(second, dense)


class Stop(BaseException):
    """As KeyboardInterrupt, of which threads other than the main one have none."""


def test_a_call_that_is_interrupted_stands_in_nobodys_way():
    pipe, other, draw = twins("flux")
    ras.enable(pipe, plan=PLAN)
    ras.enable(other, plan=PLAN)
    expected = draw(on=pipe)

    def stop(*_):
        raise Stop

    handle = pipe.transformer.norm_out.register_forward_pre_hook(stop)
    (error,) = in_threads(functools.partial(draw, on=pipe))
    assert isinstance(error, Stop)
    handle.remove()
    (result,) = in_threads(functools.partial(draw, on=other))
    assert torch.equal(result, expected) and torch.equal(draw(on=pipe), expected)


def test_one_record_for_all_who_share():
    pipe, other, draw = twins("flux")
    ((_, family),) = families_of(pipe)
    ras.enable(pipe, plan=PLAN)
    expected, before = draw(on=pipe), Snapshot(other)
    with pytest.raises(ValueError, match=r"another record; call ras\.disable on the transformer"):
        ras.enable(other, plan=PLAN, family=dataclasses.replace(family, note="mine"))
    before.same_as(Snapshot(other), ignoring=("scheduler", "pipe"))
    assert not ras.is_enabled(other) and torch.equal(draw(on=pipe), expected)


def test_a_call_that_is_interrupted_before_it_begins(monkeypatch):
    """While its run is planned, say: the turn is given, and nothing of it is left."""
    pipe, other, draw = twins("flux")
    ras.enable(pipe, plan=PLAN)
    ras.enable(other, plan=PLAN)
    expected = draw(on=pipe)

    def stop(*_, **__):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(session, "read_clock", stop)
        (error,) = in_threads(functools.partial(draw, on=pipe))
    assert isinstance(error, Stop)
    (result,) = in_threads(functools.partial(draw, on=other))
    assert torch.equal(result, expected) and torch.equal(draw(on=pipe), expected)


def test_a_turn_of_a_thread_that_has_ended():
    """Another one's forward hook has ended it, of which ours are not told."""
    pipe, other, draw = twins("flux")
    ras.enable(pipe, plan=PLAN)
    ras.enable(other, plan=PLAN)
    expected = draw(on=pipe)

    def stop(*_):
        raise Stop

    handle = pipe.transformer.register_forward_pre_hook(stop)
    (error,) = in_threads(functools.partial(draw, on=pipe))
    assert isinstance(error, Stop)
    handle.remove()
    (result,) = in_threads(functools.partial(draw, on=other))
    assert torch.equal(result, expected)


@pytest.mark.filterwarnings("ignore::ras.RASWarning")  # what begins in mid-run has few steps left
@pytest.mark.parametrize("again", [False, True])
def test_taken_off_while_calls_wait(again):
    """Runs in three threads, from which RAS is taken in their midst: they end, dense from there."""
    pipe, other, draw = twins("flux")
    third = copy.copy(pipe)
    third.scheduler = copy.deepcopy(pipe.scheduler)
    pipes = pipe, other, third
    for each in pipes:
        ras.enable(each, plan=PLAN)
    started = threading.Event()

    def began(pipe, step, t, tensors):
        started.set()
        return tensors

    def off():
        started.wait(60)
        if again:
            ras.enable(pipe, speedup=2)
        else:
            ras.disable(pipe.transformer)

    for _ in range(5):
        jobs = [functools.partial(draw, on=each, callback_on_step_end=began) for each in pipes]
        for result in in_threads(*jobs, off)[:3]:
            assert isinstance(result, torch.Tensor) and result.isfinite().all()


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
    assert left.pipeline is pipe


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
