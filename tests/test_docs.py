"""The documentation does what it says: examples run, commands parse, the site builds."""

import argparse
import importlib
import inspect
import re
import subprocess
import sys

import pytest
import torch
from support.pages import PAGES, ROOT, commands, examples, outputs, put_stand_ins
from support.zoo import ENTRIES

import ras
import ras_kernels

FAMILY = ROOT / "docs/adding-a-family.md"  # whose examples need a transformer without a record
SHOWING = [page for page in PAGES if examples(page) and page != FAMILY]


class Parsed(Exception):
    """A command line has been taken."""


@pytest.mark.filterwarnings("error::ras.RASWarning")
@pytest.mark.parametrize("page", SHOWING, ids=lambda page: page.stem)
def test_examples(page, monkeypatch, tmp_path, capsys):
    """One after the other, as a reader would run them; they print what the page shows."""
    put_stand_ins(monkeypatch, tmp_path)
    names = {}
    for i, block in enumerate(examples(page)):
        file = tmp_path / f"{page.stem}_{i}.py"  # Triton reads the source of kernels
        file.write_text(block)
        exec(compile(block, file, "exec"), names)
    printed = capsys.readouterr().out
    assert [text for text in outputs(page) if text.strip() not in printed] == []


@pytest.mark.parametrize("page", [*filter(commands, PAGES)], ids=lambda page: page.stem)
def test_commands(page, monkeypatch, tmp_path):
    """Each is one that its parser takes."""
    put_stand_ins(monkeypatch, tmp_path)
    (tmp_path / "docs/pictures").mkdir(parents=True)
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(parser, argv=None):
        parse(parser, argv)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
    for name, options in commands(page):
        monkeypatch.setattr(sys, "argv", [name, *options])
        try:
            module = importlib.import_module(f"{name}.__main__")
        except ModuleNotFoundError:
            module = importlib.import_module(name)
        if "Parser(" not in inspect.getsource(module):
            assert not options and callable(module.main), name
            continue
        with pytest.raises(Parsed):
            module.main()


def test_the_site(tmp_path):
    """It is built without a warning, its menu and llms.txt have every page, and it every call."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    links = re.findall(r"\]\((.+?)\)", (tmp_path / "llms.txt").read_text())
    assert sorted(links) == sorted(path.name for path in tmp_path.glob("*.md"))
    for package, page in ((ras, "reference"), (ras_kernels, "kernels-reference")):
        html = (tmp_path / page / "index.html").read_text()
        told = re.findall(r'id="ras(?:_kernels)?\.(?:api\.|check\.)?(\w+)"', html)
        assert {name for name in package.__all__ if not name.startswith("__")} <= {*told}


def test_adding_a_family(capsys):
    """On a transformer that `ras` has no record of."""
    pipe, draw = ENTRIES["flux"].build()

    class Mine(type(pipe)):
        drawing = False

        def __call__(self, *args, **call):
            if type(self).drawing:
                return super().__call__(*args, **call)
            type(self).drawing = True
            try:
                return draw(call["num_inference_steps"])
            finally:
                type(self).drawing = False

    pipe.__class__ = Mine
    pipe.transformer.__class__ = type("MyTransformer2DModel", (type(pipe.transformer),), {})
    first, *blocks = examples(FAMILY)
    assert len(blocks) == 3 and "family=record" in first
    names = {"pipe": pipe}
    with torch.no_grad():
        for block in blocks:
            exec(block, names)
    assert ras.stats(pipe).steps_sparse == 4 and "sparse" in capsys.readouterr().out
