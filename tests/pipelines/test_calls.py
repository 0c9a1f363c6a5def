"""`ras` from call to call: what changes between calls, and runs that die."""

import pytest
import torch
from support import pipelines
from support.oracle import relative_error
from support.pipelines import Recorder, sd3_inputs
from support.runs import (
    CONFIG,
    SPARSE,
    Stop,
    by_keyword,
    check,
    check_run,
    fresh,
    loop,
    run,
    run_noting_warnings,
    steps_of,
    stop_at,
)

import ras
from ras.sessions import session_of

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]


# --- from call to call ----------------------------------------------------------------------------


def test_calls_that_differ_do_not_touch_each_other():
    """Step count, batch and resolution change; each call gives what a fresh pipeline gives."""
    calls = [
        (8, dict(batch=1, height=16, width=16)),
        (6, dict(batch=1, height=16, width=16)),
        (8, dict(batch=2, height=16, width=16)),
        (8, dict(batch=2, height=8, width=24)),
        (8, dict(batch=2, height=24, width=8)),
        (9, dict(batch=1, height=16, width=16, text=20)),
        (8, dict(batch=1, height=16, width=16)),
    ]
    pipe = pipelines.sd3()
    with ras.enabled(pipe, CONFIG):
        for steps, shape in calls:
            result = run(pipe, sd3_inputs(pipe, **shape), steps)
            expected = fresh(lambda pipe, shape=shape: sd3_inputs(pipe, **shape), steps=steps)
            assert torch.equal(result, expected)


@pytest.mark.parametrize("at", [0, 2, 3, 5])
def test_exception_in_a_callback(at):
    pipe = pipelines.sd3()
    with ras.enabled(pipe, CONFIG):
        with pytest.raises(Stop):
            run(pipe, sd3_inputs(pipe, seed=5), callback_on_step_end=stop_at(at))
        assert torch.equal(run(pipe, sd3_inputs(pipe)), fresh(sd3_inputs))


@pytest.mark.parametrize("at", [0, 1, 3, 6])
def test_exception_inside_the_model(at):
    """In the middle of a walk through the blocks, on a dense and on a sparse step."""
    pipe = pipelines.sd3()
    calls = iter(range(100))

    def stop(module, args):
        if next(calls) == at:
            raise Stop

    with ras.enabled(pipe, CONFIG):
        hook = pipe.transformer.transformer_blocks[1].ff.register_forward_pre_hook(stop)
        with pytest.raises(Stop):
            run(pipe, sd3_inputs(pipe, seed=5))
        hook.remove()
        assert torch.equal(run(pipe, sd3_inputs(pipe)), fresh(sd3_inputs))


@pytest.mark.parametrize("at", [0, 3, 5])
def test_interrupt(at):
    pipe = pipelines.sd3()

    def interrupt(pipe, step, t, tensors):
        pipe._interrupt = step == at
        return tensors

    with ras.enabled(pipe, CONFIG):
        run(pipe, sd3_inputs(pipe, seed=5), callback_on_step_end=interrupt)
        assert torch.equal(run(pipe, sd3_inputs(pipe)), fresh(sd3_inputs))


def test_callback_that_replaces_the_latents(monkeypatch):
    pipe = pipelines.sd3()

    def shift(pipe, step, t, tensors):
        return {"latents": tensors["latents"].roll(4, dims=-1)}

    check_run(monkeypatch, pipe, sd3_inputs(pipe, 2), callback_on_step_end=shift)


@pytest.mark.parametrize("text", [5, 30])
def test_callback_that_replaces_the_prompt(monkeypatch, text):
    """Another prompt from a sparse step on, shorter or longer: text is always computed anew."""
    pipe = pipelines.sd3()
    other = sd3_inputs(pipe, 2, text=text, seed=50)

    def reword(pipe, step, t, tensors):
        if step == 2:
            names = "negative_prompt_embeds", "prompt_embeds"
            tensors["prompt_embeds"] = torch.cat([other[name] for name in names])
        return tensors

    record = Recorder(monkeypatch, pipe)
    with ras.enabled(pipe, CONFIG):
        run(pipe, sd3_inputs(pipe, 2), callback_on_step_end=reword)
        sparse = SPARSE if steps_of(pipe) == (3, 5) else [s for s in SPARSE if s != 3]
    check(record, pipe.transformer, sparse, planned=SPARSE)


def test_inference_mode_and_no_grad_take_turns():
    """What one run keeps for the next must not be bound to the mode it ran in."""
    pipe = pipelines.sd3()
    expected = fresh(sd3_inputs)
    with ras.enabled(pipe, CONFIG):
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(run(pipe, sd3_inputs(pipe)), expected)


