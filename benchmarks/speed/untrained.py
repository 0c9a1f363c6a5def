"""Pipelines of random weights in the shapes of published models, to time their loops.

They have no text encoders and no autoencoder; text comes as random numbers, and latents go out.
`options` are those of `benchmarks.speed.end_to_end`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
)

import ras
from ras.cli.loading import DTYPES

GRAPHS = 64  # of one block; PyTorch allows 8


class Model(NamedTuple):
    """What a family's pipeline is made of, and what it is called with.

    Attributes:
        pipeline: Its class.
        transformer: Makes that of the shape which the options give and a width of text.
        text: Width of text.
        latents: The shape of a sample's, from how many tokens the image has a side.
        pooled: Width of pooled text; 0 if there is none.
        mask: The argument that is the text's mask.
        scale: The argument that guidance goes by.
    """

    pipeline: Any
    transformer: Callable[[argparse.Namespace, Model], Any]
    text: int
    latents: Callable[[int], tuple[int, ...]]
    pooled: int = 0
    mask: str | None = None
    scale: str = "guidance_scale"


def build(options: argparse.Namespace) -> DiffusionPipeline:
    torch.manual_seed(0)
    model = MODELS[options.family]
    with torch.device(options.device):  # a GPU is quick at drawing billions of weights
        transformer = model.transformer(options, model)
    cast(transformer, DTYPES[options.dtype])
    transformer.to(options.device)
    if options.compile:
        # For all settings that are timed together; older versions take no limit by argument.
        torch._dynamo.config.recompile_limit = GRAPHS
        # No graph for shapes of all kinds, which is slower: those of a setting stay.
        static = dict(fullgraph=True, dynamic=False)
        ras.compile_repeated_blocks(transformer, backend=options.compile, **static)
    missing = dict.fromkeys(model.pipeline._get_signature_types())
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = model.pipeline(**missing | {"transformer": transformer, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cast(transformer: Any, dtype: torch.dtype) -> None:
    """Do what `from_pretrained` does with a dtype: Wan's norms, for instance, stay in float32."""
    kept = {*(transformer._keep_in_fp32_modules or ())}
    for name, tensor in chain(transformer.named_parameters(), transformer.named_buffers()):
        if tensor.is_floating_point() and kept.isdisjoint(name.split(".")):
            tensor.data = tensor.to(dtype)


# --- transformers ---------------------------------------------------------------------------------


def sd3(options: argparse.Namespace, model: Model) -> SD3Transformer2DModel:
    side = math.isqrt(options.image_tokens)
    return SD3Transformer2DModel(
        sample_size=2 * side,
        num_layers=options.layers,
        num_attention_heads=options.heads,
        attention_head_dim=options.head_dim,
        caption_projection_dim=options.heads * options.head_dim,
        joint_attention_dim=model.text,
        pooled_projection_dim=model.pooled,
        pos_embed_max_size=max(192, side),
    )


def lumina(options: argparse.Namespace, model: Model) -> LuminaNextDiT2DModel:
    return LuminaNextDiT2DModel(
        sample_size=2 * math.isqrt(options.image_tokens),
        num_layers=options.layers,
        hidden_size=options.heads * options.head_dim,
        num_attention_heads=options.heads,
        num_kv_heads=max(1, options.heads // 4),
        cross_attention_dim=model.text,
    )


def flux(options: argparse.Namespace, model: Model) -> FluxTransformer2DModel:
    """Two single blocks for each double one, as FLUX.1-dev has 38 and 19."""
    return FluxTransformer2DModel(
        num_layers=options.layers,
        num_single_layers=2 * options.layers,
        num_attention_heads=options.heads,
        attention_head_dim=options.head_dim,
        joint_attention_dim=model.text,
        pooled_projection_dim=model.pooled,
        guidance_embeds=True,
        axes_dims_rope=axes(options.head_dim),
    )


def qwen(options: argparse.Namespace, model: Model) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        num_layers=options.layers,
        num_attention_heads=options.heads,
        attention_head_dim=options.head_dim,
        joint_attention_dim=model.text,
        axes_dims_rope=axes(options.head_dim),
    )


def axes(head_dim: int) -> tuple[int, int, int]:
    """How a head is divided among the three positions of a token: (16, 56, 56) of 128."""
    half = 7 * head_dim // 16
    return head_dim - 2 * half, half, half


def wan(options: argparse.Namespace, model: Model) -> WanTransformer3DModel:
    width = options.heads * options.head_dim
    return WanTransformer3DModel(
        num_layers=options.layers,
        num_attention_heads=options.heads,
        attention_head_dim=options.head_dim,
        ffn_dim=35 * width // 6,  # 8960 of 1536
        text_dim=model.text,
    )


MODELS = {
    "sd3": Model(
        StableDiffusion3Pipeline,
        sd3,
        text=4096,
        latents=lambda side: (16, 2 * side, 2 * side),
        pooled=2048,
    ),
    "lumina": Model(
        LuminaPipeline,
        lumina,
        text=2048,
        latents=lambda side: (4, 2 * side, 2 * side),
        mask="prompt_attention_mask",
    ),
    "flux": Model(
        FluxPipeline,
        flux,
        text=4096,
        latents=lambda side: (side**2, 64),
        pooled=768,
        scale="true_cfg_scale",
    ),
    "qwen": Model(
        QwenImagePipeline,
        qwen,
        text=3584,
        latents=lambda side: (side**2, 64),
        mask="prompt_embeds_mask",
        scale="true_cfg_scale",
    ),
    "wan": Model(
        WanPipeline,
        wan,
        text=4096,
        latents=lambda side: (16, 1, 2 * side, 2 * side),
    ),
}


# --- calls ----------------------------------------------------------------------------------------


def inputs(options: argparse.Namespace) -> dict[str, Any]:
    """The call's arguments."""
    model, side = MODELS[options.family], math.isqrt(options.image_tokens)
    kind: dict[str, Any] = dict(device=options.device, dtype=DTYPES[options.dtype])
    text = options.batch, options.text_tokens
    call: dict[str, Any] = {
        "height": 16 * side,
        "width": 16 * side,
        model.scale: 4.0 if options.guidance else 1.0,
        "output_type": "latent",
        "num_inference_steps": options.steps,
        "latents": torch.randn(options.batch, *model.latents(side), **kind),
    }
    for prefix in ("", "negative_") if options.guidance else ("",):
        call[f"{prefix}prompt_embeds"] = torch.randn(*text, model.text, **kind)
        if model.pooled:
            pooled = torch.randn(options.batch, model.pooled, **kind)
            call[f"{prefix}pooled_prompt_embeds"] = pooled
        if model.mask:
            mask = torch.ones(text, dtype=torch.long, device=options.device)
            call[f"{prefix}{model.mask}"] = mask
    return call
