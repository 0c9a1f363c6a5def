"""What the ruler has drawn: prompts, the noise of seeds, latents and images."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from diffusers import DiffusionPipeline, LuminaPipeline
from torch import Tensor

import ras
from ras.cli.generate import clock

from ..model import lumina, scenes, sd3, train
from .setting import STEPS

EMBEDS = {  # what encode_prompt returns, by whether it is Lumina's
    False: (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    True: (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    ),
}
CALIBRATION = 2  # captions to calibrate with, of scenes that training saw


def unseen(options: argparse.Namespace) -> list[scenes.Scene]:
    return halved(list(islice(train.unseen(), options.count)), options.half)


def prompts(
    options: argparse.Namespace, captioned: list[scenes.Scene] | None
) -> list[tuple[int, str]]:
    """The seeds of the noise, which are those of all prompts for a half as well, and the texts."""
    seeds = halved(list(range(options.count)), options.half)
    if captioned is not None:
        texts = [scene.caption() for scene in captioned]
    elif options.prompts:
        lines = options.prompts.read_text(encoding="utf-8").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        texts = halved(lines[: options.count], options.half)
    else:
        texts = [scenes.sample(train.UNSEEN + seed).caption() for seed in seeds]
    return list(zip(seeds, texts))


def halved(values: list[Any], half: str | None) -> list[Any]:
    return values if half is None else values[half == "b" :: 2]


@torch.no_grad()
def encode(pipe: DiffusionPipeline, batch: list[tuple[int, str]]) -> dict[str, Any]:
    """What `draw` needs of prompts, which are seeds of the noise and texts."""
    texts = [text for _, text in batch]
    is_lumina = isinstance(pipe, LuminaPipeline)
    # SD3's third encoder has 256 tokens, or there are zeros in its stead.
    others = {} if is_lumina else {"prompt_2": None, "prompt_3": None}
    tokens = 0 if of_scenes(pipe) else 256
    embeds = pipe.encode_prompt(texts, **others, max_sequence_length=tokens)
    return {"seeds": [seed for seed, _ in batch], **dict(zip(EMBEDS[is_lumina], embeds))}


def draw(pipe: DiffusionPipeline, inputs: dict[str, Any], steps: int) -> Tensor:
    """The latents, (B, C, H, W), that the pipeline ends with."""
    return pipe(
        **{name: value for name, value in inputs.items() if name != "seeds"},
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in inputs["seeds"]],
        num_inference_steps=steps,
        guidance_scale=4.0,
        output_type="latent",
    ).images


def timed(
    pipe: DiffusionPipeline, settings: dict[str, Any] | None, **call: Any
) -> tuple[Tensor, float, float | None]:
    """The images of a call, its seconds and, with settings of RAS, the ceiling on its speed-up."""
    with nullcontext() if settings is None else ras.enabled(pipe, **settings):
        start = clock("cpu")
        latents = pipe(**call, max_sequence_length=0, output_type="latent").images
        seconds = clock("cpu") - start
        ceiling = None if settings is None else ras.stats(pipe).speedup_ceiling
    return decode(pipe, latents), seconds, ceiling


def calibrate(pipe: DiffusionPipeline) -> None:
    """A run for the methods that have to learn something of the model first."""
    captions = [(seed, scenes.sample(seed).caption()) for seed in range(CALIBRATION)]
    draw(pipe, encode(pipe, captions), STEPS)


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """The images, (B, 3, H, W) float32 in [0, 1] on the CPU."""
    config = pipe.vae.config
    latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
    images = pipe.vae.decode(latents, return_dict=False)[0]
    return pipe.image_processor.postprocess(images, output_type="pt").float().cpu()


def of_scenes(pipe: DiffusionPipeline) -> bool:
    """Whether it is a model of `benchmarks.model.train`, by the sizes of its image and its text."""
    config = pipe.transformer.config
    text = config.get("joint_attention_dim", config.get("cross_attention_dim"))
    widths = {lumina.TEXT_WIDTH, 2 * sd3.TEXT_WIDTH}
    return (config.in_channels, config.sample_size) == sd3.LATENT[:2] and text in widths
