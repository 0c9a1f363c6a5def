"""What is kept of the picture that an edit begins with."""

import functools
from unittest import mock

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image
from support.edits import EDITED, SMALL, STEPS, TWO, kontext, noted, regions
from support.zoo import ENTRIES
from support.zoo.parts import SIDE

import ras
from ras.session import Session
from ras.sessions import session_of

pytestmark = [
    pytest.mark.filterwarnings("error::ras.RASWarning"),
    pytest.mark.usefixtures("no_gradients"),
]


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
    assert session_of(pipe).origin.masks.picture is None


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
