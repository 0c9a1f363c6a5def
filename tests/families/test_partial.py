"""Steps that compute a part, in whole runs, also with skipped ones among them."""

import itertools

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from support import pipelines
from support.operands import DEVICE, INTERPRETED
from support.oracle import NOBODY
from support.pipelines import Recorder, normal, sd3_inputs
from support.runs import check, check_rows, drift_scores, levels, rows_of, run

import ras
from ras.sessions import session_of

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),  # none but where one is expected
    pytest.mark.usefixtures("no_gradients"),
]

PARTIAL = (1, 1, 0.5, 0.5, 1, 0.25, 0.25, 0.5)
PARTIAL_STEPS = [2, 3, 5, 6, 7]


@pytest.mark.parametrize("stay", [False, True])
@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("sizes", [{}, dict(qk_norm="rms_norm", dual_attention_layers=(0, 1))])
def test_partial_steps(monkeypatch, sizes, carry, stay):
    """With keys and values carried on and without, with text that walks and that stays."""
    pipe = pipelines.sd3(**sizes)
    record = Recorder(monkeypatch, pipe)
    settings = dict(extrapolation=0.62, kv_correction=carry, reuse_text=stay)
    with ras.enabled(pipe, plan=PARTIAL, **settings):
        run(pipe, sd3_inputs(pipe, 2))
        stats = ras.stats(pipe)
    check(record, pipe.transformer, PARTIAL_STEPS, **settings)
    assert [rows.shape[1] for rows in record.rows] == [32, 32, 16, 16, 32]
    tokens = 3 * 64 + 32 + 32 + 16 + 16 + 32
    walks = 3 if stay else 8
    assert (stats.steps_dense, stats.steps_sparse, stats.steps_skipped) == (3, 5, 0)
    assert (stats.tokens_computed, stats.tokens_total) == (4 * tokens, 4 * 8 * 64)
    assert (stats.text_tokens, stats.text_tokens_total) == (4 * 12 * walks, 4 * 12 * 8)
    assert stats.speedup_ceiling == 8 * 76 / (tokens + 12 * walks)
    assert stats.speedup_ceiling == stats.plan.speedup(64, 12, reuse_text=stay)
    assert stats.region_counts.flatten(1).sum(dim=1).tolist() == [tokens, tokens]


@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="kernels round otherwise than layers")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["sd3", "sd3.5", "lumina"])
def test_dense_steps_to_the_bit(family, dtype):
    """Those before the first partial one, whatever layout attention has there."""
    sizes = dict(qk_norm="rms_norm", dual_attention_layers=(0,)) if family == "sd3.5" else {}
    pipe = pipelines.lumina() if family == "lumina" else pipelines.sd3(**sizes)
    pipe.transformer.to(dtype)
    of = pipelines.lumina_inputs if family == "lumina" else sd3_inputs
    inputs = {
        name: value.to(dtype) if getattr(value, "is_floating_point", bool)() else value
        for name, value in of(pipe).items()
    }
    noted = []

    def note(pipe, step, time, given):
        noted.append(given["latents"].clone())
        return given

    run(pipe, inputs, 3, callback_on_step_end=note)
    with ras.enabled(pipe, plan=(1, 1, 0.5)):
        run(pipe, inputs, 3, callback_on_step_end=note)
        assert ras.stats(pipe).steps_sparse == 1
    assert all(map(torch.equal, noted[:2], noted[3:5])) and not torch.equal(noted[2], noted[5])


@pytest.mark.parametrize("carry", [False, True])
def test_partial_steps_of_a_second_order_run(monkeypatch, carry):
    pipe = pipelines.sd3(scheduler=FlowMatchHeunDiscreteScheduler())
    record = Recorder(monkeypatch, pipe)
    settings = dict(extrapolation=0.62, kv_correction=carry)
    with ras.enabled(pipe, plan=PARTIAL, **settings):
        run(pipe, sd3_inputs(pipe, 2))
    check(record, pipe.transformer, PARTIAL_STEPS, order=2, **settings)


