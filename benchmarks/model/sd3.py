"""The parts of the bundled model, untrained: a tiny `StableDiffusion3Pipeline`.

Images are (3, 256, 256) in [-1, 1]; latents are (8, 32, 32), of mean 0 and standard deviation 1;
the transformer sees 16 x 16 = 256 image tokens and 28 of text, each text token 128 wide.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

import ras
from ras.cli.loading import absent_parts

from . import scenes

SIDE = 256  # pixels of an image's side
LATENT = (8, 32, 32)
TEXT_TOKENS = 28  # the longest caption takes 24, and the two end marks
TEXT_WIDTH = 64  # of each text encoder


def build_vae() -> AutoencoderKL:
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT[0],
        norm_num_groups=1,  # with small groups, normalisation forgets the colour of flat areas
        sample_size=SIDE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    # Residual blocks begin as the identity.
    begin_with_zeros(*(m for name, m in model.named_modules() if name.endswith("conv2")))
    nn.init.constant_(model.encoder.conv_out.bias[LATENT[0] :], -4)  # begin with little noise
    return model


def byte_letters() -> list[str]:
    """The letters that CLIP's tokenizer writes the 256 bytes with."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def write_tokenizer(
    folder: Path, words: Sequence[str] = (), tokens: int = TEXT_TOKENS
) -> CLIPTokenizer:
    """Write a CLIP tokenizer in which each of the words (a caption's, unless told) is one token;
    any other is spelt. It takes texts of up to so many tokens."""
    letters = byte_letters()
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in words or scenes.words():
        parts = [*word[:-1], word[-1] + "</w>"]
        # Apply the merges so far in their order, as the tokenizer will, then add those missing.
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            known = [pair for pair in merges if pair in pairs]
            pair = known[0] if known else pairs[0]
            if not known:
                merges.append(pair)
                vocabulary.append("".join(pair))
            at = pairs.index(pair)
            parts[at : at + 2] = ["".join(pair)]
    bos, eos = "<|startoftext|>", "<|endoftext|>"
    ids = {token: i for i, token in enumerate([*dict.fromkeys(vocabulary), bos, eos])}
    special = {"bos_token": bos, "eos_token": eos, "unk_token": eos, "pad_token": eos}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokens, **special}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(
    tokenizer: CLIPTokenizer,
    layers: int,
    width: int = TEXT_WIDTH,
    tokens: int = TEXT_TOKENS,
    kind: type[nn.Module] = CLIPTextModelWithProjection,
) -> Any:
    """A frozen random encoder. The last state but one is read: with one layer, that is the
    words' and positions' embeddings themselves, with two it also mixes in the words before."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = kind(config)
    for module in model.modules():  # CLIP's own initialisation makes embeddings of size 0.02
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.7)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model.eval().requires_grad_(False)


def build_transformer() -> SD3Transformer2DModel:
    model = SD3Transformer2DModel(
        sample_size=LATENT[1],
        patch_size=2,
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        num_layers=8,
        num_attention_heads=2,
        attention_head_dim=64,
        caption_projection_dim=128,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=48,
        qk_norm="rms_norm",
    )
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    # Blocks begin as the identity.
    begin_with_zeros(*(m for name, m in linears if "norm" in name or name == "proj_out"))
    return model


def begin_with_zeros(*layers: Any) -> None:
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def build_pipeline(vae: AutoencoderKL, work: Path, seed: int) -> StableDiffusion3Pipeline:
    torch.manual_seed(seed + 1)
    tokenizer = write_tokenizer(work / "tokenizer")
    return StableDiffusion3Pipeline(
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=build_text_encoder(tokenizer, layers=1),
        tokenizer=tokenizer,
        text_encoder_2=build_text_encoder(tokenizer, layers=2),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def embed(pipeline: StableDiffusion3Pipeline, captions: list[str]) -> dict[str, Tensor]:
    """Text states (N, 28, 128) and pooled ones (N, 128), float32, as the transformer takes them."""
    states, _, pooled, _ = pipeline.encode_prompt(
        captions, None, None, do_classifier_free_guidance=False, max_sequence_length=0
    )
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def velocity(model: Any, noisy: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> Tensor:
    """The velocity, noise - latent, that the model predicts for latents (N, 8, 32, 32)."""
    return model(noisy, timestep=1000 * sigma, return_dict=False, **text)[0]


def bundled_vae() -> AutoencoderKL:
    """The trained autoencoder of the bundled model, for models beside it."""
    trained = load(ras.bundled_model()).vae
    # Anew, as its configuration would say in which folder it was found.
    config = {key: value for key, value in trained.config.items() if not key.startswith("_")}
    vae = AutoencoderKL.from_config(config)
    vae.load_state_dict(trained.state_dict())
    return vae.eval()


def export(
    pipeline: DiffusionPipeline, out: Path, words: Sequence[str] = (), tokens: int = TEXT_TOKENS
) -> None:
    """Write the pipeline folder: half-precision weights, the frozen encoders in full.

    The words and tokens are those that the pipeline's tokenizer was written with.
    """
    halves = {
        name: copy.deepcopy(getattr(pipeline, name)).half() for name in ("vae", "transformer")
    }
    type(pipeline)(**(pipeline.components | halves)).save_pretrained(out)
    for folder in out.glob("tokenizer*"):  # in the form that transformers 4 reads too
        shutil.rmtree(folder)
        write_tokenizer(folder, words, tokens)


def load(folder: Path) -> Any:
    """The pipeline of a folder, without a bar for its steps."""
    pipe = DiffusionPipeline.from_pretrained(folder, **absent_parts(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe
