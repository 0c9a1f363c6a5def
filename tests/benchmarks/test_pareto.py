"""The ruler's rivals, its comparison at equal time, and a tiny run of it."""

import functools
import json
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from support import pipelines

pytest.importorskip("diffusers", minversion="0.42")  # which has all of its caches

import ras
import ras_kernels
from benchmarks.model import lumina, sd3, train
from benchmarks.quality import caches, drawing, ours, pareto, report, rivals
from benchmarks.quality.setting import STEPS, Setting, as_it_is


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small models gain nothing by a second thread, and lose a lot where others are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- rivals -------------------------------------------------------------------------------------


def draw(pipe, steps=STEPS):
    """Latents, (2, 16, 16, 16)."""
    return pipe(**pipelines.sd3_inputs(pipe, batch=2), num_inference_steps=steps).images


FASTEST = {
    setting.method: setting
    for setting in rivals.settings(pipelines.sd3(num_layers=1), lambda pipe: draw(pipe))
}


@functools.cache
def pipe_and_dense():
    pipe = pipelines.sd3(num_layers=4)
    # With modulations that stay as they are, steps are as much alike as in a trained model.
    embedder = pipe.transformer.time_text_embed.timestep_embedder
    embedder.linear_2.weight.requires_grad_(False).zero_()
    return pipe, draw(pipe)


def attributes(module):
    return {name: set(vars(part)) for name, part in module.named_modules()}


@pytest.mark.parametrize("method", FASTEST)
def test_rival_comes_and_goes(method):
    """It computes less, begins anew in each run, and leaves the pipeline bit for bit as it was."""
    setting, (pipe, dense) = FASTEST[method], pipe_and_dense()
    transformer, before = pipe.transformer, attributes(pipe.transformer)
    with pareto.multiply_adds() as whole:
        assert torch.equal(draw(pipe), dense)
    with setting.switch(pipe):
        with pareto.multiply_adds() as counted:
            first = draw(pipe, setting.steps)
        assert torch.equal(draw(pipe, setting.steps), first)
    assert counted.get_total_flops() < 0.8 * whole.get_total_flops()
    assert first.isfinite().all() and not torch.equal(first, dense)
    assert pipe.transformer is transformer and attributes(transformer) == before
    assert torch.equal(draw(pipe), dense)


def test_missing_cache_dit_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    pipe, _ = pipe_and_dense()
    methods = {setting.method for setting in rivals.settings(pipe, draw)}
    assert "TaylorSeer" in methods and not any("DBCache" in name for name in methods)
    assert rivals.left_out(pipe) == ["cache-dit is not installed: left out"]


def test_published_selection():
    """By hand: two of five are dropped, one of each end; what is dropped at the top stays so."""
    scores, drops = torch.tensor([[1.0, 1.05, 1.08, 3.0, 4.0]]), torch.zeros(1, 5, dtype=torch.int)
    steps = []
    for _ in range(3):
        active, drops = rivals.published_selection(scores, drops, 3, high_ratio=0.5)
        steps.append((active[0].tolist(), drops[0].tolist()))
    assert steps == [
        ([1, 2, 3], [1, 0, 0, 0, 1]),
        ([0, 2, 3], [1, 1, 0, 0, 2]),  # by 1.105, 1.05, 1.08, 3, 4.42
        ([0, 1, 3], [1, 1, 1, 0, 3]),  # by 1.105, 1.16, 1.08, 3, 4.89
    ]


def test_published_selection_is_used():
    pipe, _ = pipe_and_dense()
    ours = ras_kernels.select_regions
    with rivals.published(pipe, ratio=0.5):
        published = draw(pipe)
    assert ras_kernels.select_regions is ours
    with rivals.paper(pipe, ratio=0.5):
        assert not torch.equal(draw(pipe), published)


# --- comparison at equal time -------------------------------------------------------------------


def row(method, speedup, psnr, ours=False):
    return dict(method=method, label="", speedup=[speedup], psnr=psnr, ours=ours)


def test_interpolation_at_equal_time():
    line = [row("", 1.0, [40.0, 30.0]), row("", 4.0, [20.0, 10.0])]
    assert np.allclose(report.at_speed(line, 2), [30, 20])  # half-way, in the logarithm
    assert np.allclose(report.at_speed(line, 4), [20, 10])
    beaten = row("", 2.0, [20.0, 9.0])  # by a faster one of the same method
    assert np.allclose(report.at_speed([line[0], beaten, line[1]], 2), [30, 20])
    assert report.at_speed(line, 4.1) is None and report.at_speed(line[:1], 1.5) is None