@pytest.mark.parametrize("carry", [False, True])
def test_partial_steps_of_lumina(monkeypatch, carry):
    pipe = pipelines.lumina()
    record = Recorder(monkeypatch, pipe)
    settings = dict(extrapolation=0.62, kv_correction=carry)
    with ras.enabled(pipe, plan=PARTIAL, **settings):
        run(pipe, pipelines.lumina_inputs(pipe, 2))
    check(record, pipe.transformer, PARTIAL_STEPS, **settings)


def test_the_active_rows_are_those_that_drift(monkeypatch):
    """From the guided noise that the scheduler got, also across a skipped step."""
    pipe = pipelines.sd3()
    record = Recorder(monkeypatch, pipe)
    shares = (1, 1, 0.5, 0, 0.25, 1, 0.5, 0.5)
    with ras.enabled(pipe, plan=shares):
        run(pipe, sd3_inputs(pipe, 2))
    sigmas, rows, updates = levels(8), iter(record.rows), []
    for step, share in enumerate(shares):
        active = None
        if 0 < share < 1:
            active = next(rows)
            scores = drift_scores(updates, sigmas[step], 16)
            best = scores.argsort(dim=1, descending=True)[:, : int(share * 64)]
            assert torch.equal(active, best.sort(dim=1).values), step
        if share:
            updates.append((sigmas[step], active, record.noises[step]))
    assert len(record.rows) == 4


def text_rows(pipe):
    """The text's keys in each layer's cache."""
    (branch,) = session_of(pipe)._branches.values()
    caches = branch.caches
    return torch.stack([cache._key.rows[:, cache._noise_tokens :] for cache in caches])


@pytest.mark.parametrize("stays", [False, True])
def test_text_rows_stay_as_they_are(stays):
    pipe = pipelines.sd3()
    seen = []

    def look(pipe, step, t, tensors):
        if step < 7:  # after the last one nothing is kept
            seen.append(text_rows(pipe).clone())
        return tensors

    with ras.enabled(pipe, plan=PARTIAL, reuse_text=stays):
        run(pipe, sd3_inputs(pipe, 2), callback_on_step_end=look)
    same = [torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert same == [stays and share < 1 for share in PARTIAL[1:7]]


@pytest.mark.parametrize("stays", [False, True])
def test_control_net_with_partial_and_skipped_steps(monkeypatch, stays):
    pipe = pipelines.sd3_controlnet()
    inputs = sd3_inputs(pipe, control_image=normal(1, 3, 128, 128).sigmoid())
    record = Recorder(monkeypatch, pipe)
    settings = dict(extrapolation=0.62, reuse_text=stays)
    with ras.enabled(pipe, plan=(1, 1, 0.5, 0, 1, 0.25, 0, 0.5), **settings):
        run(pipe, inputs)
        stats = ras.stats(pipe)
    rows = {**rows_of(record, [2, 5, 7]), 3: NOBODY, 6: NOBODY}
    check_rows(record, pipe.transformer, rows, **settings)
    assert (stats.steps_dense, stats.steps_sparse, stats.steps_skipped) == (3, 3, 2)


def test_nothing_is_kept_when_a_run_ends(monkeypatch):
    """Neither caches nor what drift is measured by; interrupted or not."""
    pipe = pipelines.sd3()

    def interrupt(pipe, step, t, tensors):
        pipe._interrupt = step == 3
        return tensors

    with ras.enabled(pipe, plan=(1, 1, 0.5, 0, 1, 0.25, 0, 0.5)):
        for call in ({}, dict(callback_on_step_end=interrupt)):
            run(pipe, sd3_inputs(pipe), **call)
            session = session_of(pipe)
            assert session.run.selection is None and not session._branches
            assert ras.stats(pipe).cache_bytes > 0


@pytest.mark.parametrize("family", ["sd3", "lumina"])
def test_half_precision(family):
    pipe = getattr(pipelines, family)()
    pipe.to(torch.bfloat16)
    inputs = {
        k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in getattr(pipelines, f"{family}_inputs")(pipe, 2).items()
    }
    with ras.enabled(pipe, plan=(1, 1, 0.5, 0, 1, 0.25, 0, 0.5), reuse_text=True):
        result = run(pipe, inputs)
        assert ras.stats(pipe).steps_skipped == 2
    assert result.dtype == torch.bfloat16 and result.isfinite().all()
