"""Each example runs, on tiny pipelines in place of the models that it names."""

import ast
import json
import re
import runpy

import matplotlib.pyplot
import pytest
from PIL import Image
from support.pages import ROOT, put_stand_ins

import ras

RAY = ROOT / "examples/ray_data.py"
SCRIPTS = sorted({*ROOT.glob("examples/*.py")} - {RAY})
NOTEBOOK, STEPS = ROOT / "examples/regions.ipynb", 12
REPLACED = {
    "STEPS = 28\n": f"STEPS = {STEPS}\n",
    "from IPython.display import Image as Shown\n": "",  # which notebooks have
}


@pytest.mark.filterwarnings("error::ras.RASWarning")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script(script, monkeypatch, tmp_path, capsys):
    """It is short, leaves out a part of the work, and writes all that it says."""
    assert script.read_text().count("\n") < 40
    put_stand_ins(monkeypatch, tmp_path)
    seen = []
    stats = ras.stats
    monkeypatch.setattr(ras, "stats", lambda pipe: seen.append(stats(pipe)) or seen[-1])
    runpy.run_path(script)
    assert {"skipped", "sparse"} & {*seen[-1].steps}
    assert capsys.readouterr().out
    told = re.findall(r'"(\w+\.(?:png|gif|json))"', script.read_text())
    assert told and [name for name in told if not (tmp_path / name).exists()] == []
    for picture in tmp_path.glob("*.[pg][ni][gf]"):
        assert min(Image.open(picture).size) > 8


def test_ray(monkeypatch, tmp_path, capsys):
    """On a local Ray, with the bundled model; what installs `ras` does not bring Ray."""
    assert RAY.read_text().count("\n") < 40
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of its actors
    monkeypatch.chdir(tmp_path)
    runpy.run_path(RAY)
    lines = capsys.readouterr().out.splitlines()
    for i, colour in enumerate(("red", "green", "blue", "yellow")):
        (line,) = [line for line in lines if line.startswith(f"{i}.png a {colour} ring")]
        assert float(line.split()[-1].removesuffix("x")) > 1.8
        assert min(Image.open(f"{i}.png").size) > 8


def test_every_one_is_told_of():
    page = (ROOT / "examples/README.md").read_text()
    names = {path.name for path in ROOT.glob("examples/*")} - {"README.md"}
    assert {*re.findall(r"\]\((\w+\.\w+)\)", page)} == names


def test_notebook(monkeypatch, tmp_path):
    """Its cells in order, of fewer steps; each last line shows itself where it is a value."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    for line, instead in REPLACED.items():
        assert line in code[0]
        code[0] = code[0].replace(line, instead)
    monkeypatch.setattr(matplotlib.pyplot, "show", lambda: None)
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    names, shown = {"Shown": Image.open}, []
    for cell in code:
        *body, last = ast.parse(cell).body
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
        else:
            exec(compile(ast.Module([last], []), "cell", "exec"), names)
    films = [each for each in shown if getattr(each, "is_animated", False)]
    assert [film.n_frames for film in films] == [STEPS, STEPS]
    assert sum(isinstance(each, Image.Image) for each in shown) == 7
    assert sum("<img" in each._repr_html_() for each in shown if hasattr(each, "steps_dense")) == 1
    assert names["edited"].any() and not names["edited"].all()
    assert ras.pictures.psnr(names["whole"], names["masked"]) > 25
    fewer, adaptive = ([psnr for _, psnr in names[name]] for name in ("fewer", "adaptive"))
    assert len(names["axes"].lines) == 2 and sum(adaptive) > sum(fewer)
