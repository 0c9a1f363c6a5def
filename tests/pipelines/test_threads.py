"""Pipelines that share a transformer, each in a thread of its own."""

import copy
import functools
import threading

import pytest
import torch
from support.pipelines import sd3_inputs
from support.runs import loop
from support.sharing import NAMES, PLAN, STEPS, twins

import ras
from ras import beginning

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.filterwarnings("ignore:a .* calls the transformer:ras.RASWarning"),
    pytest.mark.filterwarnings("ignore:a thread calls:ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]


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


def test_a_call_that_is_interrupted_before_it_begins(monkeypatch):
    """While its run is planned, say: the turn is given, and nothing of it is left."""
    pipe, other, draw = twins("flux")
    ras.enable(pipe, plan=PLAN)
    ras.enable(other, plan=PLAN)
    expected = draw(on=pipe)

    def stop(*_, **__):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(beginning, "read_clock", stop)
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
