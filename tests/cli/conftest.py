"""The pipelines that commands are run on."""

import json
from string import ascii_lowercase
from types import SimpleNamespace

import pytest
import torch
from support import pipelines
from support.zoo.parts import pil
from transformers import CLIPTokenizer

import ras
from ras.cli.loading import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small SD3 pipeline of random weights, saved as its users' pipelines are."""
    words = tmp_path_factory.mktemp("tokenizer")
    vocabulary = [letter + end for letter in ascii_lowercase for end in ("", "</w>")]
    ids = {"<|startoftext|>": 62, "<|endoftext|>": 63, **{v: i for i, v in enumerate(vocabulary)}}
    (words / "vocab.json").write_text(json.dumps(ids))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(words, model_max_length=8)
    parts = {**pipelines.text_encoders(), "tokenizer": tokenizer, "tokenizer_2": tokenizer}
    path = tmp_path_factory.mktemp("model")
    pipelines.sd3(vae=pipelines.autoencoder(), parts=parts).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pipe():
    """The bundled one, enabled."""
    options = SimpleNamespace(model=None, device=torch.device("cpu"), dtype=None)
    return ras.enable(load(options, ras.bundled_model()))


@pytest.fixture
def calls(pipe, monkeypatch):
    """The prompts that are drawn, in next to no time."""
    drawn = []

    def draw(self, prompt, num_inference_steps=28, height=None, guidance_scale=7.0, generator=None):
        drawn.append((prompt, generator.initial_seed()))
        return SimpleNamespace(images=[pil()])

    monkeypatch.setattr(type(pipe), "__call__", draw)
    return drawn
