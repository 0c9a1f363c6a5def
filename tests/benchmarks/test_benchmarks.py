"""Each benchmark runs, at a tiny size."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

import ras
from benchmarks.kernels import __main__ as kernels
from benchmarks.kernels import measure
from benchmarks.kernels.jobs import JOBS, LUMINA, SD3, prepare
from benchmarks.kernels.jobs.job import COPY
from benchmarks.model import lumina, photos, scenes, train
from benchmarks.quality import elsewhere, inpainting, judge, ours, plans
from benchmarks.speed import end_to_end, untrained
from benchmarks.speed.families import FAMILIES
from benchmarks.speed.timing import median_interval

TINY = ["--layers=1", "--heads=4", "--head-dim=8", "--image-tokens=16", "--text-tokens=3"]
TINY += ["--steps=6", "--resets", "5", "--ratios", "0.5", "0.25", "--pairs=2", "--device=cpu"]


def test_end_to_end(capsys):
    end_to_end.main(TINY)
    table = capsys.readouterr().out.splitlines()
    assert table[-2].startswith("| 0.5 | 5 + 1 + 0 |") and table[-1].startswith(
        "| 0.25 | 5 + 1 + 0 |"
    )
    assert table[-1].endswith("| not measured |")  # the peak of memory
    end_to_end.main([*TINY, "--json"])
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert row["ceiling"] == pytest.approx(6 / (5 + (8 + 3) / (16 + 3)))
    keys_and_values, noise, ages = 2 * (16 + 3) * 32 * 4, 16 * 64 * 4, 16 * 4
    assert row["cache_bytes"] == keys_and_values + noise + ages


def test_end_to_end_of_lumina_with_guidance_and_a_plan(tmp_path, capsys):
    out = tmp_path / "report.json"
    more = ["--family=lumina", "--guidance", "--speedups=2", "--seconds=0", "--out", str(out)]
    end_to_end.main([*TINY, *more])
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["rounds"] == 1  # since the time is up
    half, quarter, planned = report["rows"]
    assert half["ceiling"] == pytest.approx(6 / (5 + 8 / 16))
    assert [row["setting"] for row in report["rows"]] == ["0.5", "0.25", "speedup=2"]
    assert (planned["steps_dense"], planned["steps_skipped"]) == (3, 3)
    for row in (half, quarter, planned):
        assert row["speedup"] == pytest.approx(report["dense"]["seconds"] / row["seconds"])
    keys_and_values, noise = 2 * 2 * 16 * 8 * 4, 2 * 16 * 32 * 4  # one head of keys, two branches
    assert half["cache_bytes"] == keys_and_values + noise + 16 * 4  # and ages


@pytest.mark.parametrize("backend, steps", [("torch", 6), ("triton", 8)])
def test_a_run_in_which_kernels_compile_is_not_timed(monkeypatch, capsys, backend, steps):
    """Where they do, warm-ups go through all steps of what is timed."""
    made = []
    monkeypatch.setattr(end_to_end.ras_kernels, "backend", lambda device: backend)
    whole = end_to_end.run
    noted = lambda pipe, call, device: made.append(call) or whole(pipe, call, device)  # noqa: E731
    monkeypatch.setattr(end_to_end, "run", noted)
    end_to_end.main([*TINY, "--steps=8", "--pairs=1"])
    assert [call["num_inference_steps"] for call in made] == [steps] * 3 + [8] * 3


@pytest.mark.parametrize("more", [["--speedups=2"], ["--compile=eager"]], ids=["plan", "compiled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_end_to_end_of_each_family(family, more, capsys):
    shape = ["--layers=1", "--heads=2", "--head-dim=32", "--image-tokens=16", "--text-tokens=3"]
    run = ["--steps=6", "--resets=5", "--ratios=0.5", "--pairs=1", "--device=cpu"]
    kind = [f"--family={family}", "--guidance", "--dtype=bfloat16", "--json"]
    end_to_end.main([*shape, *run, *kind, *more])
    half, *planned = json.loads(capsys.readouterr().out)["rows"]
    text = 3 if FAMILIES[family].walking_text else 0
    assert half["ceiling"] == pytest.approx(6 / (5 + (8 + text) / (16 + text)))
    assert half["steps_sparse"] == 1 and half["cache_bytes"] > 0
    assert [row["steps_skipped"] for row in planned] == [3] * len(planned)


@pytest.mark.parametrize(
    "name, layers, billions",
    [
        ("sd3", 24, 2.03),
        ("lumina", 24, 1.75),
        ("flux", 19, 11.90),
        ("qwen", 60, 20.43),
        ("wan", 30, 1.42),
    ],
)
def test_all_layers_have_the_parameters_of_the_published_model(name, layers, billions):
    options = end_to_end.parse([f"--family={name}", f"--layers={layers}"])
    model = untrained.MODELS[name]
    with torch.device("meta"):
        transformer = model.transformer(options, model)
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    assert parameters / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize("name, family", FAMILIES.items())
def test_ceilings_of_the_published_models(name, family, capsys):
    options = end_to_end.parse([f"--family={name}", "--ratios", "0.75", "0.125"])
    for ratio, config in zip(options.ratios, end_to_end.settings(options).values()):
        plan = ras.plan(config, options.steps).plan
        assert family.ceiling(ratio) == pytest.approx(plan.speedup(4096, family.walking_text))


def test_median_interval():
    assert median_interval([3, 1, 2]) == (1, 3)
    assert median_interval(range(7)) == (0, 6)  # misses with probability 2 / 128
    assert median_interval(range(9)) == (1, 7)  # 2 * (1 + 9) / 512


def test_scenes_repeat_and_differ():
    one, again, other = scenes.sample(3), scenes.sample(3), scenes.sample(4)
    assert one == again and np.array_equal(one.draw(64), again.draw(64))
    assert one.caption() != other.caption()
    assert one.draw(64).shape == (64, 64, 3) and one.draw(64).dtype == np.uint8


@pytest.mark.parametrize("family", [train, lumina])
def test_training_resumes(tmp_path, monkeypatch, family):
    """All stages in a few steps, interrupted once: the folder is a pipeline that draws."""
    drawn = train.images
    for module in (train, lumina):
        monkeypatch.setattr(module, "SCENES", 16)
    monkeypatch.setattr(train, "BATCH", 4)
    monkeypatch.setattr(train, "images", lambda seeds: drawn(seeds[:16]))
    monkeypatch.setattr(train.torch, "compile", lambda model: model)
    folder, work = tmp_path / "model", tmp_path / "work"
    more, path = (["--vae-steps=1"], "transformer") if family is train else ([], "lumina")
    for steps in ("1", "2"):
        folders = ["--out", str(folder), "--work", str(work)]
        monkeypatch.setattr("sys.argv", ["train", *more, "--steps", steps, *folders])
        family.main()
    assert torch.load(work / f"{path}.pt")["step"] == 2
    configs = [file.read_text(encoding="utf-8") for file in folder.rglob("*.json")]
    assert configs and not any("_name_or_path" in config for config in configs)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 24e6
    sheet = tmp_path / "sheet.png"
    train.draw_sheet(folder, sheet, count=1)
    assert Image.open(sheet).size == (8 * train.SIDE, train.SIDE + 60)


def test_training_on_photographs_resumes(tmp_path, monkeypatch):
    """In a few steps, on noise in their place: the folder is a pipeline, which RAS serves."""
    noise = np.random.default_rng(0).integers(256, size=(90, 70, 3), dtype=np.uint8)
    monkeypatch.setattr(photos, "photographs", lambda: [Image.fromarray(noise)] * 2)
    monkeypatch.setattr(photos, "BATCH", 2)
    monkeypatch.setattr(photos.torch, "compile", lambda model: model)
    folder, work = tmp_path / "model", tmp_path / "work"
    for steps in ("1", "2"):
        folders = ["--out", str(folder), "--work", str(work)]
        monkeypatch.setattr("sys.argv", ["photos", "--steps", steps, *folders])
        photos.main()
    assert torch.load(work / "photos.pt")["step"] == 2
    pipe = photos.load(folder)
    with ras.enabled(pipe, plan=(1, 1, 0.5, 0)):
        image = pipe([1], num_inference_steps=4, guidance_scale=4.0).images[0]
        assert ras.stats(pipe).steps_sparse == 1 and ras.stats(pipe).warnings == ()
    assert image.size == (photos.SIDE, photos.SIDE)


def test_inpainting(capsys, monkeypatch):
    monkeypatch.setattr(inpainting, "AREAS", (0.05,))
    monkeypatch.setattr(inpainting, "SPEEDUPS", (2.0,))
    inpainting.main(["--count=2", "--batch=2", "--steps=8", "--json"])
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["mask, 2x"]["compute"] == pytest.approx(2, rel=0.05)
    assert all(10 < row["psnr"] < 100 for row in rows.values())


def test_a_square_mask_stays_inside():
    for area in inpainting.AREAS:
        mask = inpainting.square((0.2, 0.8), area)
        assert mask.mean().item() == pytest.approx(area, rel=0.02)


def test_elsewhere(capsys, monkeypatch):
    monkeypatch.setattr(elsewhere, "SPEEDUPS", (2.0,))
    places = [dataclasses.replace(place, steps=6) for place in elsewhere.PLACES]
    monkeypatch.setattr(elsewhere, "PLACES", places)
    elsewhere.main(["--count=4", "--places", "shift", "Heun"])
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[2] for line in table[2:]] == ["fewer steps, 3", "RAS"] * 2


def test_plans(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plans, "STEPS", 6)
    monkeypatch.setattr("ras.policy.calibration.ROUNDS", 0)
    out, whole = tmp_path / "regions", tmp_path / "whole"
    plans.main(["--prompts=2", "--speedups=2", f"--out={out}", f"--whole-steps={whole}"])
    plan = ras.Plan.load(out / "2x.json")
    assert len(plan.shares) == 6 and plan.speedup(256, 28) == pytest.approx(2, rel=0.03)
    assert not whole.exists()  # as this plan has no partial steps
    assert capsys.readouterr().out.count("2x.json") == 1


@pytest.mark.parametrize(
    "regions, whole, searches, rival",
    [
        ((1, 0, 1, 0), None, 1, False),
        ((1, 0.5, 1, 0), (1, 0, 1, 1), 2, True),
        ((1, 0.5, 1, 0), (1, 0.5, 1, 0), 2, False),  # for want of whole steps of that speed-up
    ],
)
def test_no_plan_is_kept_twice(tmp_path, monkeypatch, regions, whole, searches, rival):
    """The ruler finds the plan of whole steps, wherever it is."""
    asked = []

    def calibrate(pipe, prompts, *, shares, **_):
        asked.append(shares)
        return ras.Plan(regions if shares else whole)

    monkeypatch.setattr(ras, "calibrate", calibrate)
    monkeypatch.setattr(ours, "WHOLE_STEPS", tmp_path / "whole")
    out, path = tmp_path / "2x.json", tmp_path / "whole" / "2x.json"
    path.parent.mkdir()
    ras.Plan((1, 1)).save(path)  # of an earlier search
    plans.main(["--speedups=2", f"--out={tmp_path}", f"--whole-steps={path.parent}"])
    assert len(asked) == searches and path.exists() == rival
    assert ours.of_whole_steps(out) == (path if rival else out)
    assert ras.Plan.load(ours.of_whole_steps(out)).shares == (whole or regions)


def test_judge(monkeypatch, capsys):
    monkeypatch.setattr(judge, "HELD_OUT", range(40_000_000, 40_000_004))
    judge.main(["--count=1", "--batch=1"])
    assert "RAS" in capsys.readouterr().out


def test_kernels(tmp_path, capsys):
    """All jobs at a toy size: every way agrees with ours, and is timed and reported."""
    kernels.main(["--tiny", "--out", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.glob("*.png"))) == len(JOBS)
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out and "say nothing" in table
    results = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))
    assert {row["op"] for row in results["rows"]} == set(JOBS)
    failed = {row["way"].removeprefix("cat, ") for row in results["rows"] if "error" in row}
    assert failed <= {"SDPA, cuDNN", "SDPA, efficient", "SDPA, flash"}  # which a CPU may lack
    assert all(f"| **{kernels.OURS}** | " in line for line in table.splitlines() if "**ras" in line)


def test_kernels_for_which_there_is_no_time(tmp_path, capsys):
    kernels.main(["--tiny", "--seconds=0", "--out", str(tmp_path)])
    left = 2 * len(JOBS)
    assert f"The time was up before {left} jobs, which are not measured." in capsys.readouterr().out


def test_a_way_that_fails_or_differs_is_told_from_the_others(monkeypatch):
    job = prepare("region_scores", kernels.TINY_SHAPES[0], "cpu")

    ours = job.ours

    def broken():
        raise RuntimeError("no kernel\nat all")

    ways = {"broken": measure.Way(broken), "wrong": measure.Way(lambda: ours.run() + 1)}
    job = job._replace(plain={**ways, "right": ours})
    monkeypatch.setattr(measure, "prepare", lambda *_: job)
    rows = measure.time_job(kernels.Timer("cpu", 0.001), "region_scores", kernels.TINY_SHAPES[0])
    errors = {row["way"]: row.get("error") for row in rows}
    assert errors["broken"] == "RuntimeError: no kernel" and errors["right"] is None
    assert errors["wrong"].startswith("differs by ")


def test_kernels_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(kernels.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(kernels, "code", lambda name: [f"code for {name}"])
    kernels.main(["--chip", "A100"])
    said = capsys.readouterr().out
    assert said.count("not measured") == 1 and "code for A100" in said
    assert all("measured" in line for line in said.splitlines() if line.startswith("# "))


@pytest.mark.parametrize("op", ["gather_tokens", "scatter_tokens_"])
def test_rows_are_held_against_a_copy_of_the_same_bytes(op):
    job = prepare(op, SD3(128, 0.5), "cpu")
    index = job.moved[-1].nbytes
    assert 2 * job.plain[COPY].run().nbytes == job.bytes - index > 0


def test_floors_of_known_jobs():
    """The report on kernels that the shapes come from has these by hand."""
    projection = prepare("linear_scatter_", SD3(1024, 0.5), "meta")
    assert projection.flops == pytest.approx(38.7e9, rel=0.01)
    attention = prepare("sparse_attention", SD3(1024, 0.5), "meta")
    assert attention.flops == pytest.approx(129.6e9, rel=0.01)
    assert attention.bytes == pytest.approx(84e6, rel=0.01)
    assert prepare("gather_tokens", LUMINA(1024, 0.25), "meta").bytes == pytest.approx(18.9e6, 0.01)
