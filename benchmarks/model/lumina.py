"""Train a second model to judge by: a tiny `LuminaPipeline` for the same scenes.

    python -m benchmarks.model.lumina --work work --out lumina
    python -m benchmarks.model.lumina --out lumina --sheet sheet.png

Training resumes from the checkpoint in `--work`, with the batches that `(seed, step)` determine.
The weights in `weights/lumina` are of 800 steps, the first 600 at the learning rates of 1,200. The
second form draws captions that training never saw.

The model is of the size of the bundled one, with its autoencoder and its words. What differs
is the family: rotary positions instead of learnt ones, RMS norms and tanh gates, grouped queries
(two heads of 64, one of keys and values), the text read by cross-attention, and a transformer that
predicts latent - noise at times that run from 0 to 1.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    LuminaNextDiT2DModel,
    LuminaPipeline,
)
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import Tensor, nn

from ..commands import as_command
from .sd3 import LATENT, begin_with_zeros, build_text_encoder, bundled_vae, write_tokenizer
from .train import draw_sheet, encode, train_or_draw, train_transformer

SCENES = 4000  # to train on, the first of those of the bundled model

TEXT_WIDTH = 128
TEXT_TOKENS = 32  # the pipeline pads to a multiple of 8


def build_transformer() -> LuminaNextDiT2DModel:
    model = LuminaNextDiT2DModel(
        sample_size=LATENT[1],
        patch_size=2,
        in_channels=LATENT[0],
        hidden_size=128,
        num_layers=8,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=128,
        cross_attention_dim=TEXT_WIDTH,
    )
    nn.init.zeros_(model.pad_token)  # unused, and made of memory as it was found
    # Blocks begin as the identity.
    begin_with_zeros(*(layer.norm1.linear for layer in model.layers), model.norm_out.linear_2)
    return model


def build_pipeline(vae: AutoencoderKL, work: Path, seed: int) -> LuminaPipeline:
    torch.manual_seed(seed + 1)
    tokenizer = write_tokenizer(work / "tokenizer")
    vae = copy.deepcopy(vae)
    vae.register_to_config(shift_factor=0.0)  # this pipeline adds none to its latents
    return LuminaPipeline(
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=build_text_encoder(tokenizer, 2, TEXT_WIDTH, TEXT_TOKENS),
        tokenizer=tokenizer,
    )


def embed(pipeline: LuminaPipeline, captions: list[str]) -> dict[str, Tensor]:
    """Text states (N, T, 128) float32 and their mask (N, T), as the transformer takes them."""
    states, mask, _, _ = pipeline.encode_prompt(
        captions, do_classifier_free_guidance=False, clean_caption=False
    )
    return {"encoder_hidden_states": states, "encoder_mask": mask}


def velocity(model: Any, noisy: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> Tensor:
    """The velocity, noise - latent, that the model predicts for latents (N, 8, 32, 32)."""
    rotary = get_2d_rotary_pos_embed_lumina(64, noisy.shape[2] // 2, noisy.shape[3] // 2)
    output = model(
        noisy,
        1 - sigma,
        image_rotary_emb=rotary,
        cross_attention_kwargs={},
        return_dict=False,
        **text,
    )[0]
    return -output.chunk(2, dim=1)[0]  # the other half, learnt variances, is not used


def train(work: Path, out: Path, steps: int, seed: int) -> None:
    """Train on the CPU, leaving the pipeline with the moving average of the weights in `out`."""
    vae = bundled_vae()
    pipe = build_pipeline(vae, work, seed)
    latents = encode(vae, work, "cpu", SCENES)
    latents = latents + np.float16(vae.config.scaling_factor * vae.config.shift_factor)
    this = sys.modules[__name__]
    train_transformer(this, pipe, latents, work / "lumina.pt", out, steps, seed)


def main() -> None:
    train_or_draw(__doc__, train, draw_sheet, steps=3000)


if __name__ == "__main__":
    as_command(main)
