"""Runs that compute what an edit changes, against the oracle."""

from functools import partial
from unittest import mock

import pytest
import torch
from support.edits import EDITED, LARGE, SMALL, STEPS, TWO, kontext, noted, regions
from support.oracle import NOBODY, relative_error
from support.runs import by_oracle
from support.zoo import ENTRIES, flux, packed
from support.zoo.flux import flux2
from support.zoo.packed import qwen_edit
from support.zoo.parts import pil, square

import ras
from ras.policy import edits

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]

PIPELINES = {
    "kontext": kontext,
    "qwen": qwen_edit,
    "qwen, two pictures of unlike shape": partial(
        qwen_edit, "QwenImageEditPlusPipeline", image=[pil(64, 112), pil()]
    ),
    "FLUX.2, a small picture": partial(flux2, image=[pil()], **square()),
    "FLUX.2 Klein": partial(flux2, "Flux2KleinPipeline", False, True, image=[pil()]),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_run(name):
    """Two samples with regions of their own: it is the oracle's, and of the speed-up asked for."""
    settings = dict(speedup=2.5, extrapolation=0.62)
    latents, rows, stats, under = noted(*PIPELINES[name](), **settings)
    shares = stats.plan.shares
    partial_steps = [step for step, share in enumerate(shares) if 0 < share < 1]
    assert partial_steps == list(rows) and len(rows) >= 2 and min(rows) >= 2
    assert stats.steps_sparse == len(rows)
    assert stats.speedup_ceiling == pytest.approx(2.5, rel=0.08)
    assert stats.edited.shape[0] == 2 and stats.edited.flatten(1).sum(1).tolist() == [6, 4]
    for chosen in rows.values():
        assert chosen.shape == (2, 6)  # of 64, in thirty-seconds
        for row, mine in zip(chosen, stats.edited.flatten(1), strict=True):
            assert set(mine.nonzero().flatten().tolist()) <= set(row.tolist())

    pipe, call = PIPELINES[name]()
    for_oracle = [rows.get(step, None if share else NOBODY) for step, share in enumerate(shares)]
    by_oracle(pipe, for_oracle, extrapolation=0.62, under=under)
    assert relative_error(latents, call(STEPS, **TWO)) < 1e-5


WIDE = {
    "kontext": (
        flux.FLUX,
        dict(num_attention_heads=24, attention_head_dim=128, axes_dims_rope=(16, 56, 56))
        | dict(num_layers=1, num_single_layers=1),
    ),
    "qwen, two pictures of unlike shape": (
        packed.QWEN,
        dict(num_attention_heads=24, attention_head_dim=128, axes_dims_rope=(16, 56, 56))
        | dict(num_layers=1),
    ),
    "FLUX.2, a small picture": (
        flux.FLUX,
        dict(num_attention_heads=48, attention_head_dim=128, num_layers=0, num_single_layers=1),
    ),
}


@pytest.mark.parametrize("name", WIDE)
def test_run_at_true_width(name):
    """What the published models have of heads and of channels in them, with one layer of a kind."""
    config, width = WIDE[name]
    with mock.patch.dict(config, width):
        pipe, call = PIPELINES[name]()
    latents, rows, stats, under = noted(pipe, call, steps=6, speedup=2, extrapolation=0.625)
    assert stats.steps_sparse == len(rows) > 0
    shares = stats.plan.shares
    for_oracle = [rows.get(step, None if share else NOBODY) for step, share in enumerate(shares)]
    by_oracle(pipe, for_oracle, extrapolation=0.625, under=under)
    assert relative_error(latents, call(6, **TWO)) < 1e-5


def test_an_edit_of_most_of_the_image_is_planned_by_whole_steps():
    latents, rows, stats, _ = noted(*kontext(), LARGE, speedup=2)
    assert rows == {} and stats.steps_sparse == 0 and "whole steps" in str(stats)
    assert stats.speedup_ceiling == pytest.approx(2, rel=0.04)
    pipe, call = kontext()
    with ras.enabled(pipe, plan=stats.plan):
        assert relative_error(latents, call(STEPS, **TWO)) < 1e-5


def test_nothing_edited_is_planned_by_whole_steps():
    _, rows, stats, _ = noted(*kontext(), ((0, 0, 0, 0),) * 2, speedup=2)
    assert rows == {} and stats.speedup_ceiling == pytest.approx(2, rel=0.04)


def test_an_edit_that_grows_is_planned_anew():
    """From the step on in which it is known, and what was computed before is paid for."""
    boxes = iter([SMALL] * 3 + [LARGE] * STEPS)

    def found(*args):
        with regions(*next(boxes)):
            return edits.edited(*args)

    pipe, call = kontext()
    with mock.patch.object(edits, "edited", found), ras.enabled(pipe, **EDITED):
        call(STEPS, **TWO)
        stats = ras.stats(pipe)
    _, _, small, _ = noted(*kontext(), speedup=2)
    shares, before = stats.plan.shares, small.plan.shares
    changes = [step for step in range(STEPS) if shares[step] != before[step]]
    assert stats.edited.sum() > 64 and changes and min(changes) > before.index(6 / 64)
    assert stats.speedup_ceiling == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        dict(speedup=2),
        dict(mask=False, speedup=2, sample_ratio="edited"),
        dict(speedup=1),
        dict(plan=[1.0, 1.0] + [0.0, 1.0] * 5),
        dict(mask=torch.ones(8, 8), speedup=2),
    ],
)
def test_who_asks_for_something_else_gets_that(settings):
    pipe, call = kontext()
    with (
        mock.patch.object(edits, "edited", side_effect=AssertionError),
        ras.enabled(pipe, **settings),
    ):
        call(STEPS)
        assert ras.stats(pipe).edited is None or "mask" in settings


