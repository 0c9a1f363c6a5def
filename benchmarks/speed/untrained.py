"""Pipelines of random weights in the shapes of published models, to time their loops.

They have no text encoders and no autoencoder; text comes as random numbers, and latents go out.
`options` are those of `benchmarks.speed.end_to_end`.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

import ras
from ras.cli.loading import DTYPES

SD3_TEXT, SD3_POOLED, LUMINA_TEXT = 4096, 2048, 2048  # widths of text
GRAPHS = 64  # of one block; PyTorch allows 8


def build(options: argparse.Namespace) -> DiffusionPipeline:
    torch.manual_seed(0)
    transformers: dict[str, Any] = {"sd3": sd3_transformer, "lumina": lumina_transformer}
    pipelines = {"sd3": StableDiffusion3Pipeline, "lumina": LuminaPipeline}
    with torch.device(options.device):  # a GPU is quick at drawing billions of weights
        transformer = transformers[options.family](options)
    transformer.to(options.device, DTYPES[options.dtype])
    if options.compile:
        # For all settings that are timed together; older versions take no limit by argument.
        torch._dynamo.config.recompile_limit = GRAPHS
        ras.compile_repeated_blocks(transformer, fullgraph=True, backend=options.compile)
    kind: Any = pipelines[options.family]
    missing = dict.fromkeys(kind._get_signature_types())
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = kind(**missing | {"transformer": transformer, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3_transformer(options: argparse.Namespace) -> SD3Transformer2DModel:
    side = math.isqrt(options.image_tokens)
    return SD3Transformer2DModel(
        sample_size=2 * side,
        num_layers=options.layers,
        num_attention_heads=options.heads,
        attention_head_dim=options.head_dim,
        caption_projection_dim=options.heads * options.head_dim,
        joint_attention_dim=SD3_TEXT,
        pooled_projection_dim=SD3_POOLED,
        pos_embed_max_size=max(192, side),
    )


def lumina_transformer(options: argparse.Namespace) -> LuminaNextDiT2DModel:
    return LuminaNextDiT2DModel(
        sample_size=2 * math.isqrt(options.image_tokens),
        num_layers=options.layers,
        hidden_size=options.heads * options.head_dim,
        num_attention_heads=options.heads,
        num_kv_heads=max(1, options.heads // 4),
        cross_attention_dim=LUMINA_TEXT,
    )


def inputs(options: argparse.Namespace) -> dict[str, Any]:
    """The call's arguments."""
    kind: dict[str, Any] = dict(device=options.device, dtype=DTYPES[options.dtype])
    text, side = (options.batch, options.text_tokens), 2 * math.isqrt(options.image_tokens)
    call: dict[str, Any] = dict(
        height=8 * side,
        width=8 * side,
        guidance_scale=4.0 if options.guidance else 1.0,
        output_type="latent",
        num_inference_steps=options.steps,
    )
    for prefix in ("", "negative_"):
        if options.family == "sd3":
            call[f"{prefix}prompt_embeds"] = torch.randn(*text, SD3_TEXT, **kind)
            call[f"{prefix}pooled_prompt_embeds"] = torch.randn(options.batch, SD3_POOLED, **kind)
        else:
            call[f"{prefix}prompt_embeds"] = torch.randn(*text, LUMINA_TEXT, **kind)
            mask = torch.ones(text, dtype=torch.long, device=options.device)
            call[f"{prefix}prompt_attention_mask"] = mask
    channels = {"sd3": 16, "lumina": 4}[options.family]
    call["latents"] = torch.randn(options.batch, channels, side, side, **kind)
    return call
