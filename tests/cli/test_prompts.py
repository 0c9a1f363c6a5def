"""Many prompts: shares of processes, what is there after a crash, and what is refused."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image, PngImagePlugin
from support.prompts import PROMPTS, manifest, names, processes
from support.zoo.parts import pil

import ras
from ras import files, many

CALL = dict(num_inference_steps=2, height=64, width=64, guidance_scale=4.0, max_sequence_length=0)

pytestmark = pytest.mark.filterwarnings("ignore::ras.RASWarning")


def test_images_are_those_of_the_calls(pipe, tmp_path):
    """To the pixel, with the record in each, and the pipeline's bar as it was."""
    pipe.set_progress_bar_config(desc="mine", disable=True)
    asked = [PROMPTS[0], {"prompt": PROMPTS[1], "seed": 7, "height": 128}]
    records = ras.generate(pipe, asked, tmp_path / "a/b", seed=3, **CALL)
    assert pipe._progress_bar_config == {"desc": "mine", "disable": True}
    assert names(tmp_path / "a/b") == ["00000.png", "00001.png", "manifest.jsonl"]
    for record, seed, more in zip(records, (3, 7), ({}, {"height": 128})):
        generator = torch.Generator().manual_seed(seed)
        expected = pipe(record["prompt"], generator=generator, **{**CALL, **more}).images[0]
        with Image.open(tmp_path / "a/b" / record["file"]) as image:
            assert image.tobytes() == expected.tobytes()
            assert json.loads(image.info["ras"]) == record
        stats = ras.stats(pipe)
        assert record["stats"]["steps_dense"] == stats.steps_dense and record["seed"] == seed
        assert set(record["stats"]["warnings"]) <= set(stats.warnings)
    assert manifest(tmp_path / "a/b") == records
    assert records[1]["made_with"]["call.height"] == 128 and records[0]["seconds"] > 0


def test_each_process_takes_its_share(pipe, calls, tmp_path, monkeypatch):
    """Of any iterable; what the first one writes of the others is right, too."""
    for rank in (2, 0, 1):
        processes(monkeypatch, rank, 3)
        records = ras.generate(pipe, iter(PROMPTS), tmp_path)
        assert [record["index"] for record in records] == [*range(rank, 5, 3)]
    assert sorted(calls, key=lambda each: each[1]) == [(text, i) for i, text in enumerate(PROMPTS)]
    assert [record["prompt"] for record in manifest(tmp_path)] == PROMPTS
    processes(monkeypatch, 1, 2)  # another number of processes draws nothing again
    assert len(ras.generate(pipe, PROMPTS, tmp_path)) == 2 and len(calls) == 5
    for rank, world in ((2, 2), (-1, 2), ("x", 1)):
        processes(monkeypatch, rank, world)
        with pytest.raises(ValueError, match="RANK and WORLD_SIZE"):
            ras.generate(pipe, PROMPTS, tmp_path)


def test_the_bar_is_one_and_counts_all(pipe, calls, tmp_path, monkeypatch):
    seen = []

    class Bar:
        def __init__(self, total, unit, disable):
            self.disable, self.n = bool(disable), 0
            seen.append([total, self.disable])

        def refresh(self):
            seen[-1].append(self.n)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(diffusers_logging, "tqdm", Bar)
    for rank in (1, 0):
        processes(monkeypatch, rank, 2)
        ras.generate(pipe, PROMPTS, tmp_path)
    assert seen == [[5, True], [5, False, 3, 4, 5]]


