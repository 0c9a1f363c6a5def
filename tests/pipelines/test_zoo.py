"""Plans of whole steps on every pipeline of the zoo.

A skipped call is held to what two calls of the same branch gave before. Which call is of which
branch is found by what it is conditioned on, not by the order in which `ras` counts them.
"""

import warnings
from collections import defaultdict
from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from support.oracle import carried_on, gain, position
from support.zoo import ENTRIES, REFUSED
from torch.utils._pytree import tree_leaves

import ras
from ras.families import FAMILIES
from ras.sessions import session_of

STEPS = 8
DENSE = {"sky-reels-forcing", "sky-reels-causal"}  # whose own scheduler nobody steps
ALL_COMPUTED = {  # first calls of a branch, late, in a step that the plan would skip
    "ace-step-interval",
    "flux2-klein-kv",
    "qwen21",
    "z-image-truncated",
}
pytestmark = pytest.mark.usefixtures("no_gradients")


class Calls:
    """Notes each call of a pipeline's transformers from outside of them."""

    def __init__(self, monkeypatch, pipe, entry):
        self.made, self.steps, self.guided = [], 0, []
        models = [getattr(pipe, name) for name in entry.transformers]
        for model in models:
            model.register_forward_pre_hook(self.begin, with_kwargs=True)
            first = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
            first[0].register_forward_pre_hook(self.compute)
            model.register_forward_hook(self.end)
        step = type(pipe.scheduler).step

        @wraps(step)
        def counted(scheduler, *args, **kwargs):
            if scheduler is pipe.scheduler:
                self.steps += 1
                self.guided.append((args[0] if args else kwargs["model_output"]).clone())
            return step(scheduler, *args, **kwargs)

        monkeypatch.setattr(type(pipe.scheduler), "step", counted)

    def begin(self, model, args, kwargs):
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        sums = [(tuple(leaf.shape), leaf.double().abs().sum().item()) for leaf in leaves]
        texts = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, str | bool)]
        call = SimpleNamespace(model=id(model), sums=sums, texts=texts)
        call.computed, call.step = False, self.steps
        self.made.append(call)

    def compute(self, *_):
        if self.made and not hasattr(self.made[-1], "output"):  # a ControlNet may share the block
            self.made[-1].computed = True

    def end(self, model, args, output):
        leaves = [leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf)]
        self.made[-1].output = [leaf.clone() for leaf in leaves]

    def branches(self):
        """What each call is conditioned on: those inputs that are the same from step to step."""
        values, steps = defaultdict(set), defaultdict(set)
        for call in self.made:
            call.form = call.model, *(shape for shape, _ in call.sums)
            steps[call.form].add(call.step)
            for at, (_, total) in enumerate(call.sums):
                values[call.form, at].add(total)
        for call in self.made:
            constant = [
                total
                for at, (_, total) in enumerate(call.sums)
                if len(values[call.form, at]) < len(steps[call.form])
            ]
            call.branch = call.form, tuple(constant), tuple(call.texts)


def check_skipped(calls, session):
    """Each skipped call gives what the last two of its branch lead to."""
    calls.branches()
    stages, checked, dense = session.run.clock.stages, 0, {}
    for call in calls.made:
        dense.setdefault(call.step, call.computed)
    for at, call in enumerate(calls.made):
        if call.computed:
            continue
        before = [c for c in calls.made[:at] if c.computed and c.branch == call.branch]
        assert before, "nothing of this branch was computed before"
        now, last = position(stages[call.step]), before[-1]
        steps = [step for step in range(call.step) if dense[step]]
        seen = [(step, position(stages[step]), calls.guided[step]) for step in steps]
        shares = carried_on(seen, now, first=0.0)[1]  # there are few steps
        older = [c for c in before if stages[c.step] != stages[last.step]][-1:]
        for leaf, (index, kept) in zip(call.output, enumerate(last.output)):
            expected = kept
            if older and kept.is_floating_point():
                t1, t0 = position(stages[last.step]), position(stages[older[0].step])
                g = gain(abs(now - t1), abs(t1 - t0), 0.625).to(kept)
                share = shares if len(shares) == 1 else shares.repeat(len(kept) // len(shares))
                if kept.numel() == calls.guided[0][0].numel():  # a list, of a sample each
                    share = shares[index % len(shares)].reshape(1)
                share = share.to(kept).reshape(-1, *[1] * (kept.ndim - 1))
                expected = kept + share * g * (kept - older[0].output[index])
            torch.testing.assert_close(leaf, expected, rtol=1e-4, atol=1e-5)
            checked += 1
    return checked


def marks(pipe, entry):
    """The names of all that `ras` or anybody else has put on the objects themselves."""
    models = [getattr(pipe, name) for name in entry.transformers]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in models]
    return [sorted(vars(thing)) for thing in (*models, pipe.scheduler)], hooks


