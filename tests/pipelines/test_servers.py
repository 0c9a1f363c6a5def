"""One pipeline that is enabled once: unlike requests, in threads, and broken off in mid-run."""

import copy
import functools
import gc
import threading
import types
import weakref

import numpy as np
import pytest
import torch
from support import pipelines
from support.pipelines import sd3_inputs
from support.runs import run
from support.snapshot import Snapshot, check_undone
from support.zoo import ENTRIES

import ras
from ras.callers import calls_under_way
from ras.sessions import session_of

PLAN = (1, 1, 0.5, 0, 1, 0.25, 0.5, 0)
MASK = np.zeros((128, 128), np.float32)
MASK[32:64, 48:96] = 1
REQUESTS = [  # height and width of the latents, and of the call; settings
    (dict(height=16, width=16), dict(steps=8), {}),
    (dict(height=8, width=24), dict(steps=5, guidance=1.0), {}),
    (dict(height=16, width=16, batch=2), dict(steps=8, guidance=7.0), dict(mask=MASK)),
    (dict(height=24, width=16), dict(steps=7), dict(speedup=2)),
    (dict(height=8, width=8), dict(steps=6), dict(sample_ratio=0.5, speedup=1.5)),
    (dict(height=16, width=16), dict(steps=8), dict(speedup=1)),
]

pytestmark = [
    pytest.mark.filterwarnings("ignore::ras.RASWarning"),  # of so few steps
    pytest.mark.usefixtures("no_gradients"),
]


def request(pipe, at, **more):
    size, call, settings = REQUESTS[at]
    with ras.settings(pipe, **settings):
        return run(pipe, sd3_inputs(pipe, **size, seed=at), **call, **more)


@functools.cache
def alone(at):
    pipe = pipelines.sd3()
    ras.enable(pipe, plan=PLAN)
    with torch.no_grad():
        return request(pipe, at)


def in_threads(work, count):
    """Have so many threads do the same at once; what they raise, in order of their numbers."""
    raised = [None] * count

    def each(at):
        try:
            with torch.no_grad():
                work(at)
        except BaseException as error:
            raised[at] = error

    threads = [threading.Thread(target=each, args=(at,), daemon=True) for at in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return raised


@pytest.mark.parametrize("keep_caches", [False, True])
def test_requests_of_several_threads_under_a_lock(keep_caches):
    """Each is to the bit what it is alone, whatever came before."""
    pipe, lock, served = pipelines.sd3(), threading.Lock(), []
    ras.enable(pipe, plan=PLAN, keep_caches=keep_caches)

    def serve(thread):
        for at in range(len(REQUESTS)):
            at = (at * (1, 5, 1)[thread] + thread) % len(REQUESTS)
            with lock:
                served.append((at, request(pipe, at)))

    assert in_threads(serve, 3) == [None] * 3
    assert len(served) == 3 * len(REQUESTS) == ras.stats(pipe).runs
    assert all(torch.equal(image, alone(at)) for at, image in served)


class Gone(BaseException):
    """As a client that is gone: what is raised is no Exception, such as `asyncio`'s own."""


@pytest.mark.parametrize("keep_caches", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit, Gone])
def test_a_run_that_is_broken_off(error, keep_caches):
    """Its caches are gone as soon as it is, or ready for what comes; the next one is right."""
    pipe = pipelines.sd3()
    ras.enable(pipe, plan=PLAN, keep_caches=keep_caches)
    session, held = session_of(pipe), []

    def go(pipe, step, t, tensors):
        if step == 2:
            held.extend(map(weakref.ref, session._branches.held + session.run.selection.tensors))
            raise error
        return tensors

    for at in (0, 2):
        with pytest.raises(error):
            request(pipe, at, callback_on_step_end=go)
        assert len(held) > 10
        assert keep_caches or not any(tensor() is not None for tensor in held)
        assert not session._branches.held and session.run.selection is None
        held.clear()
        for after in (0, 1, 2):
            assert torch.equal(request(pipe, after), alone(after))


