"""`ras generate --prompts`: its files, what it refuses, and processes that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.prompts import PROMPTS, manifest, names, processes

import ras
from ras import cli
from ras.cli import prompts as files

OPTIONS = ["--steps=2", "--height=64", "--width=64"]

pytestmark = pytest.mark.filterwarnings("ignore::ras.RASWarning")


def test_files_of_prompts(tmp_path):
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("\ufeffa ring\r\n\n  two stars \n", encoding="utf-8")
    assert files.read(str(text)) == ["a ring", "two stars"]
    lines.write_text('{"prompt": "a ring", "seed": 3}\n\n{"prompt": "größer"}', encoding="utf-8")
    assert files.read(str(lines)) == [{"prompt": "a ring", "seed": 3}, {"prompt": "größer"}]
    for wrong, told in (
        (b"\n \n", "has no prompts"),
        (b"\xff", "no text in UTF-8"),
        (b'{"prompt": "a"}\n{"prompt"', "line 2 is not JSON"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b'{"seed": 3}', "line 1 must be an object"),
        (b'"a ring"', "line 1 must be an object"),
    ):
        lines.write_bytes(wrong)
        with pytest.raises(ValueError, match=told):
            files.read(str(lines))


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["a ring", "--prompts=p.txt", "--out=a"], "a prompt, or a file"),
        ([], "a prompt, or a file"),
        (["--prompts=p.txt", "--out=a.png"], "must be a folder"),
        (["--prompts=p.txt", "--out=p"], "must be a folder"),
        (["--prompts=p.txt", "--out=a", "--animate=b.gif"], "--animate is of a single prompt"),
        (["--prompts=none.txt", "--out=a"], "there is no file"),
        (["--prompts=empty.txt", "--out=a"], "has no prompts"),
        (["--prompts=p.jsonl", "--out=a"], "'size' is no argument"),
    ],
)
def test_what_the_command_refuses(arguments, told, pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in (("p.txt", "a ring"), ("p", ""), ("empty.txt", "\n")):
        Path(name).write_text(text)
    Path("p.jsonl").write_text('{"prompt": "a", "size": 1}')
    monkeypatch.setattr(files, "load", lambda *_: pipe)
    before = names(tmp_path)
    assert cli.main(["generate", *arguments]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1 and names(tmp_path) == before
    ras.enable(pipe)


def test_the_device_of_a_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert cli._device("cuda") == torch.device("cuda:2")
    assert cli._device("cuda:1") == torch.device("cuda:1") and cli._device("cpu").type == "cpu"
    for rank in ("4", "x", "-1", ""):
        monkeypatch.setenv("LOCAL_RANK", rank)
        told = f"LOCAL_RANK must be the number of a GPU, of which this machine has 4.* got '{rank}'"
        with pytest.raises(cli.argparse.ArgumentTypeError, match=told):
            cli._device("cuda")
        assert cli._device("cuda:3") == torch.device("cuda:3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(cli.argparse.ArgumentTypeError, match="cuda:1 is not available on this"):
        cli._device("cuda")


def test_two_processes_one_of_which_is_killed(tmp_path, monkeypatch, capsys):
    """At any moment; started again, all is there, once, and what was there is not touched."""
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS * 2))
    command = [sys.executable, "-m", "ras", "generate", "--prompts=p.txt", "--out=out", *OPTIONS]

    def start(rank):
        told = {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        told["PYTHONPATH"] = str(Path(ras.__file__).parents[1])
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **told}, **pipes)

    out, both = tmp_path / "out", [start(0), start(1)]
    deadline = time.monotonic() + 900
    while len([*out.glob("0*.png")]) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    both[0].send_signal(signal.SIGKILL)
    said, errors = both[1].communicate(timeout=900)
    assert both[1].returncode == 0, errors
    assert "2 of 2" in said and both[0].wait() == -signal.SIGKILL
    both[0].communicate()
    there = {path: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    for path in there:
        Image.open(path).load()  # it is whole
    assert 5 <= len(there) == len(manifest(out))
    monkeypatch.chdir(tmp_path)
    processes(monkeypatch, 0, 2)
    assert cli.main([*command[3:], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    seconds = [each["seconds"] for each in manifest(out)[::2] if out / each["file"] not in there]
    assert (told["images"], told["drawn"]) == (5, len(seconds))
    assert told["seconds"] == pytest.approx(sum(seconds))
    assert names(out) == [*(f"{i:05d}.png" for i in range(10)), "manifest.jsonl"]
    assert {path: path.stat().st_mtime_ns for path in there} == there
    records = manifest(out)
    assert [(each["index"], each["seed"]) for each in records] == [(i, i) for i in range(10)]
    assert [each["prompt"] for each in records] == PROMPTS * 2
