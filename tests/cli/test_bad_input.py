"""Nonsense for every option of the command line, interrupts at any moment, readers that go away."""

import argparse
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

import ras
from ras import cli

NONSENSE = {
    "nothing": "",
    "a space": " ",
    "text": "abc",
    "negative": "-1",
    "zero": "0",
    "half": "0.5",
    "nan": "nan",
    "inf": "inf",
    "-inf": "-inf",
    "too large": "1e999",
    "many digits": "1" + "0" * 5000,
    "a list": "[1, 2]",
    "no UTF-8": "\udcff",
    "a zero byte": "a\0b",
    "a folder": "folder",
    "no file": "no/such/file.json",
    "a long name": "x" * 5000,
    "an empty file": "empty",
    "a binary file": "binary",
    "a deep file": "deep",
    "a picture that is cut": "cut.png",
}
SENSE = {
    # option: what of that makes sense there
    "prompt": NONSENSE.keys() - {"nothing", "a space", "no UTF-8"},
    "instruction": NONSENSE.keys() - {"nothing", "a space", "no UTF-8"},
    "--picture": NONSENSE.keys() - {"nothing", "a space", "no UTF-8"},
    "--negative-prompt": NONSENSE.keys() - {"nothing", "a space", "no UTF-8"},
    "--seed": {"zero"},
    "--speedup": set(),
    "--sample-ratio": {"half"},
    "--guidance-scale": {"zero", "half"},
    "--out": {"a picture that is cut"},  # it is written anew
}


class Reached(Exception):
    """All options have been taken, and a model would be loaded now."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("empty").touch()
    Path("binary").write_bytes(os.urandom(1000))
    Path("deep").write_text("[" * 100_000)
    Path("cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path


def options_of(command):
    """All that an argparse parser of ours takes, by command."""
    parser = cli._parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    if command is None:
        return commands.choices
    actions = commands.choices[command]._actions
    return {(action.option_strings or [action.dest])[-1]: action for action in actions}


def test_every_command_is_told_of():
    assert options_of(None).keys() == {"generate", "edit", "demo", "models", "info"}
    assert options_of("models").keys() == options_of("info").keys() == {"--help"}
    assert SENSE.keys() <= options_of("generate").keys() | options_of("edit").keys()


def valued(command):
    return [name for name, action in options_of(command).items() if action.nargs != 0]


GIVEN = {"generate": ["a ring"], "edit": ["make it red"], "demo": []}


@pytest.mark.parametrize(
    "command, option", [(command, option) for command in GIVEN for option in valued(command)]
)
def test_nonsense_for_an_option(command, option, here, monkeypatch, capsys):
    """One line and status 2, or it is taken; nothing is written, and there is no traceback."""
    before = sorted(here.rglob("*"))

    def reached(*_):
        raise Reached

    monkeypatch.setattr(getattr(cli, command), "load", reached)
    for kind, value in NONSENSE.items():
        arguments = [*GIVEN[command], f"{option}={value}"]
        if option in ("prompt", "instruction"):
            arguments = ["--", value]
        elif option == "image":
            arguments = ["--", value, *GIVEN[command]]
        try:
            status = cli.main([command, *arguments])
        except Reached:
            assert kind in SENSE.get(option, ()), f"{kind} is taken"
            continue
        captured = capsys.readouterr()
        assert status == 2 and kind not in SENSE.get(option, ()), f"{kind} is refused"
        assert captured.err.startswith("ras: error: ") and captured.err.count("\n") == 1, kind
        assert captured.out == "" and len(captured.err) < 1100, kind
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("arguments", [["--no-compare=1"], ["--json=1"], ["a", "b"], ["--seed"]])
def test_options_that_take_none_or_one(arguments, capsys):
    assert cli.main(["generate", "a ring", *arguments]) == 2
    assert capsys.readouterr().err.startswith("ras: error: ")


def test_one_file_for_two(here, capsys):
    assert cli.main(["generate", "a ring", "--out=a.webp", "--animate=./a.webp"]) == 2
    assert "both 'a.webp'" in capsys.readouterr().err


ERRORS = MemoryError(), RuntimeError("can't allocate memory"), OSError(28, "full")


@pytest.mark.parametrize("error", ERRORS)
def test_errors_on_the_way(error, here, monkeypatch, capsys):
    """They are one line, whatever the libraries raise."""

    def fail(*_):
        raise error

    for place in (cli.generate, "load"), (cli.runs.Job, "compare"):
        with monkeypatch.context() as patch:
            patch.setattr(cli.generate, "load", lambda *_: None)
            patch.setattr(*place, fail)
            assert cli.main(["generate", "a ring"]) == 2
            err = capsys.readouterr().err
            assert err.startswith("ras: error: ") and err.count("\n") == 1 and len(err) > 14


@pytest.mark.parametrize("moment", ["load", "run_ras", "report", "save", "tell"])
def test_interrupts(moment, here, monkeypatch, capsys):
    """Status 130 and one line; no picture, or the whole one, and the old one until then."""
    out = here / "out.png"
    Image.new("RGB", (3, 3)).save(out)
    old = out.read_bytes()

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    if moment == "save":

        def half(self, path, *_, **__):
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(Image.Image, "save", half)
    else:
        place = cli.runs.Job if moment in ("run_ras", "report") else cli.generate
        monkeypatch.setattr(place, moment, interrupt)
    options = ["--steps=2", f"--out={out}", "--no-compare"]
    assert cli.main(["generate", "a ring", *options]) == 130
    captured = capsys.readouterr()
    assert captured.err.strip().endswith("ras: interrupted") and "Traceback" not in captured.err
    assert (out.read_bytes() == old) == (moment != "tell")
    assert not list(here.glob(".*"))


def start(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(Path(ras.__file__).parents[1])}
    command = [sys.executable, "-m", "ras", *arguments]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True)
    return subprocess.Popen(command, **pipes, **options)


def test_an_interrupted_process(here):
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # jobs of a shell may not
    command = ["generate", "a ring", "--steps=1000", "--out=out.png"]
    with start(*command, cwd=here, preexec_fn=listen) as process:
        try:
            deadline = time.monotonic() + 120
            while not has_begun(process.pid) and time.monotonic() < deadline:
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            try:
                out, err = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:  # Python drops what is raised in a finaliser
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=60)
        finally:
            process.kill()  # else the with block waits for all of its steps
    assert process.returncode == 130 and out == ""
    assert err.splitlines()[-1] == "ras: interrupted" and "Traceback" not in err
    assert not (here / "out.png").exists() and not list(here.glob(".*"))


def has_begun(pid):
    """Whether a process is past its imports: it loads the bundled model, or has ended."""
    try:
        return "bundled" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return True


def test_a_reader_that_goes_away():
    process = start("models")
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(120) == 0 and "Traceback" not in said and "Broken" not in said