def same(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ENTRIES)
def test_whole_steps(name, monkeypatch):
    entry = ENTRIES[name]
    pipe, run = entry.build()
    calls = Calls(monkeypatch, pipe, entry)
    dense = tree_leaves(run(STEPS))
    assert dense and all(latents.isfinite().all() for latents in dense)
    assert len(calls.made) == entry.forwards(STEPS) and calls.steps == entry.steps(STEPS)
    assert all(call.computed for call in calls.made)
    before = marks(pipe, entry)

    ras.enable(pipe, speedup=1)
    assert same(tree_leaves(run(STEPS)), dense)
    assert ras.stats(pipe).steps_skipped == 0

    ras.enable(pipe, speedup=2)
    calls.made.clear()
    calls.steps = 0
    calls.guided.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = tree_leaves(run(STEPS))
    told = [w for w in caught if issubclass(w.category, ras.RASWarning)]
    stats, session = ras.stats(pipe), session_of(pipe)
    assert len(calls.made) == entry.forwards(STEPS)
    assert [f.shape for f in found] == [d.shape for d in dense]
    assert all(latents.isfinite().all() for latents in found)
    if name in DENSE:
        assert len(told) == 1 and same(found, dense) and stats.calls_computed == stats.calls_total
    else:
        assert not told, told[0].message
        assert not same(found, dense)
        steps = session.run.clock.steps
        assert stats.steps_dense + stats.steps_skipped == steps and not stats.steps_sparse
        late = name in ALL_COMPUTED
        assert stats.steps_dense == steps // 2 + late
        last_run = calls.made[-stats.calls_total :]
        assert sum(call.computed for call in last_run) == stats.calls_computed
        if not stats.tokens_total:
            assert stats.speedup_ceiling == stats.calls_total / stats.calls_computed
        assert not session._branches  # freed by the last step, before anything is decoded
        assert stats.cache_bytes > 0 and stats.runs >= 1 and str(stats)
        assert name == "flux-img2img" or ras.plan(pipe, STEPS).plan == stats.plan
        if name not in ("helios", "cosmos", "sd3-heun"):  # several runs, steps taken twice, Heun
            assert check_skipped(calls, session)

    ras.disable(pipe)
    assert marks(pipe, entry) == before and not ras.is_enabled(pipe)
    assert same(tree_leaves(run(STEPS)), dense)


@pytest.mark.parametrize("name", [name for name in ENTRIES if ENTRIES[name].two is not None])
def test_two_samples(name, monkeypatch):
    """Unlike, and as many calls and steps as for one."""
    entry = ENTRIES[name]
    pipe, run = entry.build()
    calls = Calls(monkeypatch, pipe, entry)
    leaves = tree_leaves(run(4, **entry.two))
    assert len(calls.made) == entry.forwards(4) and calls.steps == entry.steps(4)
    for latents in leaves:
        first, second = latents
        assert latents.isfinite().all() and (first - second).abs().max() > 1e-3


def test_why_there_are_not_two_samples():
    assert all(entry.note for entry in ENTRIES.values() if entry.two is None)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_plan_before_any_run(name):
    """Of as many steps, and nothing is changed; places are the run's own if the scheduler's are."""
    pipe, run = ENTRIES[name].build()
    timesteps = pipe.scheduler.timesteps
    planned = ras.plan(pipe, 12)
    assert pipe.scheduler.timesteps is timesteps and planned.warning is None
    assert planned.plan.shares.count(1) == planned.plan.shares.count(0) == 6
    assert planned.speedup == 2 and "step  11" in str(planned)
    if name in ("wan", "sana", "cogvideox", "pixart-dpm", "sana-sprint", "stable-audio"):
        with ras.enabled(pipe):
            run(12)
            assert ras.stats(pipe).plan == planned.plan