@pytest.mark.parametrize("moment", ["draw", "save", "replace"])
def test_what_breaks_off_is_drawn_again(pipe, calls, tmp_path, monkeypatch, moment):
    """Nothing is there half, and nothing of what is there is drawn again."""
    with monkeypatch.context() as patch:
        if moment == "draw":
            patch.setattr(many, "stats", lambda _: 1 / (len(calls) < 3) and ras.stats(pipe))
        elif moment == "save":
            save = Image.Image.save

            def half(self, path, *args, **kwargs):
                if len(calls) > 2:
                    Path(path).write_bytes(b"half")
                    raise ZeroDivisionError
                save(self, path, *args, **kwargs)

            patch.setattr(Image.Image, "save", half)
        else:
            replace = Path.replace

            def fail(part, path):
                1 / (len(calls) < 3 or path.suffix != ".png")
                replace(part, path)

            patch.setattr(Path, "replace", fail)
        with pytest.raises(ZeroDivisionError):
            ras.generate(pipe, PROMPTS, tmp_path)
    assert names(tmp_path) == ["00000.png", "00001.png", "manifest.jsonl"]
    assert len(manifest(tmp_path)) == 2
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    me = f"{files._process()}-{'0' * 16}"
    here, elsewhere = me.replace(f"-{os.getpid()}-", f"-{ended.pid}-"), f"of-another-{me}"
    for part in (
        f".{here}.part.png",
        f".{here}.part.jsonl",
        f".{me}.part.png",
        f".{elsewhere}.png",
    ):
        (tmp_path / part).write_bytes(b"half")
    ras.generate(pipe, PROMPTS, tmp_path)
    assert [text for text, _ in calls] == [*PROMPTS[:3], *PROMPTS[2:]]
    left = {many.LOCK, f".{me}.part.png", f".{elsewhere}.png"}  # that may still be written
    assert len(manifest(tmp_path)) == 5 and {path.name for path in tmp_path.glob(".*")} == left


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("sync"), sync(file)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    files.write_text(tmp_path / "a.txt", "text")
    assert done == ["sync", "replace"] and (tmp_path / "a.txt").read_text() == "text"


