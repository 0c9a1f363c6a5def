"""The READMEs and the table of models say what is so."""

import re
from pathlib import Path

import torch

from ras import cli
from ras.families import support

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_it_is_short():
    assert README.count("\n") <= 130


def test_its_table_of_models():
    """Each pipeline named there has the steps that its record says, and a test of its own."""
    steps = {
        f"{pipeline}…": "any" if row["partial steps"] == "yes" else "dense and skipped"
        for row in support()
        for pipeline in row["pipelines"].split(", ")
    }
    rows = re.findall(r"^\| .+ \| (`.+`) \| (.+) \|$", README, re.M)
    named = [(name, said) for names, said in rows for name in re.findall("`(.+?)`", names)]
    assert len(named) > 25 and named == [(name, steps[name]) for name, _ in named]


def test_what_it_leads_to_is_there():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert len(links) > 10 and all((ROOT / link).exists() for link in links)


def test_the_table_of_models(capsys):
    """It is what the command line prints, and what the records say."""
    assert cli.main(["models"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") > 50 and "| WanTransformer3DModel | Wan, " in printed
    assert f"<!-- models -->\n\n{printed}\n<!-- models -->" in (ROOT / "docs/models.md").read_text()


def test_examples_of_the_kernels(capsys):
    torch.manual_seed(0)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "ras_kernels/README.md").read_text(), re.S)
    assert len(blocks) == 6
    for block in blocks:
        exec(block, names)
    assert names["output"].shape == (2, 64, 4, 64) and names["output"].isfinite().all()
    assert torch.equal(
        names["merged"].gather(1, names["active"].long()[..., None].expand(-1, -1, 64)),
        names["fresh"],
    )
    assert "index must be in [0, 256)" in capsys.readouterr().out
