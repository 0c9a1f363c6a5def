"""Settings for a block: what runs in it do, and that nothing else has changed."""

import contextlib
import contextvars
import threading

import numpy as np
import pytest
import torch
from support import pipelines
from support.pipelines import sd3_inputs
from support.runs import run
from support.zoo import ENTRIES

import ras
from ras.mount import Mount

PLAN = (1, 1, 0.5, 0, 1, 0.25, 0.5, 0)
MASK = np.zeros((128, 128), np.float32)
MASK[32:64, 48:96] = 1
OTHER = MASK.T.copy()
ASKED = [
    dict(speedup=1.5),
    dict(plan=PLAN),
    dict(plan=PLAN, kv_correction=False),
    dict(plan=PLAN, extrapolation=0.0, reuse_text=True, metric="std"),
    dict(plan=PLAN, keep_caches=True),
    dict(sample_ratio=0.5, mask=MASK, mask_margin=0),
    dict(speedup=2, mask=OTHER),
    dict(speedup=2, sample_ratio=0.5, max_cache_bytes=60_000),
    dict(speedup=1),
]

pytestmark = [
    pytest.mark.filterwarnings("ignore::ras.RASWarning"),  # of so few steps
    pytest.mark.usefixtures("no_gradients"),
]


def small_sd3():
    pipe = pipelines.sd3()
    return pipe, sd3_inputs(pipe)


def processors(pipe):
    parts = pipe.transformer.named_modules()
    return {name: part.processor for name, part in parts if hasattr(part, "processor")}


def told(stats):
    """What a run did, but for how many there were before."""
    return stats.config, stats.steps, stats.cache_bytes, stats.walked.tolist()


@pytest.mark.parametrize("base", [{}, dict(plan=PLAN, mask=OTHER), dict(speedup=2, mask=False)])
def test_runs_are_those_of_a_pipeline_enabled_so(base):
    """One after the other, on what is enabled once; afterwards all is as it was."""
    pipe, inputs = small_sd3()
    expected = []
    for asked in ({}, *ASKED):
        enabled = {"mask": base.get("mask"), **asked} if asked else base
        with ras.enabled(pipe, **enabled):
            expected.append((run(pipe, inputs), told(ras.stats(pipe))))
    ras.enable(pipe, **base)
    mount = Mount.of(pipe.transformer)
    placed = processors(pipe)
    for asked, (image, stats) in zip(ASKED, expected[1:]):
        with ras.settings(pipe, ras.RASConfig(), **asked) as same:
            assert same is pipe and torch.equal(run(pipe, inputs), image)
        assert told(ras.stats(pipe)) == stats, "told of after the block, too"
        assert torch.equal(run(pipe, inputs), expected[0][0])
        assert told(ras.stats(pipe)) == expected[0][1]
    assert ras.stats(pipe).runs == 2 * len(ASKED) and Mount.of(pipe.transformer) is mount
    assert processors(pipe) == placed


def test_fields_that_are_not_named_stay():
    pipe, inputs = small_sd3()
    others = dict(metric="std", mask_margin=0)
    ras.enable(pipe, plan=PLAN, mask=MASK, **others)
    with ras.settings(pipe, reuse_text=True):
        assert ras.plan(pipe, 8).config == ras.RASConfig(plan=PLAN, reuse_text=True, **others)
        with ras.settings(pipe, speedup=2):  # in the place of the plan
            run(pipe, inputs)
            assert ras.stats(pipe).config == ras.RASConfig(2, reuse_text=True, **others)
            assert ras.stats(pipe).steps_sparse, "under the mask"
        with ras.settings(pipe, speedup=2, mask=None):
            run(pipe, inputs)
            assert not ras.stats(pipe).steps_sparse
        assert ras.plan(pipe, 8).config.plan == ras.Plan(PLAN)
    assert not ras.plan(pipe, 8).config.reuse_text


@pytest.mark.parametrize(
    "asked, error",
    [
        (dict(speedup=0.5), "at least 1"),
        (dict(speed=2), "no option of RASConfig"),
        (dict(mask=np.zeros((4, 4))), "nothing under it"),
        (dict(mask="photo.png"), "mask must be"),
        (dict(config="fast"), "config must be"),
        (dict(plan=ras.Plan((1, 0), made_for={"transformer.class": "Another"})), "another model"),
    ],
)
def test_errors_change_nothing(asked, error):
    pipe, inputs = small_sd3()
    ras.enable(pipe, plan=PLAN)
    expected = run(pipe, inputs)
    with pytest.raises((TypeError, ValueError), match=error), ras.settings(pipe, **asked):
        raise AssertionError
    assert torch.equal(run(pipe, inputs), expected)


