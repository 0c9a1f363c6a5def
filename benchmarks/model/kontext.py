"""Train the editing model: a tiny `FluxKontextPipeline` that follows instructions.

    python -m benchmarks.model.kontext --work work --out editing
    python -m benchmarks.model.kontext --out editing --sheet sheet.png

FLUX.1-Kontext's form, without guidance: the reference's tokens come after the image's, the
instruction is text. It learns from the edits of `benchmarks.model.edits`, through the bundled
model's autoencoder. Training resumes from the checkpoint in `--work`, with the batches that
`(seed, step)` determine. The second form draws unseen edits: reference, result, and what was asked.

Images are (3, 256, 256) in [-1, 1]; latents are (8, 32, 32), of mean 0 and standard deviation 1;
the transformer sees 256 tokens of the image, 256 of the reference and 16 of text.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPTextModel

from ..commands import as_command
from . import edits
from .scenes import Scene
from .sd3 import (
    LATENT,
    SIDE,
    begin_with_zeros,
    build_text_encoder,
    bundled_vae,
    export,
    load,
    write_tokenizer,
)
from .train import UNSEEN, lower_precision, train_average, train_or_draw

PAIRS = 16_000  # to train on, each in both directions
SHARES = {  # of a batch: what is harder to learn comes more often
    "shape": 0.35,
    "place": 0.15,
    "presence": 0.15,
    "texture": 0.15,
    "colour": 0.1,
    "background": 0.1,
}
BATCH = 16
TEXT_TOKENS = 16  # the longest instruction takes 9, and the two end marks
TEXT_WIDTH = 128
SHIFT = 3.0
CHANGED = 0.05  # squared difference of latents above which an edit changes a token


def build_transformer() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT[0],
        num_layers=2,
        num_single_layers=5,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 28, 28),
    )
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    # Blocks begin as the identity.
    begin_with_zeros(*(m for name, m in linears if ".norm" in name or name == "proj_out"))
    return model


def build_pipeline(work: Path, seed: int) -> FluxKontextPipeline:
    """The pipeline, untrained but for its autoencoder."""
    torch.manual_seed(seed)
    tokenizer = write_tokenizer(work / "tokenizer", edits.words(), TEXT_TOKENS)
    encoder = build_text_encoder(tokenizer, 1, TEXT_WIDTH, TEXT_TOKENS, CLIPTextModel)
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=bundled_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        transformer=build_transformer(),
    )


def draw(seeds: list[int]) -> Tensor:
    """The scenes before and after the edits of the seeds: (N, 2, 3, 256, 256) uint8."""
    chosen = [edits.sample(seed) for seed in seeds]
    pairs = np.stack([[e.before.draw(SIDE), e.after.draw(SIDE)] for e in chosen])
    return torch.from_numpy(pairs).movedim(-1, 2)


def encode(pipe: FluxKontextPipeline, work: Path) -> np.memmap:
    """The latents before and after, (PAIRS, 2, 8, 32, 32) float16, packed as the model reads them:
    (PAIRS, 2, 256, 32)."""
    path, mark = work / "edits.npy", work / "edits.json"
    done = json.loads(mark.read_text()) if mark.exists() else 0
    latents = np.lib.format.open_memmap(
        path, "r+" if done else "w+", np.float16, (PAIRS, 2, 256, 4 * LATENT[0])
    )
    if len(latents) != PAIRS:
        raise ValueError(f"{path} has {len(latents)} pairs, not {PAIRS}; name another --work")
    vae = pipe.vae.to(memory_format=torch.channels_last)
    config = vae.config
    seeds = range(done, PAIRS)
    for batch in DataLoader(seeds, batch_size=4, num_workers=1, collate_fn=draw):
        pixels = (batch.flatten(0, 1) / 127.5 - 1).to(memory_format=torch.channels_last)
        with torch.no_grad(), lower_precision("cpu"):
            mean = vae.encoder(pixels)[:, : LATENT[0]].float()
        normal = (mean - config.shift_factor) * config.scaling_factor
        packed = pipe._pack_latents(normal, len(normal), *LATENT)
        latents[done : done + len(batch)] = packed.unflatten(0, (-1, 2)).numpy()
        done += len(batch)
        if done % 200 == 0:
            latents.flush()
            mark.write_text(json.dumps(done))
            print(f"encoded {done}/{PAIRS}", flush=True)
    return latents


def embed(pipe: FluxKontextPipeline, instructions: list[str]) -> dict[str, Tensor]:
    """Text states (N, 16, 128), pooled ones (N, 128) and ids, as the transformer takes them."""
    states, pooled, ids = pipe.encode_prompt(instructions, None, max_sequence_length=TEXT_TOKENS)
    return {"encoder_hidden_states": states, "pooled_projections": pooled, "txt_ids": ids}


def odds() -> np.ndarray:
    """How likely a batch's next pair is each of `PAIRS`, by the kind of its edit."""
    kinds = [edits.sample(seed).kind for seed in range(PAIRS)]
    weights = np.array([SHARES[kind] / kinds.count(kind) for kind in kinds])
    return weights / weights.sum()


def flow_loss(
    network: nn.Module,
    pipe: FluxKontextPipeline,
    latents: np.memmap,
    odds: np.ndarray,
    seed: int,
    step: int,
) -> Tensor:
    """The squared error of the velocity, noise - latent, on the batch of (seed, step).

    Of each edit, what it changes weighs as much as what it leaves: a new shape is a few tokens,
    and were lost among those of a new background.
    """
    rng = np.random.default_rng((seed, step))
    chosen = rng.choice(len(latents), BATCH, replace=False, p=odds)
    backwards = rng.random(BATCH) < 0.5
    asked = [edits.sample(int(i)) for i in chosen]
    asked = [e.reversed() if back else e for e, back in zip(asked, backwards, strict=True)]
    pairs = torch.from_numpy(latents[chosen].astype(np.float32))
    pairs[backwards] = pairs[backwards].flip(1)
    reference, image = pairs.unbind(1)
    noise = torch.from_numpy(rng.standard_normal(image.shape, np.float32))
    u = torch.from_numpy(rng.standard_normal(BATCH, np.float32)).sigmoid()
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    noisy = torch.lerp(image, noise, sigma[:, None, None])
    ids = pipe._prepare_latent_image_ids(BATCH, 16, 16, "cpu", torch.float32)
    kept = ids.clone()
    kept[..., 0] = 1
    text = embed(pipe, [edit.instruction() for edit in asked])
    with lower_precision("cpu"):
        velocity = network(
            torch.cat([noisy, reference], 1),
            timestep=sigma,
            img_ids=torch.cat([ids, kept]),
            return_dict=False,
            **text,
        )[0][:, :256]
    error = (velocity.float() - (noise - image)).square().mean(-1)
    changed = (image - reference).square().mean(-1) > CHANGED
    parts = [(error * part).sum(1) / part.sum(1).clamp(min=1) for part in (changed, ~changed)]
    return torch.stack(parts).mean()


def train(work: Path, out: Path, steps: int, seed: int) -> None:
    """Train on the CPU, leaving the pipeline with the moving average of the weights in `out`."""
    pipe = build_pipeline(work, seed)
    latents, chances = encode(pipe, work), odds()

    def loss(network: nn.Module, step: int) -> Tensor:
        return flow_loss(network, pipe, latents, chances, seed, step)

    def keep() -> None:
        export(pipe, out, edits.words(), TEXT_TOKENS)

    train_average("kontext", pipe.transformer, work / "kontext.pt", steps, BATCH, loss, keep)


def unseen() -> Iterator[edits.Edit]:
    """Edits from `UNSEEN` on, without those that the model was trained on in either direction."""

    def scenes_of(edit: edits.Edit) -> frozenset[Scene]:
        return frozenset(replace(scene, seed=0) for scene in (edit.before, edit.after))

    seen = {scenes_of(edits.sample(seed)) for seed in range(PAIRS)}
    fresh = (edits.sample(seed) for seed in range(UNSEEN, 2 * UNSEEN))
    return (edit for edit in fresh if scenes_of(edit) not in seen)


def call(edit: edits.Edit) -> dict[str, Any]:
    """What the pipeline takes for an edit: its arguments by name."""
    return {
        "image": Image.fromarray(edit.before.draw(SIDE)),
        "prompt": edit.instruction(),
        "max_sequence_length": TEXT_TOKENS,
        "height": SIDE,
        "width": SIDE,
        "max_area": SIDE * SIDE,
        "_auto_resize": False,
    }


def draw_sheet(out: Path, sheet: Path, count: int = 24) -> None:
    """Draw unseen edits, each from the seed of its number: reference, result, what was asked."""
    pipe, columns, height = load(out), 4, SIDE + 30
    page = Image.new("RGB", (columns * 3 * SIDE, math.ceil(count / columns) * height), "white")
    pen = ImageDraw.Draw(page)
    for i, edit in enumerate(islice(unseen(), count)):
        result = pipe(**call(edit), generator=torch.Generator().manual_seed(i)).images[0]
        x, y = i % columns * 3 * SIDE, i // columns * height
        shown = call(edit)["image"], result, Image.fromarray(edit.after.draw(SIDE))
        for place, image in enumerate(shown):
            page.paste(image, (x + place * SIDE, y))
        pen.text((x + 4, y + SIDE + 2), textwrap.fill(edit.instruction(), 80), fill="black")
    page.save(sheet)


def main() -> None:
    train_or_draw(__doc__, train, draw_sheet, steps=8400)


if __name__ == "__main__":
    as_command(main)