@pytest.mark.parametrize("first", [0, 1])
def test_mode_changes_in_the_middle_of_a_run(first):
    """A loop by hand that enters and leaves inference mode from call to call."""
    pipe = pipelines.sd3()
    inputs, scheduler = sd3_inputs(pipe), pipelines.euler()
    modes = iter(([torch.no_grad, torch.inference_mode] * 5)[first:])

    class Alternating(torch.nn.Module):
        def forward(self, **kwargs):
            with next(modes)():
                return pipe.transformer(**kwargs)

    ras.enable(pipe.transformer, CONFIG, scheduler=scheduler)
    result = loop(Alternating(), scheduler, inputs)
    assert steps_of(pipe.transformer) == (3, 5)
    assert torch.equal(result, fresh(lambda pipe: inputs))


def test_enabling_again_replaces_the_configuration(monkeypatch):
    pipe = pipelines.sd3()
    record = Recorder(monkeypatch, pipe)
    ras.enable(pipe, sample_ratio=0.25, scheduler_start_step=6)
    assert ras.enable(pipe, CONFIG) is pipe
    run(pipe, sd3_inputs(pipe))
    assert steps_of(pipe) == (3, 5)
    assert record.rows[0].shape == (1, 32)
    ras.disable(pipe)
    assert not ras.is_enabled(pipe)
    check(record, pipe.transformer)


@pytest.mark.parametrize("family", ["sd3", "lumina"])
def test_half_precision_runs_and_is_dense_at_ratio_one(family):
    pipe = getattr(pipelines, family)()
    pipe.to(torch.bfloat16)
    inputs = getattr(pipelines, f"{family}_inputs")(pipe, 2)
    inputs = {
        k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in inputs.items()
    }
    expected = run(pipe, inputs)
    with ras.enabled(pipe, CONFIG, sample_ratio=1.0):
        assert torch.equal(run(pipe, inputs), expected)
    with ras.enabled(pipe, CONFIG):
        result = run(pipe, inputs)
        assert steps_of(pipe) == (3, 5)
    assert result.isfinite().all() and result.dtype == expected.dtype
    assert not torch.equal(result, expected)


def test_another_dtype_from_call_to_call():
    pipe = pipelines.sd3()
    halves = {k: v.bfloat16() if torch.is_tensor(v) else v for k, v in sd3_inputs(pipe, 2).items()}
    plain = pipelines.sd3()
    plain.to(torch.bfloat16)
    ras.enable(plain, CONFIG)
    expected = run(plain, halves)
    ras.enable(pipe, CONFIG)
    run(pipe, sd3_inputs(pipe, 2))
    pipe.to(torch.bfloat16)
    assert torch.equal(run(pipe, halves), expected)


def test_autocast():
    """Tokens come in float32, keys and values are kept in bfloat16."""
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe, 2)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(pipe, inputs)
        with ras.enabled(pipe, CONFIG, sample_ratio=1.0):
            assert torch.equal(run(pipe, inputs), expected)
        with ras.enabled(pipe, CONFIG):
            result = run(pipe, inputs)
            assert steps_of(pipe) == (3, 5)
    assert result.isfinite().all() and result.dtype == expected.dtype


