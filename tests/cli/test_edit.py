"""`ras edit`, on a small pipeline of random weights and once on the bundled ones."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support import pipelines
from support.zoo.flux import flux_with_vae
from support.zoo.parts import SIDE, text

import ras
from ras import cli, pictures

ENCODED = dict(prompt_embeds=text(), pooled_prompt_embeds=pipelines.normal(1, 32, seed=3))


class Told(type(flux_with_vae("FluxKontextPipeline")[0])):
    """It takes prompts as texts, whatever they say, and says what it was called with."""

    def __call__(self, image=None, prompt=None, **call):
        self.asked = dict(image=image, prompt=prompt, **call)
        return super().__call__(image=image, **ENCODED, **call)


@pytest.fixture
def pipe(monkeypatch):
    """It makes images as large as the picture, not of a mega-pixel."""
    found, _ = flux_with_vae("FluxKontextPipeline")
    found.__class__ = Told
    more = dict(height=SIDE, width=SIDE, max_area=SIDE**2, _auto_resize=False)
    run = cli.runs.Job.run
    monkeypatch.setattr(
        cli.runs.Job, "run", lambda job, *args: job.call.update(more) or run(job, *args)
    )
    monkeypatch.setattr(cli.edit, "load", lambda *_: found)
    return found


@pytest.fixture
def picture(tmp_path):
    pixels = (torch.rand(SIDE, SIDE, 3, generator=torch.Generator().manual_seed(4)) * 255).byte()
    path = tmp_path / "picture.png"
    Image.fromarray(pixels.numpy()).save(path)
    return path


def edit(picture, out, *options):
    call = ["edit", str(picture), "make it red", "--model", str(ras.bundled_model())]
    return cli.main([*call, "--steps", "12", "--out", str(out), *options])


def test_writes_what_it_did(pipe, picture, tmp_path, capsys):
    out, walk = tmp_path / "edited.png", tmp_path / "walk.webp"
    options = ["--json", "--speedup", "2", "--seed", "3", "--animate", str(walk)]
    with torch.no_grad():
        assert edit(picture, out, *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert pipe.asked["prompt"] == report["prompt"] == "make it red"
    assert pipe.asked["image"].size == (SIDE, SIDE)
    assert not ras.is_enabled(pipe)
    assert (report["steps"], report["seed"], report["image"]) == (12, 3, str(picture))
    assert report["speedup"] == report["seconds_dense"] / report["seconds_ras"]
    assert report["animation"] == str(walk) and Image.open(walk).n_frames == 12
    assert 0 <= report["edited"] <= 1 and report["psnr_db"] > 0
    drawn = Image.open(out)
    assert drawn.width > 5 * SIDE and drawn.height > SIDE
    shown = np.asarray(Image.open(picture))
    rows = np.asarray(drawn)[:, 12 : 12 + SIDE]  # the first panel, with its title
    assert any(np.array_equal(rows[y : y + SIDE], shown) for y in range(drawn.height - SIDE))


def test_says_it_in_words(pipe, picture, tmp_path, capsys):
    with torch.no_grad():
        assert edit(picture, tmp_path / "edited.png") == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["dense", "RAS", "speed-up", "difference", "timed", "edit", "written"]


def test_preserves_pixels_beside_a_mask(pipe, picture, tmp_path, capsys, monkeypatch):
    """To the bit; the mask may be of another size."""
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 8, 8))
    mask.save(tmp_path / "mask.png")
    shown = []
    monkeypatch.setattr(cli.edit, "side_by_side", lambda panels, *_: shown.append(panels[-1]))
    monkeypatch.setattr(cli.edit, "written_whole", lambda path: pytest.raises(AttributeError))
    options = ["--preserve", "--mask", str(tmp_path / "mask.png"), "--json"]
    with torch.no_grad():
        assert edit(picture, tmp_path / "edited.png", *options) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["edited"] == pytest.approx(9 / 64)  # 2 x 2 regions and the margin
    assert report["psnr_outside_db"] is None  # infinite
    found, own = np.asarray(shown[0][1]), np.asarray(Image.open(picture))
    differs = (found != own).any(-1)
    assert differs[:48, :48].any() and not differs[48:].any() and not differs[:, 48:].any()


def test_what_edits_nothing_is_refused(monkeypatch, picture, tmp_path, capsys):
    monkeypatch.setattr(cli.edit, "load", lambda *_: pipelines.sd3())
    assert edit(picture, tmp_path / "out.png") == 2
    assert "edits nothing" in capsys.readouterr().err


def test_an_error_names_a_picture_that_is_none(pipe, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    assert edit(tmp_path / "text.png", tmp_path / "out.png") == 2
    assert "text.png" in capsys.readouterr().err


# --- pixels ---------------------------------------------------------------------------------------


def flat(value, size=(64, 32)):
    return Image.new("RGB", size, (value, value, value))


def regions(*chosen, shape=(4, 8)):
    found = torch.zeros(shape, dtype=torch.bool)
    for y, x in chosen:
        found[y, x] = True
    return found


def test_put_back():
    """A region is 8 x 8 pixels; its inside is new, its edge a mixture, all else as it was."""
    block = [(y, x) for y in (1, 2) for x in (3, 4, 5)]
    found = np.asarray(ras.put_back(flat(200), flat(100), regions(*block)))[..., 0]
    assert (found[13:19, 29:43] == 200).all()
    outside = np.ones((32, 64), bool)
    outside[8:24, 24:48] = False
    assert (found[outside] == 100).all()
    edge = found[8, 28:44]
    assert ((edge > 100) & (edge < 200)).all()


def test_put_back_of_nothing_and_everything():
    nothing = ras.put_back(flat(200), flat(100), regions())
    assert (np.asarray(nothing) == 100).all()
    everything = ras.put_back(flat(200), flat(100), ~regions())
    assert (np.asarray(everything) == 200).all()
    as_array = ras.put_back(flat(200), flat(100), (~regions()).numpy())
    assert (np.asarray(as_array) == 200).all()


@pytest.mark.parametrize(
    "error, change, told",
    [
        (TypeError, dict(image="a.png"), "image must be a PIL image"),
        (TypeError, dict(picture=None), "picture must be a PIL image"),
        (TypeError, dict(edited=[[True]]), "edited must be an array or a tensor"),
        (ValueError, dict(picture=flat(0, (32, 32))), "of the image's size"),
        (ValueError, dict(edited=torch.ones(4, 8)), "bool"),
        (ValueError, dict(edited=regions()[None]), "rows, columns"),
        (ValueError, dict(edited=torch.ones(64, 8, dtype=torch.bool)), "more regions than pixels"),
    ],
)
def test_what_cannot_be_put_back(error, change, told):
    given = dict(image=flat(0), picture=flat(0), edited=regions())
    with pytest.raises(error, match=told):
        ras.put_back(**{**given, **change})


def test_psnr_outside_is_that_of_pixels_beside_the_regions():
    image, picture = flat(100), flat(100)
    image.putpixel((0, 0), (151, 100, 100))  # outside: 1 of 3 * (2048 - 64) values, a fifth off
    image.putpixel((30, 10), (0, 0, 0))  # inside
    found = cli.edit._outside(image, picture, regions((1, 3)))
    one = Image.new("RGB", (1, 1984), (100, 100, 100))
    other = one.copy()
    other.putpixel((0, 0), (151, 100, 100))
    assert found == pytest.approx(pictures.psnr(one, other))
    assert cli.edit._outside(picture, picture, regions((1, 3))) is None


# --- the bundled editor ---------------------------------------------------------------------------


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_the_bundled_models_are_small():
    generator, editor = ras.bundled_model(), ras.bundled_model("edit")
    assert size(editor) <= 10e6 and size(generator) + size(editor) <= 23e6
    with pytest.raises(ValueError, match="task must be one of generate, edit, got 'draw'"):
        ras.bundled_model("draw")


def test_an_edit_of_the_picture_that_is_drawn_for_it(tmp_path, capsys):
    """The bundled models, from a text to an edited picture; a local edit takes partial steps."""
    out = tmp_path / "edited.png"
    words = "make the star green"
    assert cli.main(["edit", words, "--out", str(out), "--speedup", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["image"] == "drawn" and report["model"] == "bundled"
    assert 0 < report["edited"] < 0.5 and report["steps_sparse"] > 0
    assert report["psnr_db"] > 30 and report["psnr_outside_db"] > 25
    assert Image.open(out).width > 6 * 256  # the picture, too, is there dense and with RAS