def test_comparison():
    rows = [
        row("dense", 1.0, [100.0, 100.0]),
        row("fewer steps", 1.5, [30.0, 32.0]),
        row("fewer steps", 2.0, [20.0, 22.0]),
        row("other", 2.0, [24.0, 28.0]),
        row("other", 1.0, [44.0, 48.0]),
        row("mine", 2.5, [30.0, 32.0], ours=True),
        row("mine", 1.75, [32.0, 34.0], ours=True),
    ]
    lines = report.comparison(rows).splitlines()[4:]
    assert lines[0] == "| fewer steps |  | 31.00 | 25.64 | 21.00 |  |  |"
    assert lines[2] == "| **mine** |  |  | 33.00 | 32.25 | 31.00 |  |"
    assert lines[3] == "| **mine** over fewer steps |  |  | +7.36 ± 0.00 | +11.25 ± 0.00 |  |  |"
    assert lines[4].endswith("| +6.25 ± 1.96 (other) |  |  |")


def test_comparison_at_equal_distance():
    """By hand: half-way between two settings in dB is half-way in the logarithm of the cost."""

    def near(method, compute, limit, steps=28):
        return row(method, compute, [0.0], method == "mine") | dict(
            compute=compute, limit=[limit], steps=steps
        )

    rows = [
        near("fewer steps", 1.4, 30.0, steps=20),
        near("fewer steps", 2.8, 20.0, steps=10),
        near("mine", 2.0, 35.0),
        near("mine", 3.0, 25.0),
        near("mine", 2.9, 22.0),  # beaten in both by the one before
    ]
    lines = report.at_equal_distance(rows).splitlines()
    assert lines[2] == "| method | 20 steps | 10 steps |"
    assert lines[4] == "| fewer steps | 1.00× | 1.00× |"
    assert lines[5] == "| **mine** | 1.75× |  |"  # sqrt(2 * 3) / 1.4


def test_multiply_adds_of_partial_steps():
    """What the counter counts of a plan is what the plan says, of what goes with the tokens."""
    pipe, _ = pipe_and_dense()
    with pareto.multiply_adds() as whole:
        draw(pipe, 4)
    with ras.enabled(pipe, plan=(1, 1, 0.25, 0)), pareto.multiply_adds() as counted:
        draw(pipe, 4)
    share = counted.get_total_flops() / whole.get_total_flops()
    assert 2.3 / 4 < share < 2.6 / 4  # a quarter of the image, and the text


# --- the ruler ----------------------------------------------------------------------------------


@contextmanager
def half_of_the_blocks(pipe):
    """A method that is fast and bad."""
    blocks = pipe.transformer.transformer_blocks
    pipe.transformer.transformer_blocks = blocks[4:]
    yield
    pipe.transformer.transformer_blocks = blocks


def test_ruler_resumes(tmp_path, monkeypatch, capsys):
    """Interrupted after a batch, it goes on; once all is measured, it only reports."""
    monkeypatch.setattr(rivals, "STEPS", 5)
    plain = [Setting("fewer steps", f"{n} steps", n, as_it_is) for n in (3, 4)]
    monkeypatch.setattr(rivals, "settings", lambda pipe, calibrate: plain)
    mine = [Setting("mine", "half", 5, half_of_the_blocks)]
    monkeypatch.setattr(ours, "settings", lambda folder, calibrate: mine)
    monkeypatch.setattr(train, "SCENES", 16)
    statistics = torch.zeros(64), torch.eye(64)
    monkeypatch.setattr(pareto.judge, "real_statistics", lambda classifier, work: statistics)
    arguments = [
        "--limit=6",
        "--count=4",
        "--half=b",
        "--batch=1",
        "--device=cpu",
        f"--out={tmp_path}",
    ]
    measure = pareto.Ruler.batch

    def once(self, images, progress):
        if images.start:
            raise KeyboardInterrupt
        measure(self, images, progress)

    monkeypatch.setattr(pareto.Ruler, "batch", once)
    with pytest.raises(KeyboardInterrupt):
        pareto.main(arguments)
    first = json.loads((tmp_path / "results.json").read_text())
    assert [len(entry["psnr"]) for entry in first["rows"]] == [1, 1, 1, 1]

    monkeypatch.setattr(pareto.Ruler, "batch", measure)
    pareto.main(arguments)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["dense"][0] == first["dense"][0] and len(results["dense"]) == 2
    dense, three, four, half = results["rows"]
    assert three["psnr"][0] == first["rows"][1]["psnr"][0] and half["ours"]
    assert dense["psnr"] == [100, 100] and dense["speedup"] == [1, 1]
    assert [entry["compute"] for entry in results["rows"]] == pytest.approx(
        [1, 5 / 3, 5 / 4, 2], rel=0.05
    )
    assert np.mean(four["psnr"]) > np.mean(three["psnr"]) > np.mean(half["psnr"])
    assert len(three["right"]) == 2 and len(three["right"][0]) == 4 and three["frechet"] > 0

    monkeypatch.setattr(pareto.Ruler, "batch", None)  # nothing is left to be measured
    capsys.readouterr()
    kept = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match=r"options\.batch: 1 there, 2 here"):
        pareto.main([*arguments, "--batch=2"])
    assert (tmp_path / "results.json").read_bytes() == kept
    pareto.main(arguments)
    table = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() in table
    assert "| fewer steps | 3 steps |" in table and "**mine** over fewer steps" in table
    plot = tmp_path / "plot.png"
    assert Image.open(plot).width > 1000 and plot.stat().st_size < 150_000
    for row in results["rows"]:
        row["limit"] = []
    report.plot(results["rows"], tmp_path / "without.png")  # the limit, and its panel
    assert Image.open(tmp_path / "without.png").width < 0.8 * Image.open(plot).width