def test_what_a_crash_of_the_machine_leaves_is_drawn_again(pipe, calls, tmp_path):
    """Files of no bytes, of noughts and of a half; what is whole but of nobody's is an error."""
    ras.generate(pipe, PROMPTS[:4], tmp_path)
    whole = (tmp_path / "00001.png").read_bytes()
    for i, content in enumerate((b"", whole[: len(whole) // 2], bytes(len(whole)), whole[:-20])):
        (tmp_path / f"{i:05d}.png").write_bytes(content)
    ras.generate(pipe, PROMPTS[:4], tmp_path)
    assert [text for text, _ in calls] == PROMPTS[:4] * 2 and len(manifest(tmp_path)) == 4


@pytest.mark.parametrize("told", ["[]", "3", "{}", '{"prompt": "a", "seed": 0}', "[" * 10_000])
def test_records_that_are_none(told, pipe, calls, tmp_path):
    note = PngImagePlugin.PngInfo()
    note.add_text("ras", told)
    pil().save(tmp_path / "00000.png", pnginfo=note)
    with pytest.raises(ValueError, match=r"00000.png is there and not of ras\.generate"):
        ras.generate(pipe, PROMPTS, tmp_path)
    many._write_manifest(tmp_path)
    assert manifest(tmp_path) == []


def test_nothing_is_drawn_before_a_list_is_looked_through(pipe, calls, tmp_path, monkeypatch):
    """The files of the share; of what is no list, each in its turn."""
    pil().save(tmp_path / "00003.png")
    with pytest.raises(ValueError, match=r"00003\.png is there"):
        ras.generate(pipe, PROMPTS, tmp_path)
    assert calls == []
    with pytest.raises(ValueError, match=r"00003\.png is there"):
        ras.generate(pipe, iter(PROMPTS), tmp_path)
    assert len(calls) == 3
    monkeypatch.setattr(type(pipe), "__call__", lambda self, labels, generator=None: None)
    with pytest.raises(ValueError, match="takes no prompt"):
        ras.generate(pipe, PROMPTS, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_record_has_the_warnings_of_its_call(pipe, calls, tmp_path, monkeypatch):
    told = []

    def found(_):
        return SimpleNamespace(**dict.fromkeys(many.TOLD, 0), warnings=(*told,))

    draw = type(pipe).__call__

    def warn(self, prompt, **call):
        told.extend([f"of {prompt}"] * (prompt != PROMPTS[1]))
        return draw(self, prompt, generator=call["generator"])

    told.append("before")
    monkeypatch.setattr(many, "stats", found)
    monkeypatch.setattr(type(pipe), "__call__", warn)
    records = ras.generate(pipe, PROMPTS[:3], tmp_path)
    assert [record["stats"]["warnings"] for record in records] == [
        [f"of {PROMPTS[0]}"],
        [],
        [f"of {PROMPTS[2]}"],
    ]


def test_a_manifest_that_is_overtaken(pipe, calls, tmp_path, monkeypatch):
    """Another process ends while one writes what it has read: it waits, and its own is the last."""
    ras.generate(pipe, PROMPTS[:2], tmp_path)
    write, others = many.write_text, []

    def late(path, text):
        monkeypatch.setattr(many, "write_text", write)
        others.append(threading.Thread(target=ras.generate, args=(pipe, PROMPTS, tmp_path)))
        others[0].start()
        others[0].join(0.5)
        assert len(names(tmp_path)) == 6 and others[0].is_alive()
        write(path, text)

    monkeypatch.setattr(many, "write_text", late)
    ras.generate(pipe, PROMPTS[:2], tmp_path)
    others[0].join(60)
    assert len(manifest(tmp_path)) == 5


def steeper(pipe, patch):
    other = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=2.0)
    patch.setattr(pipe, "scheduler", other)


def other_text(pipe, patch):
    bias = pipe.text_encoder.text_model.final_layer_norm.bias
    patch.setattr(bias, "data", bias.detach() + 1)


def other_pixels(pipe, patch):
    bias = pipe.vae.decoder.conv_out.bias
    patch.setattr(bias, "data", bias.detach() + 1)


def brighter(pipe, patch):
    patch.setattr(pipe.vae, "_internal_dict", {**pipe.vae.config, "scaling_factor": 7.0})


@pytest.mark.parametrize(
    "unlike, told",
    [
        (dict(prompts=["a blue ring"]), "prompt: 'a red ring' there, 'a blue ring' here"),
        (dict(seed=1), "seed: 0 there, 1 here"),
        (dict(num_inference_steps=3), r"call\.num_inference_steps: nothing there, 3 here"),
        (dict(settings=dict(plan=(1, 0))), r"ras\.plan: nothing there"),
        (dict(settings=dict(sample_ratio=0.5)), r"ras\.sample_ratio: nothing there, 0\.5 here"),
        (dict(settings=dict(mask=torch.ones(8, 8))), r"ras\.mask: nothing there, 'tensor"),
        (dict(change=steeper), r"scheduler\.shift: 3\.0 there, 2\.0 here"),
        (dict(change=other_text), r"weights\.text_encoder: '\w+' there"),
        (dict(change=other_pixels), r"weights\.vae: '\w+' there"),
        (dict(change=brighter), r"vae\.scaling_factor: [\d.]+ there, 7\.0 here"),
    ],
)
def test_an_image_of_something_else_is_an_error(pipe, calls, tmp_path, monkeypatch, unlike, told):
    ras.generate(pipe, PROMPTS[:1], tmp_path)
    before = (tmp_path / "00000.png").read_bytes()
    asked = {"prompts": PROMPTS[:1], "settings": {}, "change": lambda *_: None, **unlike}
    settings, change = asked.pop("settings"), asked.pop("change")
    with monkeypatch.context() as patch:
        change(pipe, patch)
        with pytest.raises(ValueError, match=told), ras.settings(pipe, **settings):
            ras.generate(pipe, out=tmp_path, **asked)
    assert (tmp_path / "00000.png").read_bytes() == before and len(calls) == 1
    pil().save(tmp_path / "00001.png")
    with pytest.raises(ValueError, match=r"00001.png is there and not of ras\.generate"):
        ras.generate(pipe, PROMPTS, tmp_path)


@pytest.mark.parametrize(
    "prompts, call, error",
    [
        ("a ring", {}, "must be texts or mappings"),
        (7, {}, "must be texts or mappings"),
        ([7], {}, "prompt 0 must be a text or a mapping"),
        (["a ring", {"seed": 1}], {}, "prompt 1's prompt must be a text"),
        ([{"prompt": "a ring", "seed": -1}], {}, "prompt 0's seed must be at least 0"),
        (["a ring", {"prompt": "a ring", "size": 1}], {}, "'size' is no argument of the pipeline"),
        (["a ring"], {"generator": None}, "'generator' is not to be set here"),
        (["a ring"], {"seed": 1.5}, "seed must be a whole number"),
    ],
)
def test_nonsense(pipe, calls, tmp_path, prompts, call, error):
    """Nothing is drawn, and no folder is made, where a later prompt is wrong."""
    with pytest.raises((TypeError, ValueError), match=error):
        ras.generate(pipe, prompts, tmp_path / "out", **call)
    assert calls == [] and not (tmp_path / "out").exists()


def test_pipelines_that_cannot(pipe, tmp_path):
    with pytest.raises(TypeError, match="takes a pipeline"):
        ras.generate(pipe.transformer, PROMPTS, tmp_path)
    ras.disable(pipe)
    try:
        with pytest.raises(ValueError, match=r"not enabled; call ras\.enable"):
            ras.generate(pipe, PROMPTS, tmp_path)
    finally:
        ras.enable(pipe)
