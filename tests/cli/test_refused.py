"""What the command line refuses: one line, and status 2."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from support.command import PLAN, PROMPT, error_line, generate

from ras import cli


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model", "/nowhere"], "/nowhere"),
        (["--model", "."], "model_index.json"),
        (["--model", "letter.txt"], "letter.txt"),
        (["--model", "org/name/more"], "org/name/more"),
        (["--out", "out.gif"], ".png"),
        (["--out", "nowhere/out.png"], "nowhere"),
        (["--out", "folder.png"], "folder.png"),
        (["--device", "toaster"], "toaster"),
        (["--device", "cuda:99"], "cuda:99 is not available on this machine"),
        (["--dtype", "int8"], "int8"),
        (["--steps", "0"], "from 1 to 10000, got '0'"),
        (["--steps", "many"], "many"),
        (["--seed", "-1"], "-1"),
        (["--seed", str(2**64)], str(2**64)),
        (["--sample-ratio", "1.5"], "1.5"),
        (["--sample-ratio", "nan"], "nan"),
        (["--speedup", "0.5"], "at least 1, got 0.5"),
        (["--speedup", "nan"], "nan"),
        (["--speedup", "inf"], "inf"),
        (["--speedup", "fast"], "fast"),
        (["--plan", "nowhere.json"], "nowhere.json"),
        (["--plan", "folder.png"], "folder.png"),
        (["--plan", "letter.txt"], "letter.txt is no plan"),
        (["--plan", "wrong.json"], "wrong.json is no plan: shares must be from 0 to 1, got 2"),
        (["--plan", "plan.json", "--speedup", "2"], "leave out speedup"),
        (["--plan", "plan.json", "--sample-ratio", "0.5"], "leave out speedup"),
        (["--guidance-scale", "inf"], "inf"),
        (["--height", "-8"], "-8"),
        (["--unheard-of"], "--unheard-of"),
    ],
)
def test_refuses_a_wrong_option(options, named, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("letter.txt").touch()
    Path("folder.png").mkdir()
    Path("wrong.json").write_text('{"ras_plan": 1, "shares": [1, 2]}')
    PLAN.save("plan.json")
    monkeypatch.setattr(cli.generate, "load", lambda *_: pytest.fail("loaded a model"))
    assert cli.main(["generate", PROMPT, *options]) == 2
    assert named in error_line(capsys)


@pytest.mark.parametrize("arguments", [[], ["paint"], ["generate"], ["generate", " "]])
def test_refuses_a_wrong_command(arguments, capsys):
    assert cli.main(arguments) == 2
    error_line(capsys)


def test_refuses_a_size_that_the_model_cannot_make(folder, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert generate(folder, out, "--height", "100") == 2
    assert "100" in error_line(capsys)
    assert not out.exists()


def test_refuses_pickled_weights(folder, tmp_path, capsys):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(safetensors.torch.load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert generate(copy, tmp_path / "out.png") == 2
    assert "safetensors" in error_line(capsys)


def test_refuses_another_kind_of_pipeline(tmp_path, capsys):
    unet = UNet2DModel(
        8,
        3,
        3,
        block_out_channels=(4,),
        norm_num_groups=2,
        layers_per_block=1,
        attention_head_dim=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert generate(tmp_path / "model", tmp_path / "out.png") == 2
    assert "DDPMPipeline" in error_line(capsys)
