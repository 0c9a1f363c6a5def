"""Which regions each step computed, and animations of it."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from einops import rearrange
from PIL import Image
from support.zoo import ENTRIES

import ras
from ras.pictures import animated, film, heat_map, region_map
from ras.pictures.decoder import preparation
from ras.pictures.film import _Film
from ras.sessions import session_of

pytestmark = pytest.mark.usefixtures("no_gradients")
SHARES = (1, 0.25, 0, 1, 0.5, 0.5)


def frames(path):
    with Image.open(path) as film:
        for i in range(film.n_frames):
            film.seek(i)
            yield film.convert("RGB"), film.info["duration"]


def pictures_of(path):
    """The frames without their strips."""
    found = [frame for frame, _ in frames(path)]
    return [frame.crop((0, 0, frame.width, frame.height - 52)) for frame in found]


def apart(image, other):
    a, b = (np.asarray(each.convert("RGB"), float) for each in (image, other))
    return np.abs(a - b).mean() if a.shape == b.shape else np.inf


def nearly(image, other, tolerance=10):  # of the few colours of a GIF
    return apart(image, other) < tolerance


# --- what is known of a run -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd3", "flux-kontext", "wan"])
def test_stats_tell_which_regions_walked(name):
    pipe, draw = ENTRIES[name].build()
    ras.enable(pipe, plan=SHARES)
    draw(6)
    stats = ras.stats(pipe)
    kinds = ("dense", "sparse", "skipped", "dense", "sparse", "sparse")
    assert stats.steps == kinds
    assert (stats.steps_dense, stats.steps_sparse, stats.steps_skipped) == (2, 3, 1)
    assert stats.walked.dtype == torch.bool and stats.walked.shape[1:] == stats.region_counts.shape
    assert torch.equal(stats.walked.sum(0), stats.region_counts)
    each = stats.walked.flatten(2).sum(2)
    assert torch.equal(each[:, 0], torch.tensor(stats.plan.counts(stats.walked[0, 0].numel())))


def test_two_samples_walk_by_themselves():
    pipe, draw = ENTRIES["flux"].build()
    ras.enable(pipe, plan=SHARES)
    draw(6, num_images_per_prompt=2)
    first, second = ras.stats(pipe).walked.unbind(1)
    assert first.sum() == second.sum() and not torch.equal(first, second)


def test_a_step_of_two_stages_is_one():
    pipe, draw = ENTRIES["sd3"].build()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    ras.enable(pipe, plan=(1, 0.5, 1))
    draw(3)
    stats = ras.stats(pipe)
    assert stats.steps == ("dense", "sparse", "dense") and len(stats.walked) == 3
    assert stats.walked[1].float().mean() == 0.5


def test_nothing_else_is_kept_alive():
    """What a run remembers of its steps is as large as the regions' numbers, and no more."""
    pipe, draw = ENTRIES["sd3"].build()
    ras.enable(pipe, plan=SHARES)
    draw(6)
    tally = session_of(pipe).run.tally
    kept = [active for active in tally.walked if active is not None]
    assert len(kept) == 3
    assert all(each.untyped_storage().nbytes() == each.nbytes for each in kept)


def test_whole_steps_without_a_grid_are_kinds_alone():
    pipe, draw = ENTRIES["sana"].build()
    ras.enable(pipe, plan=(1, 0, 1, 0))
    draw(4)
    assert ras.stats(pipe).steps == ("dense", "skipped") * 2 and ras.stats(pipe).walked is None


# --- animations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_the_image_forms_under_its_regions(suffix, tmp_path):
    """The last frame is the image; each one is veiled where its step computed nothing."""
    pipe, draw = ENTRIES["flux-kontext"].build()
    ras.enable(pipe, plan=SHARES)
    path = tmp_path / f"walk{suffix}"
    vae, scheduler = dict(vars(pipe.vae)), dict(vars(pipe.scheduler))
    with animated(pipe, path):
        (image,) = draw(6, output_type="pil")
    assert vars(pipe.vae).keys() == vae.keys()
    assert vars(pipe.scheduler)["step"] == scheduler["step"]
    walked = ras.stats(pipe).walked[:, 0]
    found = pictures_of(path)
    assert [length for _, length in frames(path)] == [150] * 5 + [1500]
    large = image.resize(found[0].size)
    assert nearly(found[5], region_map(large, walked[5]))
    assert not nearly(found[5], region_map(large, ~walked[5]), 16)
    (again,) = draw(6, output_type="pil")
    assert np.array_equal(np.asarray(again), np.asarray(image))  # it is not changed by being seen
    (first,) = draw(1, output_type="pil")  # to where the first step's noise leads at once
    assert apart(found[0], first.resize(large.size)) < apart(found[0], large)