@pytest.mark.parametrize("name", ["flux", "qwen", "wan", "dit", "sd3-inpaint"])
def test_pipelines_of_every_kind_are_broken_off(name):
    """Where the loop is a `with` block and where it is over the bar, by an error of a step."""
    pipe, draw = ENTRIES[name].build()
    ras.enable(pipe, speedup=2)
    expected, steps, step = draw(8), [], pipe.scheduler.step

    def stop(*args, **kwargs):
        steps.append(None)
        if len(steps) == 4:
            raise ValueError("stop")
        return step(*args, **kwargs)

    pipe.scheduler.step = stop
    with pytest.raises(ValueError, match="stop"):
        draw(8)
    del pipe.scheduler.step
    session = session_of(pipe)
    assert not session._branches and session.run.carry is None
    ras.enable(pipe, speedup=2)
    assert torch.equal(draw(8), expected)


# --- threads without a lock -----------------------------------------------------------------------


def at_once(pipe, second_begins, first=None, second=None):
    """Two threads that call one pipeline, the second in the midst of the first one's run."""
    goes, came = threading.Event(), threading.Event()

    def wait(pipe, step, t, tensors):
        if step == second_begins:
            goes.set()
            assert came.wait(60)
        return tensors

    def work(at):
        if at:
            assert goes.wait(60)
            try:
                (second or request)(pipe, 1)
            finally:
                came.set()
        else:
            (first or request)(pipe, 0, callback_on_step_end=wait)

    return in_threads(work, 2)


def test_two_calls_at_once_are_an_error():
    """Of both, as the second one has changed what the first one goes by; the next is right."""
    pipe = pipelines.sd3()
    ras.enable(pipe, plan=PLAN)
    for second_begins in (0, 3, 7):
        errors = at_once(pipe, second_begins)
        assert [type(error) for error in errors] == [RuntimeError] * 2
        assert all("hold a lock around each call" in str(error) for error in errors)
        assert not session_of(pipe)._branches
        for at in (0, 2):
            assert torch.equal(request(pipe, at), alone(at))


def slow_to_encode(pipe, name):
    """Have a thread of that name wait at its text: events of its being there, and to let it go."""
    encode, there, goes = pipe.encode_prompt, threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        if threading.current_thread().name == name:
            there.set()
            assert goes.wait(60)
        return encode(*args, **kwargs)

    pipe.encode_prompt = slow
    return there, goes


def start(name, pipe, at, **more):
    """A request in a thread of that name, and a list for what comes of it."""
    came = []

    def work():
        with torch.no_grad():
            try:
                came.append(request(pipe, at, **more))
            except BaseException as error:
                came.append(error)

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    return thread, came


@pytest.mark.parametrize("in_loop", [False, True])
def test_a_call_at_its_text_beside_a_whole_run(in_loop):
    """It is an error of both, whether the run began before that call or after it."""
    pipe, began, ends = pipelines.sd3(), threading.Event(), threading.Event()
    ras.enable(pipe, plan=PLAN)
    there, goes = slow_to_encode(pipe, "slow")

    def wait(pipe, step, t, tensors):
        began.set()
        assert ends.wait(60)
        return tensors

    if in_loop:
        other, others = start("other", pipe, 0, callback_on_step_end=wait)
        assert began.wait(60)
    thread, came = start("slow", pipe, 1)
    assert there.wait(60)
    if not in_loop:
        other, others = start("other", pipe, 0)
    ends.set()
    other.join(60)
    goes.set()
    thread.join(60)
    for error in (*others, *came):
        assert isinstance(error, RuntimeError) and "hold a lock" in str(error)
    assert len(others) == len(came) == 1
    for at in (0, 2):
        assert torch.equal(request(pipe, at), alone(at))


