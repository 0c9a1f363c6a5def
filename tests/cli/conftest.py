"""The pipeline that commands are run on."""

import json
from string import ascii_lowercase

import pytest
from support import pipelines
from transformers import CLIPTokenizer


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
