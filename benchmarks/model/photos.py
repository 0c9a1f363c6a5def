"""A model of photographs to judge by: class-conditional, in pixels, of 1,024 tokens.

    pip install scikit-image scikit-learn
    python -m benchmarks.model.photos --work work --out photos
    python -m benchmarks.model.photos --out photos --sheet sheet.png

A `DiTTransformer2DModel` learns random crops of the photographs that come with scikit-image and
scikit-learn; which photograph it is is the class. No constant of `ras` was chosen on it. The
weights in `weights/photos` are of 2,000 steps; `benchmarks.quality.pareto` judges by them. Training
resumes from the checkpoint in `--work`, with the batches that `(seed, step)` determine.

Images are (3, 64, 64) float32 in [-1, 1], of patches of 2 x 2; what is predicted is noise - image.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from PIL import Image
from torch import Tensor, nn

from ..commands import as_command
from .sd3 import begin_with_zeros
from .train import lower_precision, train_average, train_or_draw

SIDE = 64
BATCH = 12
SHIFT = 3.0
NULL = 1000  # the class that `DiTPipeline` guides away from
NAMES = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png"),
    *("coffee.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png"),
    *("moon.png", "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg"),
    *("china.jpg", "flower.jpg"),
)
"""The photographs; a class is a place in this list."""


def photographs() -> list[Image.Image]:
    """Those of `NAMES`, in colour."""
    import skimage.data
    import sklearn.datasets

    folders = Path(skimage.data.data_dir), Path(sklearn.datasets.__file__).parent / "images"
    found = [next(path / name for path in folders if (path / name).exists()) for name in NAMES]
    return [Image.open(path).convert("RGB") for path in found]


def crop(photo: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """A random crop, of a random size of at least 64 pixels, perhaps mirrored: (3, 64, 64)."""
    side = SIDE * (min(photo.size) / SIDE) ** rng.random()
    left, top = (rng.random(2) * (np.array(photo.size) - side)).tolist()
    box = (left, top, left + side, top + side)
    pixels = np.asarray(photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box, reducing_gap=3))
    pixels = pixels[:, ::-1] if rng.random() < 0.5 else pixels
    return np.moveaxis(pixels, -1, 0)


class Pixels(nn.Module):
    """Stands in for a VAE: latents are pixels."""

    config = SimpleNamespace(scaling_factor=1.0)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(0))  # which moves along with the pipeline

    @property
    def device(self) -> torch.device:
        return self.place.device

    @property
    def dtype(self) -> torch.dtype:
        return self.place.dtype

    def decode(self, latents: Tensor) -> Any:
        return SimpleNamespace(sample=latents)


def build_pipeline(seed: int = 0) -> Any:
    """The pipeline, untrained."""
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=3,
        out_channels=3,
        num_layers=8,
        sample_size=SIDE,
        patch_size=2,
        num_embeds_ada_norm=NULL,
    )
    # Blocks begin as the identity.
    blocks = transformer.transformer_blocks
    begin_with_zeros(*(block.norm1.linear for block in blocks), transformer.proj_out_2)
    # Of first order it is Euler's method; the pipeline calls what diffusers' Euler does not have.
    scheduler: Any = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, solver_order=1
    )
    vae: Any = Pixels()
    pipe = DiTPipeline(transformer, vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(folder: Path) -> Any:
    """The pipeline of a folder that training has written."""
    pipe = build_pipeline()
    pipe.transformer = DiTTransformer2DModel.from_pretrained(folder).float()
    return pipe


def flow_loss(network: Any, photos: list[Image.Image], seed: int, step: int) -> Tensor:
    """The mean squared error of the velocity, noise - image, on the batch of (seed, step)."""
    rng = np.random.default_rng((seed, step))
    classes = rng.integers(len(photos), size=BATCH)
    images = torch.from_numpy(np.stack([crop(photos[i], rng) for i in classes])) / 127.5 - 1
    noise = torch.from_numpy(rng.standard_normal(images.shape, np.float32))
    u = torch.from_numpy(rng.standard_normal(BATCH, np.float32)).sigmoid()
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    labels = torch.from_numpy(np.where(rng.random(BATCH) < 0.1, NULL, classes))
    with lower_precision("cpu"):
        noisy = torch.lerp(images, noise, sigma[:, None, None, None])
        velocity = network(noisy, 1000 * sigma, labels, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - images)


def train(work: Path, out: Path, steps: int, seed: int) -> None:
    """Train on the CPU, leaving the moving average of the weights in `out`."""
    photos = photographs()
    average = build_pipeline(seed).transformer

    def loss(network: nn.Module, step: int) -> Tensor:
        return flow_loss(network, photos, seed, step)

    def keep() -> None:
        copy.deepcopy(average).half().save_pretrained(out)

    train_average("photos", average, work / "photos.pt", steps, BATCH, loss, keep)


def draw_sheet(out: Path, sheet: Path) -> None:
    """Draw each class from two seeds, as one PNG."""
    pipe, columns = load(out), 8
    classes = [place for place in range(len(NAMES)) for _ in range(2)]
    page = Image.new("RGB", (columns * SIDE, math.ceil(len(classes) / columns) * SIDE))
    for i, place in enumerate(classes):
        generator = torch.Generator().manual_seed(i)
        image = pipe([place], num_inference_steps=28, guidance_scale=4.0, generator=generator)
        page.paste(image.images[0], (i % columns * SIDE, i // columns * SIDE))
    page.save(sheet)


def main() -> None:
    train_or_draw(__doc__, train, draw_sheet, steps=6000)


if __name__ == "__main__":
    as_command(main)