def test_looking_for_calls_of_other_threads_leaves_them_as_they_are():
    """Their `locals()`, too, which diffusers' callbacks are given; before Python 3.13 it is one."""
    there, goes, found = threading.Event(), threading.Event(), []

    class Called:
        def __call__(self, step):
            names = locals()
            there.set()
            assert goes.wait(60)
            found.append(names.get("step"))

    called = Called()
    thread = threading.Thread(target=called, args=(3,), daemon=True)
    thread.start()
    assert there.wait(60)
    assert [of for of, _ in calls_under_way(called, Called.__call__.__code__)] == [thread.ident]
    goes.set()
    thread.join(60)
    assert found == [3] and not calls_under_way(called, Called.__call__.__code__)


def test_a_lock_within_the_call():
    """A subclass waits in its own `__call__`, which is no call at once, also after a broken one."""

    class Locked(type(pipelines.sd3())):
        lock = threading.Lock()

        def __call__(self, *args, **kwargs):
            with self.lock:
                return super().__call__(*args, **kwargs)

    pipe = pipelines.sd3(Locked)
    ras.enable(pipe, plan=PLAN)
    served = []

    def go(pipe, step, t, tensors):
        raise Gone

    def serve(thread):
        for _ in range(2):
            with pytest.raises(Gone):
                run(pipe, sd3_inputs(pipe, seed=0), callback_on_step_end=go)
            served.append(run(pipe, sd3_inputs(pipe, seed=0)))

    assert in_threads(serve, 3) == [None] * 3
    assert len(served) == 6 and all(torch.equal(image, alone(0)) for image in served)


def test_a_copy_for_each_thread():
    """With a scheduler of its own, and enabled: no lock is needed, as calls take turns."""
    pipe, served = pipelines.sd3(), []
    ras.enable(pipe, plan=PLAN)

    def serve(thread):
        mine = copy.copy(pipe)
        mine.scheduler = copy.deepcopy(pipe.scheduler)
        ras.enable(mine, plan=PLAN)
        for at in (thread, 5 - thread):
            served.append((at, request(mine, at)))
        ras.disable(mine)

    assert in_threads(serve, 3) == [None] * 3
    assert len(served) == 6 and all(torch.equal(image, alone(at)) for at, image in served)


# --- the progress bar -----------------------------------------------------------------------------


def test_the_progress_bar_stays_what_it_is():
    """Its settings, one that somebody has put there, and copies of the pipeline with theirs."""
    pipe, seen = pipelines.sd3(), []
    before = Snapshot(pipe)
    ras.enable(pipe, plan=PLAN)
    with pipe.progress_bar(total=3) as bar:  # outside of a call
        assert bar.total == 3 and bar.disable
    assert [*pipe.progress_bar([1, 2])] == [1, 2]
    ras.disable(pipe)
    check_undone(before, pipe, ran=False)

    def mine(self, iterable=None, total=None):
        seen.append((self, total))
        return type(self).progress_bar(self, iterable, total)

    pipe.progress_bar = types.MethodType(mine, pipe)
    ras.enable(pipe, plan=PLAN)
    other = copy.copy(pipe)
    other.set_progress_bar_config(disable=True, desc="other")
    assert torch.equal(request(pipe, 0), alone(0))
    assert seen == [(pipe, 8)]
    ras.disable(pipe)
    assert pipe.progress_bar.__func__ is mine
    del pipe.progress_bar
    ras.enable(pipe, plan=PLAN)
    kept = weakref.ref(pipe)
    del pipe, seen[:], before, other
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("own_bar", [False, True])
def test_a_pipeline_is_not_kept_alive_by_its_transformer(own_bar):
    """One of several that share it, enabled and used, and never disabled."""
    pipe = pipelines.sd3()
    ras.enable(pipe, plan=PLAN)
    other = copy.copy(pipe)
    other.scheduler = copy.deepcopy(pipe.scheduler)
    if own_bar:
        other.progress_bar = types.MethodType(type(pipe).progress_bar, other)
    ras.enable(other, plan=PLAN)
    assert torch.equal(request(other, 0), alone(0))
    kept = weakref.ref(other)
    del other
    gc.collect()
    assert kept() is None
    assert torch.equal(request(pipe, 0), alone(0))