@pytest.mark.parametrize("name", ["flux-kontext", "pixart-sigma", "wan"])
def test_regions_alone_where_nothing_is_decoded(name, tmp_path):
    """Of latents, of a scheduler of another kind, and of a video, whose middle it shows."""
    pipe, draw = ENTRIES[name].build()
    ras.enable(pipe, plan=SHARES)
    with animated(pipe, tmp_path / "walk.gif"):
        draw(6)
    walked = ras.stats(pipe).walked[:, 0]
    walked = walked[:, walked.shape[1] // 2] if walked.ndim == 4 else walked
    found = pictures_of(tmp_path / "walk.gif")
    assert len(found) == 6
    for frame, regions in zip(found, walked):
        assert max(frame.size) == 256 and nearly(frame, heat_map(regions, frame.size), 1)


def test_a_run_of_whole_steps(tmp_path):
    pipe, draw = ENTRIES["sana"].build()
    ras.enable(pipe, plan=(1, 0, 1))
    with animated(pipe, str(tmp_path / "walk.gif")):
        draw(3)
    light, dark, again = pictures_of(tmp_path / "walk.gif")
    assert nearly(light, again, 0.1) and np.asarray(light).mean() > np.asarray(dark).mean()


def test_the_last_of_several_runs_counts(tmp_path):
    pipe, draw = ENTRIES["flux-kontext"].build()
    ras.enable(pipe, plan=None, speedup=2)
    with animated(pipe, tmp_path / "walk.gif"):
        draw(12, output_type="pil")
        (image,) = draw(4, output_type="pil")
    found = pictures_of(tmp_path / "walk.gif")
    assert len(found) == 4
    large = image.resize(found[3].size)
    assert nearly(found[3], region_map(large, ras.stats(pipe).walked[3, 0]))


def test_nothing_is_written_if_the_run_fails(tmp_path):
    pipe, draw = ENTRIES["flux-kontext"].build()
    ras.enable(pipe)
    with pytest.raises(KeyError), animated(pipe, tmp_path / "walk.gif"):
        draw(4)
        raise KeyError
    assert [*tmp_path.iterdir()] == [] and "decode" not in vars(pipe.vae)


def test_what_cannot_be_animated(tmp_path):
    """It is said before anything runs."""
    pipe, _ = ENTRIES["sd3"].build()
    gif = tmp_path / "walk.gif"

    def animate(error, told, pipe, file):
        with pytest.raises(error, match=told), animated(pipe, file):
            raise AssertionError("it has begun")

    animate(ValueError, "not enabled; call ras.enable on it first", pipe, gif)
    ras.enable(pipe)
    animate(ValueError, "pipe must be a pipeline", pipe.transformer, gif)
    animate(ValueError, "does not end in one of .gif, .webp", pipe, tmp_path / "walk.mp4")
    animate(OSError, "there is no folder", pipe, tmp_path / "no/walk.gif")
    animate(TypeError, "file must be", pipe, 3)
    with pytest.raises(ValueError, match="has made no run"), animated(pipe, gif):
        pass
    assert not gif.exists()


@pytest.mark.parametrize("name", ["lumina", "omnigen", "wan-unipc", "sd3-heun"])
def test_the_last_clean_image_is_where_the_run_ends(name):
    """Whichever way time goes, and of steps of two stages, too."""
    pipe, draw = ENTRIES[name].build()
    ras.enable(pipe, plan=(1, 0, 1))
    film = _Film(session_of(pipe))
    with film.watching(pipe):
        latents = draw(3)
    assert list(film._clean) == [0, 1, 2]
    torch.testing.assert_close(film._clean[2].reshape(latents[:1].shape), latents[:1])


# --- latents on their way to the decoder ----------------------------------------------------------


def packed(latents):
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


WAYS = {
    # of `(2, 4, 6, 8)`, of a grid of 3 x 4: as the scheduler has it, as the decoder gets it, grid
    "scaled and shifted": (lambda x: x, lambda x: x / 0.36 + 0.11, (3, 4)),
    "packed": (packed, lambda x: x / 0.36 + 0.11, (3, 4)),
    "a number for each channel": (packed, lambda x: x * torch.arange(1, 5).view(4, 1, 1), (3, 4)),
    "one frame": (packed, lambda x: (x + 1)[:, :, None], (3, 4)),
    "no grid": (lambda x: x, lambda x: 2 * x, ()),
    "bfloat16": (packed, lambda x: (x / 0.36).bfloat16(), (3, 4)),
}


@pytest.mark.parametrize("way", WAYS)
def test_latents_go_the_pipelines_way(way):
    have, become, grid = WAYS[way]
    last, other = torch.randn(2, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    prepare = preparation(have(last)[:1], become(last), grid)
    expected = become(other)[:1]
    found = prepare(have(other)[:1])
    assert found.shape == expected.shape and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=0.03 if way == "bfloat16" else 1e-4, rtol=0.01)


def test_of_a_video_the_middle_frame():
    last, other = torch.randn(2, 1, 4, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    prepare = preparation(last, last * 3 - 1, (5, 3, 4))
    torch.testing.assert_close(prepare(other), (other * 3 - 1)[:, :, 2:3])


def test_another_way_is_none():
    """Painted over in part, of other channels, or of other places."""
    last = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    over = torch.cat([last[..., :4], torch.ones(1, 4, 6, 4)], -1)
    for became in (over, last[:, :2], last[..., :6], last.flip(-1), last.flatten(2)):
        assert preparation(last, became, (3, 4)) is None


def test_of_a_video_shares_are_of_all_frames(monkeypatch):
    """Also where the middle frame, which is shown, has none of the tokens that walked."""
    walked = torch.zeros(2, 1, 4, 3, 5, dtype=torch.bool)
    walked[0], walked[1, 0, 0] = True, True
    shares = []
    monkeypatch.setattr(film, "_frame", lambda image, regions, each, step: shares.append(each))
    stats = ras.Stats(ras.RASConfig(), steps=("dense", "sparse"), walked=walked)
    _Film(None).frames(stats)
    assert shares == [[1.0, 0.25]] * 2