@pytest.mark.parametrize("name", ["prx", "sana-video", "longcat-audio"])
def test_a_bare_transformer(name):
    """With its scheduler it is what the pipeline is."""
    pipe, run = ENTRIES[name].build()
    with ras.enabled(pipe, speedup=2):
        expected = tree_leaves(run(STEPS))
    with ras.enabled(pipe.transformer, scheduler=pipe.scheduler, speedup=2):
        assert same(tree_leaves(run(STEPS)), expected)
        assert ras.stats(pipe.transformer).steps_skipped == STEPS // 2
    with pytest.raises(ValueError, match="scheduler="):
        ras.enable(pipe.transformer)


@pytest.mark.parametrize(
    "setting, value",
    [("mask", torch.ones(8, 8)), ("sample_ratio", 0.5), ("plan", (1, 0.5, 1, 0))],
)
def test_partial_steps_are_refused_where_there_are_none(setting, value):
    pipe, _ = ENTRIES["prx"].build()
    before = marks(pipe, ENTRIES["prx"])
    with pytest.raises(ValueError, match=rf"{setting}=.*PRXPipeline.*speedup="):
        ras.enable(pipe, **{setting: value})
    assert marks(pipe, ENTRIES["prx"]) == before
    ras.enable(pipe, speedup=3, error_reset_steps=(5,), mask=False)
    assert ras.plan(pipe, STEPS).plan.shares.count(1) == 3


@pytest.mark.parametrize("steps, speedup, dense", [(8, 3, 3), (7, 2, 4), (5, 50, 1), (28, 1.5, 19)])
def test_the_nearest_number_of_whole_steps(steps, speedup, dense):
    """With a warning where it is not near."""
    pipe, run = ENTRIES["prx"].build()
    ras.enable(pipe, speedup=speedup)
    planned = ras.plan(pipe, steps)
    assert planned.plan.shares.count(1) == dense and set(planned.plan.shares) == {0, 1}
    assert planned.speedup == steps / dense and "whole outputs" in str(planned)
    far = abs(planned.speedup / speedup - 1) > 0.03
    assert (planned.warning is not None) == far
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(steps)
    assert any(issubclass(w.category, ras.RASWarning) for w in caught) == far
    assert ras.stats(pipe).steps_dense == dense


def test_other_runs():
    _, call = ENTRIES["flux-true-cfg"].build()
    latents = call(STEPS)
    assert not torch.equal(latents, call(STEPS + 1))
    assert not torch.equal(latents, call(STEPS, true_cfg_scale=2.0))
    assert torch.equal(latents, call(STEPS))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """By name and with the reason, before anything is changed."""
    entry = REFUSED[name]
    pipe, call = entry.build()
    reason = {"UNet": "a UNet", "discrete": "discrete", "no scheduler": "no scheduler"}[entry.note]
    for refuse in (ras.enable, lambda pipe: ras.plan(pipe, 8), ras.compile_repeated_blocks):
        with pytest.raises(ValueError, match=reason) as raised:
            refuse(pipe)
        assert type(pipe).__name__ in str(raised.value)
    assert call is None or tree_leaves(call(2))


def test_the_table_tells_of_what_is_tested():
    """Every pipeline of the zoo stands in it, and no other."""
    listed = {(family.model, pipe) for family in FAMILIES for pipe in family.pipelines}
    found = set()
    for entry in ENTRIES.values():
        pipe, _ = entry.build()
        model = type(getattr(pipe, entry.transformers[0])).__name__
        found.add((model, type(pipe).__name__.removesuffix("Pipeline")))
    assert found == listed
    dense = {pipe for family in FAMILIES if not family.skips for pipe in family.pipelines}
    assert dense == {"SkyReelsV2DiffusionForcing"}
