"""What the pipelines of the zoo are made of: their record, their parts and their inputs."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from types import SimpleNamespace

import diffusers
import torch
import torch.nn.functional as F
from PIL import Image

from support.pipelines import euler, normal, quiet, randomise

SIDE = 128  # pixels along each side of an image
WIDTH = 32  # features of a text token
BLOCKS = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2)
CHANNELS = dict(in_channels=4, out_channels=4)
ROPE = (4, 6, 6)  # how the 16 features of a head are divided between the axes


@dataclass(frozen=True)
class Entry:
    """A pipeline, and what a run of it calls.

    `build()` returns the pipeline and `call(steps, **more)`, which runs it and returns its latents.
    `transformers` are the attributes that denoise, and `calls` is how often a step calls them, both
    together if there are two. `before` calls come ahead of the first step. Where that is not all,
    `total(n)` says how many calls a run of n steps makes. `steps(n)` is the number of calls of
    `pipe.scheduler.step`, those of copies of the scheduler left out. Called with `two` besides, it
    makes two samples, unlike; None if it cannot, and then `note` says why.
    """

    build: Callable
    calls: int = 1
    transformers: tuple[str, ...] = ("transformer",)
    modality: str = "image"
    before: int = 0
    total: Callable[[int], int] | None = None
    steps: Callable[[int], int] = int
    two: dict | None = field(default_factory=lambda: dict(num_images_per_prompt=2))
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
    """Return the pipeline and what runs it, or another one, from the same noise each time."""

    def call(steps, on=pipe, **more):
        torch.manual_seed(7)
        options = dict(
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(7),
            output_type="latent",
        )
        return take(on(**{**options, **inputs, **more}))

    return pipe, call


def flow(name):
    """Return a multistep scheduler set to flow matching."""
    config = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return getattr(diffusers, name)(**config)


def ddim():
    """Return a scheduler of noise that does not clip, as latents of random weights grow."""
    return diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)


def text(length=8, seed=1, shape=(), width=WIDTH, batch=1):
    return normal(batch, length, *shape, width, seed=seed)


def mask(lengths=(8,), to=8, dtype=torch.long):
    """Return which tokens of each prompt are not padding: the first."""
    return (torch.arange(to) < torch.tensor(lengths)[:, None]).to(dtype)


def guided(length=8, name="embeds", masks=None, dtype=torch.long, seed=1, lengths=None, **size):
    """Return a prompt and a negative one, unlike, and their masks if these have a name.

    Where there are several, `lengths` are those of the prompts, to which padding is added, and in
    reverse order those of the negative prompts.
    """
    prompts, lengths = {}, lengths or (length,)
    for i, start in enumerate(("prompt_", "negative_prompt_")):
        prompts[start + name] = text(length, seed=seed + i, batch=len(lengths), **size)
        if masks:
            prompts[start + masks] = mask(lengths[:: 1 - 2 * i], length, dtype)
    return prompts


def square(side=SIDE):
    return dict(height=side, width=side)


def oblong(side=SIDE):
    """Return the size of an image half as wide again as it is high."""
    return dict(height=side, width=side * 3 // 2)


def picture(height=64, width=64):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(9))


def painted(side=SIDE):
    """Return a picture, where to paint it anew, and that none of it lasts into the first step."""
    image = picture(**oblong(side))
    return dict(image=image, mask_image=image[:, :1].round(), strength=1.0, **oblong(side))


def pil(height=64, width=64):
    pixels = (picture(height, width)[0] * 255).permute(1, 2, 0).byte()
    return Image.fromarray(pixels.numpy())


class Part(torch.nn.Module):
    """A part that says where it is, as those of diffusers do."""

    device, dtype = torch.device("cpu"), torch.float32


class Shrink(Part):
    """As much of an autoencoder as pipelines ask for: latents are means over squares of pixels.

    It keeps each `scale_factor_temporal`-th frame, and its `config` has what its attributes say.
    """

    def __init__(self, channels, factor, scale_factor_temporal=4, **more):
        super().__init__()
        config = dict(
            z_dim=channels,
            latent_channels=channels,
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
            block_out_channels=[4] * factor.bit_length(),
            scale_factor_spatial=factor,
            scale_factor_temporal=scale_factor_temporal,
            spatial_compression_ratio=factor,
            temporal_compression_ratio=scale_factor_temporal,
            temperal_downsample=[True] * (factor.bit_length() - 1),
        )
        vars(self).update(config | more)
        self.config = SimpleNamespace(**config | more)

    def encode(self, pictures):
        if pictures.ndim == 5:
            pictures = pictures[:, :, :: self.scale_factor_temporal]
        means = F.avg_pool3d(pictures, (1, self.scale_factor_spatial, self.scale_factor_spatial))
        channels = torch.arange(self.z_dim) % means.shape[1]
        return SimpleNamespace(latents=means[:, channels])

    def decode(self, latents, return_dict=False):
        return (latents,)


class Recording(Part):
    """As much of an autoencoder of sound as pipelines ask for: four latents a second."""

    hop_length = downsampling_ratio = 4
    config = SimpleNamespace(
        audio_channels=2, latent_dim=4, sampling_rate=16, sample_rate=16, downsampling_ratio=4
    )


class Safe:
    """A safety checker that lets all through."""

    def to(self, device):
        return self

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video