def test_what_cannot_be():
    pipe, _ = ENTRIES["sana"].build()  # without partial steps
    with pytest.raises(ValueError, match=r"not enabled; call ras\.enable"), ras.settings(pipe):
        raise AssertionError
    ras.enable(pipe, speedup=2)
    with pytest.raises(ValueError, match="not known for Sana"), ras.settings(pipe, mask=MASK):
        raise AssertionError
    pipe, _ = small_sd3()
    ras.enable(pipe, speedup=2)
    with (
        ras.settings(pipe, speedup=3),
        pytest.raises(ValueError, match=r"outside of ras\.settings"),
    ):
        ras.learn(pipe, num_inference_steps=8)


def test_a_block_is_of_its_thread():
    """Another one's runs, one after the other, are by its own settings, or those of `enable`."""
    pipe, inputs = small_sd3()
    found = {}
    for speedup in (1.5, 2, 3):
        with ras.enabled(pipe, speedup=speedup):
            found[speedup] = run(pipe, inputs)
    assert not torch.equal(found[1.5], found[2])
    ras.enable(pipe, speedup=2)
    lock, inside, results = threading.Lock(), threading.Barrier(3), {}

    def serve(speedup):
        block = ras.settings(pipe, speedup=speedup) if speedup else contextlib.nullcontext()
        with torch.no_grad(), block:
            inside.wait(60)  # all of them are in their blocks
            with lock:
                results[speedup] = run(pipe, inputs), ras.stats(pipe).config.speedup

    threads = [threading.Thread(target=serve, args=(speedup,)) for speedup in (1.5, 3, None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for speedup, (image, of) in results.items():
        assert of == (speedup or 2) and torch.equal(image, found[of])
    assert len(results) == 3


def test_a_block_that_begins_in_a_run_is_for_the_next():
    pipe, inputs = small_sd3()
    with ras.enabled(pipe, speedup=1.5):
        slow = run(pipe, inputs)
    ras.enable(pipe, plan=PLAN)
    alone, blocks = run(pipe, inputs), contextlib.ExitStack()

    def begin(pipe, step, t, tensors):
        if step == 2:
            blocks.enter_context(ras.settings(pipe, speedup=1.5, extrapolation=0.0))
            blocks.enter_context(ras.settings(pipe, ras.RASConfig(1.5)))
        return tensors

    assert torch.equal(run(pipe, inputs, callback_on_step_end=begin), alone)
    with blocks:
        assert torch.equal(run(pipe, inputs), slow)
    assert torch.equal(run(pipe, inputs), alone)


def test_a_block_may_end_in_another_context():
    """As dependencies of servers do."""
    pipe, _ = small_sd3()
    ras.enable(pipe, speedup=2)
    block = ras.settings(pipe, speedup=3)
    contextvars.copy_context().run(block.__enter__)
    assert ras.plan(pipe, 8).config.speedup == 2
    block.__exit__(None, None, None)
    with ras.settings(pipe, speedup=4):
        ras.enable(pipe, speedup=5)
        assert ras.plan(pipe, 8).config.speedup == 5
        ras.disable(pipe)
    assert not ras.is_enabled(pipe)


def test_an_inpainting_pipelines_own_mask():
    """It is taken in a block where it is not otherwise, and the other way round."""
    pipe, draw = ENTRIES["sd3-inpaint"].build()
    expected = {}
    for mask in (None, False):
        with ras.enabled(pipe, plan=PLAN, mask=mask):
            expected[mask] = draw(8)
    assert not torch.equal(expected[None], expected[False])
    for base, asked in ((None, False), (False, None)):
        ras.enable(pipe, plan=PLAN, mask=base)
        with ras.settings(pipe, mask=asked):
            assert torch.equal(draw(8), expected[asked])
        assert torch.equal(draw(8), expected[base])


@pytest.mark.parametrize("keep_caches", [False, True])
@pytest.mark.parametrize("limit", [150_000, 250_000])
def test_a_limit_for_caches_counts_those_of_the_run(limit, keep_caches):
    """A run after a larger one, for which there was less room, is as it is alone."""
    pipe, inputs = small_sd3()
    small = {**inputs, **sd3_inputs(pipe, height=8, width=8)}
    asked = dict(plan=PLAN, max_cache_bytes=limit, keep_caches=keep_caches)
    alone = []
    for each in (small, inputs):
        with ras.enabled(pipe, **asked):
            alone.append((run(pipe, each), ras.stats(pipe).cache_bytes))
    ras.enable(pipe, **asked)
    for each, (image, bytes_alone) in zip((inputs, small, inputs, small), alone[::-1] * 2):
        assert torch.equal(run(pipe, each), image)
        assert ras.stats(pipe).cache_bytes == bytes_alone
