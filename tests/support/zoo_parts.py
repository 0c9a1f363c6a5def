"""What the pipelines of `zoo.py` are made of: an entry's record, and how to build and call one."""

import inspect
from types import SimpleNamespace
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import diffusers
import torch
import torch.nn.functional as F
from PIL import Image

from support.pipelines import autoencoder, euler, normal, quiet, randomise

SIDE = 128  # pixels along each side of an image
WIDTH = 32  # features of a text token
BLOCKS = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2)
ROPE = (4, 6, 6)  # how the 16 features of a head are divided between the axes


@dataclass(frozen=True)
class Entry:
    """A pipeline: `build()` gives it and `call(steps, **more)`, which gives its latents.

    Each of `transformers` is an attribute of the pipeline that denoises, and `calls` is how often
    a step calls all of them together. A run of n steps makes `before` calls ahead of the loop,
    and n times `steps` calls of `pipe.scheduler.step`, or `count(n)`, if that is given.
    """

    build: Callable
    calls: int = 1
    transformers: tuple[str, ...] = ("transformer",)
    modality: str = "image"
    before: int = 0
    total: Callable[[int], int] | None = None
    steps: Callable[[int], int] = lambda n: n
    note: str = ""

    def forwards(self, n):
        """Return how many transformer calls a run of n steps makes."""
        return self.total(n) if self.total else self.before + n * self.calls


def model(name, seed=0, **config):
    """Return a model of diffusers with weights that all matter."""
    torch.manual_seed(seed)
    return randomise(getattr(diffusers, name)(**config), seed)


def pipeline(name, **parts):
    """Return a pipeline of diffusers; the parts that are not given are None."""
    cls = getattr(diffusers, name)
    wanted = inspect.signature(cls.__init__).parameters.values()
    absent = {p.name: None for p in wanted if p.default is p.empty and p.name != "self"}
    return quiet(cls(**{**absent, "scheduler": euler(), **parts}))


def calling(pipe, take=itemgetter(0), **inputs):
    """Return the pipeline and what runs it, from the same noise each time."""

    def call(steps, **more):
        torch.manual_seed(7)
        options = dict(
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(7),
            output_type="latent",
        )
        return take(pipe(**{**options, **inputs, **more}))

    return pipe, call


def text(length=8, seed=1, shape=(), width=WIDTH):
    return normal(1, length, *shape, width, seed=seed)


def guided(
    length=8,
    masks=None,
    names=("prompt_embeds", "negative_prompt_embeds"),
    dtype=torch.long,
    **size,
):
    """Return two unlike prompts; `masks` is what their masks' names end with, if they have any."""
    prompts = {name: text(length, seed=i, **size) for i, name in enumerate(names, 1)}
    if masks:
        ones = torch.ones(1, length, dtype=dtype)
        prompts |= {f"{start}prompt_{masks}": ones for start in ("", "negative_")}
    return prompts


def square(side=SIDE):
    return dict(height=side, width=side)


def picture(height=64, width=64):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(9))


def pil(height=64, width=64):
    pixels = (picture(height, width)[0] * 255).permute(1, 2, 0).byte()
    return Image.fromarray(pixels.numpy())


class Shrink:
    """As much of an autoencoder as pipelines ask for: latents are means over squares of pixels."""

    dtype = torch.float32

    def __init__(self, channels, factor, **config):
        self.factor = factor
        self.temperal_downsample = [True] * (factor.bit_length() - 1)
        self.config = SimpleNamespace(
            z_dim=channels,
            latent_channels=channels,
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
            block_out_channels=[4] * factor.bit_length(),
            **config,
        )

    def encode(self, pictures):
        means = F.avg_pool3d(pictures, (1, self.factor, self.factor))
        channels = torch.arange(self.config.z_dim) % means.shape[1]
        return SimpleNamespace(latents=means[:, channels])


class Safe:
    """A safety checker that lets all through."""

    def to(self, device):
        return self

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video
