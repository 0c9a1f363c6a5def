"""Runs that compute what an edit changes, against the oracle; and what is kept of the picture."""

import functools
from functools import partial
from unittest import mock

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image
from support.oracle import NOBODY, relative_error
from support.runs import by_oracle
from support.zoo import ENTRIES, flux, packed
from support.zoo.flux import flux2, flux_with_vae
from support.zoo.packed import qwen_edit
from support.zoo.parts import SIDE, picture, pil, square

import ras
from ras.policy import edits
from ras.policy.selection import Selection
from ras.references import references_under
from ras.session import Session
from ras.sessions import session_of

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]

STEPS = 12
EDITED = dict(speedup=2, sample_ratio="edited")
TWO = dict(num_images_per_prompt=2)


def kontext(**inputs):
    picture_ = picture(SIDE, SIDE)
    return flux_with_vae(
        "FluxKontextPipeline", image=picture_, _auto_resize=False, max_area=SIDE**2, **inputs
    )


PIPELINES = {
    "kontext": kontext,
    "qwen": qwen_edit,
    "qwen, two pictures of unlike shape": partial(
        qwen_edit, "QwenImageEditPlusPipeline", image=[pil(64, 112), pil()]
    ),
    "FLUX.2, a small picture": partial(flux2, image=[pil()], **square()),
    "FLUX.2 Klein": partial(flux2, "Flux2KleinPipeline", False, True, image=[pil()]),
}


def regions(*boxes):
    """A stand-in for `edited`: the samples' boxes (y, x, height, width), call by call the same."""

    def found(scores, rms, grid, margin):
        assert scores.shape[0] == len(boxes) and margin == 1
        marked = torch.zeros(len(boxes), *grid, dtype=torch.bool)
        for each, (y, x, height, width) in zip(marked, boxes, strict=True):
            each[y : y + height, x : x + width] = True
        return marked.flatten(1)

    return mock.patch.object(edits, "edited", found)


SMALL = (1, 2, 2, 3), (4, 4, 2, 2)  # of two samples
LARGE = (0, 0, 8, 8), (4, 4, 2, 2)


def noted(pipe, call, boxes=SMALL, more=TWO, steps=STEPS, **settings):
    """Latents, the rows of each partial step by step, and the statistics of a run."""
    rows, choose = {}, Selection.choose
    if not {"config", "plan", "sample_ratio"} & settings.keys():
        settings |= dict(sample_ratio="edited")

    def choosing(selection, *args, **kwargs):
        chosen = choose(selection, *args, **kwargs)
        rows[session.run.step] = chosen.clone()
        return chosen

    with regions(*boxes), ras.enabled(pipe, **settings):
        (session,) = [m for m in pipe.transformer._ras_mount.sessions]
        with mock.patch.object(Selection, "choose", choosing):
            latents = call(steps, **more)
        under = partial(references_under, layout=session.run.planned.layout)
        return latents, rows, ras.stats(pipe), under


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


# --- preserve -------------------------------------------------------------------------------------


def picture_latents(pipe, call):
    """The picture's tokens, as the transformer is given them."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    call(1, **TWO)
    hook.remove()
    return seen[0][:, 64:]


@pytest.mark.parametrize("scheduler", [None, UniPCMultistepScheduler])
def test_what_is_not_edited_stays_to_the_bit(scheduler):
    pipe, call = kontext()
    if scheduler is not None:
        pipe.scheduler = scheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    picture_ = picture_latents(pipe, call)
    with regions(*SMALL), ras.enabled(pipe, **EDITED):
        free = call(STEPS, **TWO)
    latents, _, stats, _ = noted(pipe, call, speedup=2, preserve=True)
    outside = ~stats.edited.flatten(1)
    assert torch.equal(latents[outside], picture_[outside])
    assert not torch.equal(free[outside], picture_[outside])
    assert not torch.equal(latents[~outside], picture_[~outside])


def test_what_a_mask_leaves_out_stays():
    pipe, call = kontext()
    picture_ = picture_latents(pipe, call)
    mask = torch.zeros(SIDE, SIDE)
    mask[:40, :40] = 1
    with ras.enabled(pipe, speedup=2, mask=mask, preserve=True):
        latents = call(STEPS, **TWO)
        stats = ras.stats(pipe)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:4, :4] = True  # 3 x 3 regions and the margin
    assert (stats.edited == expected).all()
    outside = ~stats.edited.flatten(1).expand(2, -1)
    assert torch.equal(latents[outside], picture_[outside])


@pytest.mark.parametrize(
    "settings", [dict(speedup=1), dict(plan=[1.0, 0.0] * 6), dict(sample_ratio=None)]
)
def test_whole_runs_preserve_too(settings):
    pipe, call = kontext()
    picture_ = picture_latents(pipe, call)
    latents, _, stats, _ = noted(pipe, call, preserve=True, **settings)
    outside = ~stats.edited.flatten(1)
    assert torch.equal(latents[outside], picture_[outside])


@pytest.mark.parametrize("margin", [0, 1])
def test_a_picture_in_the_channels_stays_beside_the_mask(margin):
    """As the model gets it; the mask's own regions are free, with a margin for the seam or none."""
    pipe, call = ENTRIES["flux-fill"].build()
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, 40, 40))
    given, prepare = [], type(pipe).prepare_mask_latents

    @functools.wraps(prepare)
    def noted(self, *args, **kwargs):
        prepared = prepare(self, *args, **kwargs)
        given.append(prepared[1])
        return prepared

    with mock.patch.object(type(pipe), "prepare_mask_latents", noted):
        with ras.enabled(pipe, speedup=2, mask_margin=margin):
            free = call(STEPS, mask_image=mask)
        with ras.enabled(pipe, speedup=2, mask_margin=margin, preserve=True):
            latents, stats = call(STEPS, mask_image=mask), ras.stats(pipe)
    inside = stats.edited[0]
    expected = torch.zeros_like(inside)
    expected[: 3 + margin, : 3 + margin] = True
    assert torch.equal(inside, expected) and stats.warnings == ()
    inside = inside.flatten()
    picture_ = given[-1][:, :, : latents.shape[-1]]
    assert torch.equal(latents[:, ~inside], picture_[:, ~inside])
    own = torch.zeros_like(expected)
    own[:3, :3] = True
    assert torch.equal(latents[:, own.flatten()], free[:, own.flatten()])


def test_latents_in_a_list_have_no_picture_in_their_channels():
    pipe, call = ENTRIES["z-image-inpaint"].build()
    told = pytest.warns(ras.RASWarning, match="no picture")
    with ras.enabled(pipe, speedup=2, preserve=True), told:
        call(STEPS)


@pytest.mark.parametrize("preserve", [False, True])
def test_a_run_that_breaks_off_keeps_no_picture(preserve):
    pipe, call = ENTRIES["flux-fill"].build()
    ras.enable(pipe, speedup=2, preserve=preserve)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call(STEPS, callback_on_step_end=stop)
    assert session_of(pipe)._mask_watch.picture is None


def test_nothing_to_preserve_is_said():
    pipe, call = ENTRIES["flux"].build()
    told = pytest.warns(ras.RASWarning, match="no picture")
    with ras.enabled(pipe, speedup=2, preserve=True), told:
        latents = call(STEPS)
    with ras.enabled(pipe, speedup=2):
        assert torch.equal(latents, call(STEPS))


def test_the_edit_is_freed():
    pipe, call = kontext()
    with regions(*SMALL), ras.enabled(pipe, **EDITED):
        call(STEPS, **TWO)
        (session,) = pipe.transformer._ras_mount.sessions
        assert isinstance(session, Session) and session.run.edit is None
