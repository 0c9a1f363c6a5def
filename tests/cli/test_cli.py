"""The command line, run through `main` and once as a process."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import PRXPipeline
from PIL import Image
from support.command import HALF, PLAN, PROMPT, SIZE, by_hand, generate, pixels
from support.zoo import ENTRIES

import ras
import ras_kernels
from ras import cli, pictures

RATIO = dict(sample_ratio=0.25)


def place(picture, panel):
    """Where in the picture the panel is, as (x, y)."""
    picture, panel = pixels(picture), pixels(panel)
    height, width, _ = panel.shape
    for y in range(picture.shape[0] - height + 1):
        for x in range(picture.shape[1] - width + 1):
            window = picture[y : y + height, x : x + width]
            if (window[0] == panel[0]).all() and (window == panel).all():
                return x, y
    raise AssertionError("the panel is not in the picture")


# --- what is written ------------------------------------------------------------------------------


def test_compares(folder, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert generate(folder, out, "--json") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    report = json.loads(captured.out)
    dense, _ = by_hand(folder)
    sparse, stats = by_hand(folder, HALF)

    picture = Image.open(out)
    counts = stats.region_counts[0].numpy()
    panels = [dense, sparse, pictures.difference_map(dense, sparse)]
    panels.append(pictures.heat_map(counts, SIZE))
    xs, ys = zip(*(place(picture, panel) for panel in panels))
    assert all(x + SIZE[0] < other for x, other in itertools.pairwise(xs)) and len({*ys}) == 1

    assert report["speedup"] == report["seconds_dense"] / report["seconds_ras"]
    assert report["psnr_db"] == pictures.psnr(dense, sparse) and report["identical"] is False
    steps = ("steps_dense", "steps_sparse", "steps_skipped")
    assert [report[name] for name in steps] == [getattr(stats, name) for name in steps]
    assert report["steps_skipped"] > 0 and sum(report[name] for name in steps) == 6
    assert report["speedup_ceiling"] == pytest.approx(2, rel=0.03)
    assert report["runs"] == cli.runs.REPEATS
    tokens = ("tokens_computed", "tokens_total", "text_tokens")
    for name in (*tokens, "speedup_ceiling", "cache_bytes"):
        assert report[name] == getattr(stats, name)
    assert report["config"] == dataclasses.asdict(ras.RASConfig(**HALF))
    given = {"prompt": PROMPT, "negative_prompt": None, "seed": 0, "steps": 6, "warnings": []}
    given |= {"width": SIZE[0], "height": SIZE[1], "device": "cpu", "dtype": "float32"}
    given |= {"model": str(folder), "out": str(out)}
    assert {name: report[name] for name in given} == given


def test_writes_the_ras_image_alone(folder, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert generate(folder, out, "--no-compare", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    image, stats = by_hand(folder, HALF)
    assert (pixels(Image.open(out)) == pixels(image)).all()
    assert report["speedup_ceiling"] == stats.speedup_ceiling and report["runs"] == 1
    assert {report[name] for name in ("seconds_dense", "speedup", "psnr_db", "identical")} == {None}


@pytest.mark.filterwarnings("ignore::ras.RASWarning")  # of so few steps and tokens
@pytest.mark.parametrize(
    ("options", "same"),
    [
        (["--seed", "7"], {"seed": 7}),
        (["--speedup", "1.5"], {"settings": dict(speedup=1.5)}),
        (["--sample-ratio", "0.25"], {"settings": dict(sample_ratio=0.25)}),
        (["--speedup", "2.5", "--sample-ratio", "0.25"], {"settings": dict(speedup=2.5, **RATIO)}),
        (["--plan", "plan.json"], {"settings": dict(plan=PLAN)}),
        (["--steps", "7"], {"steps": 7}),
        (["--width", "64", "--height", "80"], {"width": 64, "height": 80}),
        (["--guidance-scale", "2"], {"guidance_scale": 2.0}),
        (["--negative-prompt", "blue"], {"negative_prompt": "blue"}),
    ],
)
def test_options_reach_the_pipeline(folder, tmp_path, monkeypatch, capsys, options, same):
    monkeypatch.chdir(tmp_path)
    PLAN.save("plan.json")
    out = tmp_path / "out.png"
    assert generate(folder, out, "--no-compare", "--json", *options) == 0
    report = json.loads(capsys.readouterr().out)
    image, stats = by_hand(folder, **{"settings": HALF, **same})
    assert report["tokens_computed"] == stats.tokens_computed
    assert report["warnings"] == list(stats.warnings)
    assert image.size == Image.open(out).size
    assert (pixels(Image.open(out)) == pixels(image)).all()


def test_says_that_images_are_identical(folder, tmp_path, capsys):
    assert generate(folder, tmp_path / "out.png", "--sample-ratio", "1", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["psnr_db"] is None and report["identical"] is True
    assert report["speedup_ceiling"] == 1


def test_prints_a_summary(folder, tmp_path, capsys):
    out = tmp_path / "out.jpg"
    assert generate(folder, out) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["dense", "RAS", "speed-up", "difference", "timed", "written"]
    assert Image.open(out).format == "JPEG"


def test_long_runs_are_timed_once(folder, tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 1000, 12))
    monkeypatch.setattr(cli.runs, "clock", lambda device: float(next(clock)))
    assert generate(folder, tmp_path / "out.png", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["runs"] == 1
    assert report["seconds_dense"] == report["seconds_ras"] == 12 and report["speedup"] == 1


def test_bars_name_the_run(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert generate(folder, tmp_path / "out.png", "--json") == 0
    captured = capsys.readouterr()
    assert "dense:" in captured.err and "RAS:" in captured.err
    json.loads(captured.out)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--steps", "2", "--sample-ratio", "0.5"], "2 steps"),
        (["--speedup", "50"], "speed-up of 50"),
        (["--steps", "8", "--plan", "plan.json"], "one of 6 steps"),
    ],
)
def test_warns_once(folder, tmp_path, capsys, recwarn, monkeypatch, options, named):
    """Where no step can be sparse, the speed-up cannot be met, or the plan is another run's."""
    monkeypatch.chdir(tmp_path)
    PLAN.save("plan.json")
    assert generate(folder, tmp_path / "out.png", "--json", *options) == 0
    captured = capsys.readouterr()
    (warning,) = json.loads(captured.out)["warnings"]
    assert named in warning
    assert captured.err == f"ras: warning: {warning}\n"
    assert not [each for each in recwarn if each.category is ras.RASWarning]