def test_autocast_leaves_float64_alone():
    pipe = pipelines.sd3()
    pipe.to(torch.float64)
    inputs = {k: v.double() if torch.is_tensor(v) else v for k, v in sd3_inputs(pipe).items()}
    with ras.enabled(pipe, CONFIG):
        expected = run(pipe, inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(run(pipe, inputs), expected)


def test_autocast_that_begins_in_mid_run(monkeypatch):
    """The step is dense then: what was kept is of another dtype."""
    pipe = pipelines.sd3()
    inputs, model, calls = sd3_inputs(pipe), type(pipe.transformer), []
    plain = model.__call__

    def call(self, *args, **kwargs):
        calls.append(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=len(calls) > 3):
            return plain(self, *args, **kwargs)

    monkeypatch.setattr(model, "__call__", call)
    with ras.enabled(pipe, plan=(1, 1, 0.5, 0.5, 0.5, 1, 0.5, 1)):
        assert run(pipe, inputs).isfinite().all()
        assert steps_of(pipe) == (5, 3)


@pytest.mark.parametrize("plan", [None, (1, 0.5, 0, 1, 0.5, 0)])
def test_a_run_that_leaves_out_the_first_timesteps(plan):
    """As some pipelines do without a word to the scheduler: its first step tells, and is dense.

    So is the second, as the first call was noted at another noise level.
    """
    pipe, scheduler = pipelines.sd3(), pipelines.euler()
    inputs = sd3_inputs(pipe)

    def late(scheduler):
        scheduler.set_timesteps(9)
        return scheduler.timesteps[3:]

    ras.enable(pipe.transformer, speedup=None if plan else 2, plan=plan, scheduler=scheduler)
    for _ in range(2):
        loop(pipe.transformer, scheduler, inputs, timesteps=late)
        run, stats = session_of(pipe.transformer).run, ras.stats(pipe.transformer)
        assert run.clock.stages == tuple(scheduler.sigmas.tolist()[3:]) and run.over
        assert len(stats.plan.shares) == 6 and not session_of(pipe.transformer)._branches
        assert stats.plan.shares == (plan or stats.plan.shares) and stats.plan.shares.count(0) > 1
        done = (stats.steps_dense, stats.steps_sparse, stats.steps_skipped)
        shares = (1, 1, *stats.plan.shares[2:])
        assert done == (shares.count(1), shares.count(0.5), shares.count(0))


@pytest.mark.parametrize("plan", [(1, 0.5, 0, 1, 0.5, 0, 1, 0), (1, 0, 0, 1, 0, 0, 1, 0)])
@pytest.mark.parametrize("at", [0, 1])
def test_a_call_that_is_made_again(plan, at):
    """As by a loop that runs out of memory: nothing of the call that failed is reused."""
    pipe, scheduler = pipelines.sd3(), pipelines.euler()
    inputs, calls = sd3_inputs(pipe), iter(range(100))

    def stop(module, args):
        if next(calls) == at:
            raise Stop

    def again(transformer, *args):
        try:
            return by_keyword(transformer, *args)
        except Stop:
            return by_keyword(transformer, *args)

    dense = loop(pipe.transformer, scheduler, inputs)
    ras.enable(pipe.transformer, plan=plan, scheduler=scheduler)
    expected = loop(pipe.transformer, scheduler, inputs)
    hook = pipe.transformer.proj_out.register_forward_pre_hook(stop)
    found = loop(pipe.transformer, scheduler, inputs, call=again)
    stats = ras.stats(pipe.transformer)
    hook.remove()
    assert stats.steps_skipped == plan.count(0) and stats.calls_total == len(plan) + 1
    if at == 0:
        assert torch.equal(found, expected)
    # noise of nothing, which what failed leaves behind, would be further off than any reuse
    assert relative_error(found, dense) < 2 * relative_error(expected, dense)
    assert torch.equal(loop(pipe.transformer, scheduler, inputs), expected)


@pytest.mark.parametrize("lengths, calls", [((12,) * 8, 5), (range(1, 21), 17)])
def test_calls_that_no_step_follows(lengths, calls):
    """Of one form or of many: all are computed, and soon nothing is kept of them."""
    pipe, scheduler = pipelines.sd3(), pipelines.euler()
    plain = pipelines.sd3().transformer
    ras.enable(pipe.transformer, scheduler=scheduler)
    scheduler.set_timesteps(8)
    with pytest.warns(ras.RASWarning, match=f"called {calls} times with no step"):
        for length in lengths:
            x = sd3_inputs(pipe, text=length)
            call = x["latents"], x["prompt_embeds"], x["pooled_prompt_embeds"], torch.ones(1)
            assert torch.equal(pipe.transformer(*call).sample, plain(*call).sample)
    stats = ras.stats(pipe.transformer)
    assert stats.calls_computed == stats.calls_total == len(lengths)
    assert not session_of(pipe.transformer)._branches and len(stats.warnings) == 1


# --- warnings -------------------------------------------------------------------------------------


def test_run_too_short_for_a_sparse_step():
    """A 4-step run with the default start step is dense and says so once."""
    pipe = pipelines.sd3()
    inputs = sd3_inputs(pipe)
    plain = run(pipe, inputs, steps=4)
    ras.enable(pipe, ras.RASConfig.paper())
    result, told = run_noting_warnings(pipe, inputs, steps=4)
    _, told_again = run_noting_warnings(pipe, inputs, steps=4)
    assert torch.equal(result, plain)
    assert len(told) == 1 and not told_again
    assert ras.stats(pipe).warnings == tuple(told) and steps_of(pipe) == (4, 0)
    ras.enable(pipe, ras.RASConfig.paper())
    assert len(run_noting_warnings(pipe, inputs, steps=4)[1]) == 1
