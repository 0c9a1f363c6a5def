"""The examples of the READMEs run."""

import re
from pathlib import Path

import torch

from ras import cli

ROOT = Path(__file__).parent.parent


def test_the_table_of_models(capsys):
    """It is what the command line prints, and what the records say."""
    assert cli.main(["models"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") > 50 and "| WanTransformer3DModel | Wan, " in printed
    assert f"<!-- models -->\n\n{printed}\n<!-- models -->" in (ROOT / "README.md").read_text()


def test_examples_of_the_kernels(capsys):
    torch.manual_seed(0)
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "ras_kernels/README.md").read_text(), re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    assert names["output"].shape == (2, 64, 4, 64) and names["output"].isfinite().all()
    assert torch.equal(
        names["merged"].gather(1, names["active"].long()[..., None].expand(-1, -1, 64)),
        names["fresh"],
    )
    assert "index must be in [0, 256)" in capsys.readouterr().out