def test_ruler_of_another_family(tmp_path, monkeypatch):
    """A Lumina-Next folder with a plan of its own: what is for SD3 alone stays out."""
    monkeypatch.setattr(pareto.rivals, "STEPS", 5)
    vae = sd3.build_vae()
    vae.register_to_config(shift_factor=0.1, scaling_factor=0.9)
    pipe = lumina.build_pipeline(vae, tmp_path / "work", seed=0)
    pipe.transformer.layers = pipe.transformer.layers[:3]
    pipe.transformer.register_to_config(num_layers=3)
    pipelines.randomise(pipe.transformer)
    sd3.export(pipe, tmp_path / "model")
    (tmp_path / "model" / "plans").mkdir()
    ras.Plan((1, 1, 0, 1, 0)).save(tmp_path / "model" / "plans" / "1.5x.json")
    monkeypatch.setattr(pareto.judge, "load_classifier", lambda: None)
    monkeypatch.setattr(pareto.judge, "real_statistics", lambda classifier, work: None)
    monkeypatch.setattr(ours, "SPEEDUPS", (2.0,))
    monkeypatch.setattr(ours, "STEPS", 5)
    monkeypatch.setattr(drawing, "STEPS", 5)
    monkeypatch.setattr(caches, "STEPS", 5)
    monkeypatch.setattr(ours, "LESSONS", 1)
    monkeypatch.setattr(train, "SCENES", 16)
    every = rivals.settings
    monkeypatch.setattr(
        rivals, "settings", lambda *of: [setting for setting in every(*of) if setting.steps <= 8]
    )
    arguments = ["--count=1", "--batch=1", "--device=cpu", "--model", str(tmp_path / "model")]
    arguments += ["--settings=1", "--limit=6", "--untimed", f"--out={tmp_path / 'out'}"]
    pareto.main(arguments)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = {(row["method"], row["label"]): row for row in results["rows"]}
    assert {method for method, _ in rows} >= {"fewer steps", "RAS, paper", "RAS", "RAS, calibrated"}
    assert "RAS, learnt" in {method for method, _ in rows}
    assert {"TaylorSeer", "FirstBlockCache", "MagCache", "SeaCache"} <= {m for m, _ in rows}
    assert not any("DBCache" in method or "searched" in method for method, _ in rows)
    assert rows["RAS, calibrated", "1.5x"]["compute"] == pytest.approx(5 / 3)
    assert 10 < np.mean(rows["RAS", "2x"]["psnr"]) < 100
    assert results["notes"] == []


@pytest.mark.parametrize("name", ["photos", "kontext"])
def test_ruler_of_the_other_models(name, tmp_path, monkeypatch):
    """Their weights are there; untimed, each run is made once, and cost is compute."""
    monkeypatch.setattr(pareto.rivals, "STEPS", 4)
    monkeypatch.setattr(ours, "STEPS", 4)
    monkeypatch.setattr(drawing, "STEPS", 4)
    monkeypatch.setattr(ours, "LESSONS", 1)
    monkeypatch.setattr(ours, "SPEEDUPS", (2.0,))
    plain = [Setting("fewer steps", "2 steps", 2, as_it_is)]
    monkeypatch.setattr(rivals, "settings", lambda pipe, calibrate: plain)
    monkeypatch.setattr(pareto.judge, "load_classifier", lambda: None)
    monkeypatch.setattr(pareto.judge, "real_statistics", lambda classifier, work: None)
    arguments = ["--model", name, "--count=1", "--batch=1", "--untimed", "--limit=5"]
    pareto.main([*arguments, "--guidance=1", "--device=cpu", f"--out={tmp_path}"])
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    for method in ("fewer steps", "RAS", "RAS, learnt"):
        assert rows[method]["compute"] == pytest.approx(2)
        assert 5 < rows[method]["psnr"][0] < 100 and 5 < rows[method]["limit"][0] < 100
    assert rows["dense"]["limit"][0] > rows["fewer steps"]["limit"][0]
    assert len(results["dense"][0]) == 1
    table = (tmp_path / "table.md").read_text()
    assert "at equal wall time" not in table and "PSNR to the limit, dB, at equal compute" in table
