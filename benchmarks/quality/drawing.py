"""The models that the ruler judges by, and what it has drawn with them: items, latents, images.

An item is what an image is drawn of, with the seed of its noise: a caption, an instruction and the
picture to edit, or a photograph's name, by the pipeline's class.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import ras
from ras.cli.runs import clock

from ..model import edits, kontext, lumina, photos, scenes, sd3, train
from .setting import STEPS

WEIGHTS = Path(photos.__file__).parent / "weights"
MODELS: dict[str, tuple[Path, Callable[[Path], Any]]] = {
    "bundled": (ras.bundled_model(), sd3.load),
    "lumina": (WEIGHTS / "lumina", sd3.load),
    "photos": (WEIGHTS / "photos", photos.load),
    "kontext": (ras.bundled_model("edit"), sd3.load),
}
"""The models at hand by name: folder, and what loads it.

Constants of `ras` were chosen on "bundled" alone."""

GUIDANCE = 4.0
EMBEDS = {  # what encode_prompt returns
    "StableDiffusion3Pipeline": (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
    "LuminaPipeline": (
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    ),
    "FluxKontextPipeline": ("prompt_embeds", "pooled_prompt_embeds"),
}
CALIBRATION = 2  # items to calibrate with, of scenes that training saw


@dataclass(frozen=True)
class Item:
    """What an image is drawn of.

    Attributes:
        seed: Of its noise.
        text: The caption, the instruction or the photograph's name.
        scene: What there should be to see, where that is known.
        before: What there is to see in the picture to edit.
    """

    seed: int
    text: str
    scene: scenes.Scene | None = None
    before: scenes.Scene | None = None


def model(name: str) -> Any:
    """The pipeline of a name in `MODELS`, or of a folder."""
    folder, load = MODELS.get(name, (Path(name), sd3.load))
    return load(folder)


def items(pipe: DiffusionPipeline, options: argparse.Namespace) -> list[Item]:
    """What to draw: of an option `count`, of both halves together, those of `half`.

    With the option `prompts`, a file of a prompt a line, it is these.
    """
    count, kind = options.count, type(pipe).__name__
    file = getattr(options, "prompts", None)
    if file:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        found = [Item(i, line) for i, line in enumerate(filter(None, lines))][:count]
    elif kind == "DiTPipeline":
        every = len(photos.NAMES) / count
        names = [photos.NAMES[int(i * every) % len(photos.NAMES)] for i in range(count)]
        found = [Item(i, name) for i, name in enumerate(names)]
    elif kind == "FluxKontextPipeline":
        asked = enumerate(islice(kontext.unseen(), count))
        found = [Item(i, e.instruction(), e.after, e.before) for i, e in asked]
    elif of_scenes(pipe):
        drawn = enumerate(islice(train.unseen(), count))
        found = [Item(i, scene.caption(), scene) for i, scene in drawn]
    else:
        texts = (scenes.sample(train.UNSEEN + seed).caption() for seed in range(count))
        found = [Item(i, text) for i, text in enumerate(texts)]
    return halved(found, options.half)


def seen(pipe: DiffusionPipeline, count: int) -> list[Item]:
    """Items that are not among those to be judged, for what has to learn of the model first."""
    kind = type(pipe).__name__
    if kind == "DiTPipeline":
        return [Item(1000 + i, photos.NAMES[(7 * i + 5) % len(photos.NAMES)]) for i in range(count)]
    if kind == "FluxKontextPipeline":
        asked = [edits.sample(seed) for seed in range(count)]
        return [Item(i, e.instruction(), e.after, e.before) for i, e in enumerate(asked)]
    return [Item(i, scenes.sample(i).caption()) for i in range(count)]


def halved(values: list[Any], half: str | None) -> list[Any]:
    return values if half is None else values[half == "b" :: 2]


@torch.no_grad()
def encode(pipe: DiffusionPipeline, batch: list[Item]) -> dict[str, Any]:
    """What `draw` needs of items: the seeds of the noise, and arguments of the pipeline."""
    kind = type(pipe).__name__
    inputs: dict[str, Any] = {"seeds": [item.seed for item in batch]}
    texts = [item.text for item in batch]
    if kind == "DiTPipeline":
        return inputs | {"class_labels": [photos.NAMES.index(text) for text in texts]}
    options: dict[str, Any] = {"prompt_2": None, "prompt_3": None}
    options["max_sequence_length"] = 0 if of_scenes(pipe) else 256  # without T5 there are zeros
    if kind == "LuminaPipeline":
        options = {}
    if kind == "FluxKontextPipeline":
        options = {"prompt_2": None, "max_sequence_length": kontext.TEXT_TOKENS}
        pictures = torch.stack(
            [torch.from_numpy(i.before.draw(sd3.SIDE)) for i in batch if i.before]
        )
        pixels = (pictures.movedim(-1, 1) / 127.5 - 1).to(pipe.device, pipe.vae.dtype)
        inputs |= {"image": pipe._encode_vae_image(pixels, None), "_auto_resize": False}
        inputs |= {"height": sd3.SIDE, "width": sd3.SIDE, "max_area": sd3.SIDE**2}
    return inputs | dict(zip(EMBEDS[kind], pipe.encode_prompt(texts, **options)))


def draw(
    pipe: DiffusionPipeline,
    inputs: dict[str, Any],
    steps: int,
    guidance: float = GUIDANCE,
    call: Callable[..., Any] | None = None,
) -> Tensor:
    """What the pipeline ends with: latents, (B, C, H, W), or where these are pixels, images.

    `call` is called in its place.
    """
    kind, make = type(pipe).__name__, pipe if call is None else call
    end: Any = make(
        **{name: value for name, value in inputs.items() if name != "seeds"},
        **({} if kind == "FluxKontextPipeline" else {"guidance_scale": guidance}),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in inputs["seeds"]],
        num_inference_steps=steps,
        output_type="np" if kind == "DiTPipeline" else "latent",
    ).images
    return torch.from_numpy(end).movedim(-1, 1) if kind == "DiTPipeline" else unpacked(pipe, end)


def packed(pipe: Any, latents: Tensor) -> Tensor:
    """Latents `(B, C, H, W)` in the form that the pipeline steps."""
    flux = type(pipe).__name__ == "FluxKontextPipeline"
    return pipe._pack_latents(latents, *latents.shape) if flux else latents


def unpacked(pipe: Any, latents: Tensor) -> Tensor:
    """Latents `(B, C, H, W)` of what the pipeline ends with."""
    flux = type(pipe).__name__ == "FluxKontextPipeline"
    size = sd3.SIDE, sd3.SIDE, pipe.vae_scale_factor
    return pipe._unpack_latents(latents, *size) if flux else latents


def timed(
    pipe: DiffusionPipeline, settings: dict[str, Any] | None, **call: Any
) -> tuple[Tensor, float, float | None]:
    """The images of a call, its seconds and, with settings of RAS, the ceiling on its speed-up."""
    with nullcontext() if settings is None else ras.enabled(pipe, **settings):
        start = clock("cpu")
        latents = pipe(**call, max_sequence_length=0, output_type="latent").images
        seconds = clock("cpu") - start
        ceiling = None if settings is None else ras.stats(pipe).speedup_ceiling
    return decode(pipe, unpacked(pipe, latents)), seconds, ceiling


def calibrate(
    pipe: DiffusionPipeline,
    count: int = CALIBRATION,
    guidance: float = GUIDANCE,
    call: Callable[..., Any] | None = None,
) -> None:
    """A run for the methods that have to learn something of the model first; see `draw`."""
    draw(pipe, encode(pipe, seen(pipe, count)), STEPS, guidance, call)


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """The images, (B, 3, H, W) float32 in [0, 1] on the CPU, of what `draw` returns."""
    if type(pipe).__name__ == "DiTPipeline":
        return latents
    config = pipe.vae.config
    latents = latents / config.scaling_factor + (config.shift_factor or 0.0)
    images = pipe.vae.decode(latents, return_dict=False)[0]
    return pipe.image_processor.postprocess(images, output_type="pt").float().cpu()


def of_scenes(pipe: DiffusionPipeline) -> bool:
    """Whether it is a model of drawn scenes, by the sizes of its image and its text."""
    if type(pipe).__name__ == "FluxKontextPipeline":
        return True
    config = pipe.transformer.config
    text = config.get("joint_attention_dim", config.get("cross_attention_dim"))
    widths = {lumina.TEXT_WIDTH, 2 * sd3.TEXT_WIDTH}
    return (config.in_channels, config.get("sample_size")) == sd3.LATENT[:2] and text in widths
