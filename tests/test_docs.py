"""The examples of the documentation do what it says."""

import re
import subprocess
import sys
from pathlib import Path

import torch
from support.zoo import ENTRIES

import ras
import ras_kernels

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_site(tmp_path):
    """It is built without a warning, every page is in its menu, and it has every call."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for package, page in ((ras, "reference"), (ras_kernels, "kernels-reference")):
        html = (tmp_path / page / "index.html").read_text()
        told = re.findall(r'id="ras(?:_kernels)?\.(?:api\.|check\.)?(\w+)"', html)
        assert {name for name in package.__all__ if not name.startswith("__")} <= {*told}


def examples(page):
    """The blocks of Python."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


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
    first, *blocks = examples("adding-a-family.md")
    assert len(blocks) == 3 and "family=record" in first
    names = {"pipe": pipe}
    with torch.no_grad():
        for block in blocks:
            exec(block, names)
    assert ras.stats(pipe).steps_sparse == 4 and "sparse" in capsys.readouterr().out
