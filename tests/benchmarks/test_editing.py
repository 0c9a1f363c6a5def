"""Edits of scenes, the model that learns them, and the ruler for it."""

import itertools
import json

import numpy as np
import pytest
import torch

import ras
from benchmarks import editing
from benchmarks.model import edits, kontext, scenes, sd3
from benchmarks.quality import judge

TINY = ["--layers=1", "--heads=4", "--head-dim=8", "--image-tokens=16", "--text-tokens=3"]
TINY += ["--steps=6", "--resets", "5", "--ratios", "0.5", "0.25", "--pairs=2", "--device=cpu"]


def pixels_that_differ(edit):
    """Where the scenes before and after differ: (size, size) bool."""
    return (edit.before.draw(128) != edit.after.draw(128)).any(-1)


@pytest.mark.parametrize("seed", range(40))
def test_an_edit_changes_what_it_says(seed):
    """One thing, told by its words; nothing else differs by a pixel; backwards it is undone."""
    edit = edits.sample(seed)
    words = {*edit.instruction().replace(",", " ,").split()}
    assert edit == edits.sample(seed) and words <= {*edits.words()}
    undone = edit.reversed()
    assert undone.reversed() == edit and undone.kind == edit.kind
    assert undone.instruction() != edit.instruction()
    changed, radius = pixels_that_differ(edit), max(scenes.SIZES.values()) + scenes.JITTER + 0.02
    if edit.kind == "background":
        assert edit.before.objects == edit.after.objects and changed.mean() > 0.5
        return
    touched = {*edit.before.objects} ^ {*edit.after.objects}
    axis = (np.arange(128) + 0.5) / 128
    x, y = np.meshgrid(axis, axis)
    near = np.zeros_like(changed)
    for thing in touched:
        at = scenes.PLACES[thing.place]
        near |= np.hypot(x - at[0], y - at[1]) < 1.5 * radius
    assert len(touched) == (1 if edit.kind == "presence" else 2)
    assert changed.any() and not (changed & ~near).any()
    for scene in (edit.before, edit.after):
        colours = [scene.colour, *(thing.colour for thing in scene.objects)]
        assert len({*colours}) == len(colours)


def test_edits_are_of_all_kinds():
    drawn = [edits.sample(seed) for seed in range(400)]
    shares = [sum(edit.kind == kind for edit in drawn) / 400 for kind in edits.KINDS]
    assert min(shares) > 0.08 and shares[-1] < 0.2  # about one in eight of the background
    longest = max(len(edit.instruction().replace(",", " ,").split()) for edit in drawn)
    assert longest + 2 <= kontext.TEXT_TOKENS


def test_training_to_edit_resumes(tmp_path, monkeypatch):
    """In a few steps: the folder is a pipeline that knows its words, which RAS serves."""
    monkeypatch.setattr(kontext, "PAIRS", 8)
    monkeypatch.setattr(kontext, "BATCH", 2)
    monkeypatch.setattr(kontext.torch, "compile", lambda model: model)
    folder, work = tmp_path / "model", tmp_path / "work"
    for steps in ("1", "2"):
        folders = ["--out", str(folder), "--work", str(work)]
        monkeypatch.setattr("sys.argv", ["kontext", "--steps", steps, *folders])
        kontext.main()
    assert torch.load(work / "kontext.pt")["step"] == 2
    pipe, edit = sd3.load(folder), next(iter(kontext.unseen()))
    words = pipe.tokenizer.tokenize(edit.instruction())
    assert len(words) == len(edit.instruction().replace(",", " ,").split())
    with ras.enabled(pipe, plan=(1, 1, 0.5, 0)):
        image = pipe(**kontext.call(edit), num_inference_steps=4).images[0]
        assert ras.stats(pipe).steps_sparse == 1 and ras.stats(pipe).warnings == ()
    assert image.size == (sd3.SIDE, sd3.SIDE)


def test_editing(tmp_path, capsys, monkeypatch):
    """A row for each method and edit, of the kinds of edit apart; rivals' lines, and ours."""
    monkeypatch.setattr(editing, "STEPS", 8)
    monkeypatch.setattr(editing, "SPEEDUPS", (1.5, 2.0))
    path = tmp_path / "rows.json"
    methods = ["references", "SpotEdit", "regions", "RAS"]
    editing.main(["--count", "2", "--methods", *methods, "--out", str(path)])
    out, rows = capsys.readouterr().out, json.loads(path.read_text())
    assert len(rows) == 2 * (1 + 1 + 2 + 2 + 2)
    found = {row["method"] for row in rows}
    assert found == {"dense", "references behind", *methods[1:]}
    for row in rows:
        assert row["kind"] in editing.KINDS and 0 < row["share"] <= 1
        assert row["psnr"] == editing.PEAK if row["method"] == "dense" else row["psnr"] > 0
        assert (row["speedup"] > 0 and row["compute"] is None) or row["compute"] >= 1
    for method, near in (("RAS", 0.03), ("regions", 0.2)):  # of eight steps, few fit both
        ours = [row["compute"] for row in rows if (row["method"], row["label"]) == (method, "2x")]
        assert ours == pytest.approx([2] * 2, rel=near)
    assert "at equal wall time" in out and "references behind" in out
    changes = [row["change"] for row in rows if row["method"] == "dense"]
    told = out[out.index("change ") :]
    assert all(f"\n{change}" in told.replace("| ", "") for change in changes)


def test_the_region_of_an_edit():
    before = torch.zeros(1, 3, 256, 256)
    after = before.clone()
    after[:, 1, 16:33, 250] = 1
    (found,) = editing.region_of(before, after)
    assert found[0].nonzero().tolist() == [[1, 15], [2, 15]]


def test_what_an_edit_asks_for_is_recognised():
    """In the drawn scene after it, and not in that before it, for every kind of edit."""
    classifier = judge.load_classifier()
    by_kind = {}
    for edit in itertools.islice(kontext.unseen(), 40):
        by_kind.setdefault(edit.kind, edit)
    assert by_kind.keys() == {*edits.KINDS}
    for edit in by_kind.values():
        for scene, done in ((edit.after, True), (edit.before, False)):
            image = torch.from_numpy(scene.draw(sd3.SIDE)).movedim(-1, 0)[None] / 255
            assert editing.is_done(classifier, image, edit) == done, edit.instruction()
            assert editing.is_right(classifier, image, edit.after) == (
                done or edit.kind == "background"
            )