def test_bundled_model(tmp_path, capsys):
    out = tmp_path / "out.png"
    prompt = "a striped red ring, top left, on a blue background"
    assert cli.main(["generate", prompt, "--out", str(out), "--steps", "12", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == ""
    assert report["model"] == "bundled" and (report["width"], report["height"]) == (256, 256)
    assert Image.open(out).width > 3 * 256


def test_runs_as_a_process(folder, tmp_path):
    path = os.pathsep.join([str(Path(ras.__file__).parents[1]), *sys.path])

    def python(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            check=False,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )

    command = ["-m", "ras", "generate", PROMPT, "--model", str(folder)]
    done = python(*command, "--out", "out.png", "--steps", "12", "--json")
    assert done.returncode == 0, done.stderr
    # Where torchao is installed, diffusers has things to say when it is imported.
    said = [len(run.stderr.splitlines()) for run in (done, python("-c", "import ras.cli"))]
    assert said[0] == said[1], done.stderr
    assert json.loads(done.stdout)["out"] == "out.png"
    assert (tmp_path / "out.png").exists()


# --- the rest -------------------------------------------------------------------------------------


def test_info(capsys):
    assert cli.main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["ras"] == ras.__version__ and lines["torch"] == torch.__version__
    assert lines["cpu"].endswith(f"kernels: {ras_kernels.backend(torch.device('cpu'))}")
    out = lines["bundled"]  # of two lines, the editor's
    assert str(ras.bundled_model("edit")) in out and "editor" in out


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"ras {ras.__version__}\n"


class OfImages(PRXPipeline):
    """A pipeline without partial steps, that takes prompts and returns pictures."""

    def __call__(self, prompt=None, num_inference_steps=None, generator=None, **call):
        if prompt is None:
            call |= dict(num_inference_steps=num_inference_steps, generator=generator)
            return super().__call__(**call)
        latents = self.draw(num_inference_steps, generator=generator)
        grey = latents[0].norm(dim=1).mul(20).byte().reshape(8, 8).numpy()
        return SimpleNamespace(images=[Image.fromarray(grey).convert("RGB").resize((64, 64))])


def test_a_model_without_partial_steps(tmp_path, monkeypatch, capsys):
    """Calls are counted in the place of tokens, and the map is of the image as a whole."""
    pipe, draw = ENTRIES["prx"].build()
    pipe.__class__, pipe.draw = OfImages, draw
    monkeypatch.setattr(cli.generate, "load", lambda *_: pipe)
    out = tmp_path / "out.png"
    with torch.no_grad():
        assert cli.main(["generate", "a ring", "--steps", "12", "--out", str(out)]) == 0
        assert "50% of the transformer's calls" in capsys.readouterr().out and out.exists()
        assert cli.main(["generate", "a ring", "--steps", "12", "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["calls_computed"], report["calls_total"]) == (6, 12)
    assert report["tokens_total"] == 0 and report["speedup_ceiling"] == 2


def test_a_model_of_something_else_than_images(tmp_path, monkeypatch, capsys):
    pipe, _ = ENTRIES["prx"].build()
    pipe.__class__ = type("Sound", (PRXPipeline,), {"__call__": lambda *_, **__: SimpleNamespace()})
    monkeypatch.setattr(cli.generate, "load", lambda *_: pipe)
    assert cli.main(["generate", "a ring", "--out", str(tmp_path / "out.png")]) == 2
    assert "Sound makes no images" in capsys.readouterr().err


def test_animates(folder, tmp_path, capsys):
    """A frame for each step, beside the picture, which is what it is without."""
    out, walk = tmp_path / "out.png", tmp_path / "walk.gif"
    assert generate(folder, out, "--no-compare", "--animate", str(walk)) == 0
    assert f"{out}, {walk}" in capsys.readouterr().out
    image, stats = by_hand(folder, HALF)
    assert (pixels(Image.open(out)) == pixels(image)).all()
    with Image.open(walk) as film:
        assert film.n_frames == len(stats.steps) == 6
        film.seek(5)  # whose clean image is the last one
        frame = pixels(film)[:192].astype(float)
    expected = pictures.region_map(image.resize((256, 192)), stats.walked[5, 0])
    assert np.abs(pixels(expected) - frame).mean() < 8