@pytest.mark.parametrize("name", ["flux", "qwen", "flux-kontext", "sd3", "z-image-padded"])
def test_runs_without_a_picture_of_the_images_shape(name):
    """They are as they were; the picture of "flux-kontext" is half as wide again."""
    pipe, call = ENTRIES[name].build()
    with ras.enabled(pipe, **EDITED):
        with pytest.warns(ras.RASWarning, match="no picture of the image's shape"):
            latents = call(STEPS)
        assert ras.stats(pipe).edited is None and len(ras.stats(pipe).warnings) == 1
    with ras.enabled(pipe, speedup=2, mask=False):
        assert torch.equal(latents, call(STEPS))


def test_runs_know_nothing_of_each_other():
    """An edit of the same picture, after others, is what it is alone."""
    pipe, call = kontext()
    with ras.enabled(pipe, speedup=2.5, sample_ratio="edited"):
        with regions(*SMALL):
            first = call(STEPS, **TWO)
        with regions(*LARGE):
            call(STEPS, **TWO)
        call(STEPS)
        with regions(*SMALL):
            assert torch.equal(first, call(STEPS, **TWO))


def test_the_host_reads_a_step_late(monkeypatch):
    """How much is edited is read once a step has been asked for since."""
    pipe, call = kontext()
    events, observe, learn = [], edits.Edit.observe, edits.Edit.learn_count
    step = type(pipe.scheduler).step

    def note(what, method):
        def noted(*args, **kwargs):
            found = method(*args, **kwargs)
            if what != "read" or found:
                events.append(what)
            return found

        return noted

    monkeypatch.setattr(edits.Edit, "observe", note("seen", observe))
    monkeypatch.setattr(edits.Edit, "learn_count", note("read", learn))
    monkeypatch.setattr(type(pipe.scheduler), "step", note("step", step))
    with regions(*SMALL), ras.enabled(pipe, **EDITED):
        call(STEPS, **TWO)
    assert events[:4] == ["step", "seen", "step", "read"] and events.count("read") == 1


# --- papers' schedules ---------------------------------------------------------------------------


@pytest.mark.parametrize("paper", [ras.RASConfig.regione, ras.RASConfig.spotedit])
@pytest.mark.parametrize("name", ["kontext", "qwen, two pictures of unlike shape"])
def test_the_schedule_of_a_paper(paper, name):
    """Regions are computed in all steps but those that are dense; it is the oracle's run."""
    config = paper(scheduler_start_step=3, error_reset_steps=(7,), preserve=False)
    latents, rows, stats, under = noted(*PIPELINES[name](), config=config)
    end = config.scheduler_end_step or STEPS
    assert list(rows) == [step for step in range(3, STEPS) if step != 7 and step <= end]
    assert {chosen.shape for chosen in rows.values()} == {(2, 6)}
    assert stats.steps_dense == STEPS - len(rows)
    pipe, call = PIPELINES[name]()
    by_oracle(
        pipe,
        [rows.get(step) for step in range(STEPS)],
        kv_correction=False,
        reuse_text=config.reuse_text,
        under=under,
    )
    assert relative_error(latents, call(STEPS, **TWO)) < 1e-5


def test_the_schedule_of_a_paper_without_a_picture():
    pipe, call = ENTRIES["flux"].build()
    dense = call(STEPS)
    told = pytest.warns(ras.RASWarning, match="no picture of the image's shape")
    with ras.enabled(pipe, sample_ratio="edited"), told:
        assert torch.equal(call(STEPS), dense)


@pytest.mark.parametrize("ratio", ["edit", "", 0, 1.5, True, "0.5"])
def test_other_ratios_are_refused(ratio):
    with pytest.raises((TypeError, ValueError), match="sample_ratio"):
        ras.RASConfig(sample_ratio=ratio)
