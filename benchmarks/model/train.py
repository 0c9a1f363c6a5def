"""Train the bundled model: a tiny `StableDiffusion3Pipeline` of drawn scenes.

    python -m benchmarks.model.train --work work --out model
    python -m benchmarks.model.train --out model --sheet sheet.png

The first form trains the autoencoder, encodes the scenes, trains the transformer and writes
the pipeline folder; every stage resumes from the checkpoint it left in `--work`, with the
batches that `(seed, step)` determine. The second form draws captions that training never saw.

Images are (3, 256, 256) float32 in [-1, 1]; latents are (8, 32, 32), normalised to mean 0 and
standard deviation 1; the transformer sees 16 x 16 = 256 image tokens and 28 of text.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..commands import COUNT, STEP, as_command
from . import scenes, sd3
from .sd3 import LATENT, SIDE, build_vae, export, load

CROP = 64  # pixels of the side of the crops the autoencoder learns from
SCENES = 16_000  # to train the transformer on
UNSEEN = 10_000_000  # scenes from here on are for looking at what the model learnt
BATCH = 32
SAVE_EVERY = WARM = 100  # steps
BLOCKS = ("transformer_blocks", "single_transformer_blocks", "layers")


def lower_precision(device: str) -> torch.autocast:
    """bfloat16 in a `with` block, but for a CPU that would emulate it, some 30 times slower."""
    cpu = torch.cpu
    fast = cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()  # type: ignore[attr-defined]
    return torch.autocast(device, torch.bfloat16, enabled=device != "cpu" or fast)


def draw(seeds: list[int]) -> Tensor:
    """The scenes of the seeds: (N, 3, 256, 256) uint8."""
    return torch.from_numpy(np.stack([scenes.sample(s).draw(SIDE) for s in seeds])).movedim(-1, 1)


def images(seeds: range) -> Iterator[Tensor]:
    """Batches of up to 50 scenes, drawn in two processes: (N, 3, 256, 256) float32 in [-1, 1]."""
    for batch in DataLoader(seeds, batch_size=50, num_workers=2, collate_fn=draw):
        yield batch / 127.5 - 1


def crops(pool: Tensor, seed: int, step: int, count: int = 16) -> Tensor:
    """A step's random crops, each of another image: (count, 3, 64, 64) float32.

    Crops of one scene would tie the batch's gradient to a few colours, and stall training;
    most are taken round an object, since backgrounds are learnt at once.
    """
    rng = np.random.default_rng((seed, step))
    batch = []
    for i in rng.choice(len(pool), count, replace=False):
        corner = rng.uniform(0, SIDE - CROP, 2)
        if rng.random() < 0.7:
            place = scenes.sample(int(i)).objects[0].place
            corner = np.multiply(scenes.PLACES[place], SIDE) - rng.uniform(0.2, 0.8, 2) * CROP
        x, y = np.clip(corner, 0, SIDE - CROP).astype(int)
        batch.append(pool[i, :, y : y + CROP, x : x + CROP])
    return torch.stack(batch)


def slopes(image: Tensor) -> tuple[Tensor, Tensor]:
    return image.diff(dim=-1), image.diff(dim=-2)


def steps_left(name: str, done: int, steps: int, batch: int) -> Iterator[tuple[int, dict]]:
    """The steps still to do, each with a dict for its figures; prints means of 50 steps."""
    start, sums = time.time(), {}
    for step in range(done, steps):
        figures: dict[str, Tensor] = {}
        yield step, figures
        for key, value in figures.items():
            sums[key] = sums.get(key, 0.0) + value.detach().float().item() / 50
        if (step + 1) % 50 == 0:
            rate = (step + 1 - done) / (time.time() - start)
            text = " ".join(f"{key} {value:.4f}" for key, value in sums.items())
            eta = (steps - step - 1) / rate / 60
            print(
                f"{name} {step + 1}/{steps} {text} {rate * batch:.1f} samples/s ETA {eta:.1f} min",
                flush=True,
            )
            sums = {}


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, peak: float) -> None:
    """The learning rate of a step: it rises for `WARM` steps, and falls along a cosine."""
    rate = peak * min(1, (step + 1) / WARM) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = rate


def save(path: Path, **parts: object) -> None:
    """Write a checkpoint so that an interruption leaves the previous one whole."""
    torch.save(parts, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def train_vae(work: Path, steps: int, seed: int, device: str) -> AutoencoderKL:
    """Learn to compress crops: L1 on pixels and on their slopes, with a slight KL term."""
    torch.manual_seed(seed)
    vae = build_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0.01, betas=(0.9, 0.99))
    path, done = work / "vae.pt", 0
    if path.exists():
        state = torch.load(path, map_location=device)
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    pool = torch.cat(list(images(range(2000)))) if done < steps else None
    for step, figures in steps_left("vae", done, steps, 16):
        target = crops(pool, seed, step).to(device)
        set_rate(optimizer, step, steps, 1e-3)
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + step)
        with lower_precision(device):
            posterior = vae.encode(target).latent_dist
            latent = posterior.sample(generator)
            # The transformer's latents will not be exact, so the decoder learns to bear errors.
            noise = torch.randn(latent.shape, generator=generator, device=device)
            output = vae.decode(latent + 0.07 * noise).sample
        output = output.float()
        pairs = zip(slopes(output), slopes(target), strict=True)
        figures["l1"] = (output - target).abs().mean()
        figures["slope"] = sum((a - b).abs().mean() for a, b in pairs)
        figures["kl"] = posterior.kl().mean() / posterior.mean[0].numel()
        loss = figures["l1"] + 0.5 * figures["slope"] + 1e-4 * figures["kl"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save(path, model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step + 1)
    return vae.eval()


def encode(vae: AutoencoderKL, work: Path, device: str, count: int) -> np.memmap:
    """The scenes' latents, (count, 8, 32, 32) float16; also sets how the VAE normalises them."""
    path, mark = work / "latents.npy", work / "latents.json"
    state = json.loads(mark.read_text()) if mark.exists() else {"done": 0}
    latents = np.lib.format.open_memmap(
        path, "r+" if state["done"] else "w+", np.float16, (count, *LATENT)
    )
    for batch in images(range(state["done"], count)):
        with torch.no_grad(), lower_precision(device):
            mean = vae.encode(batch.to(device)).latent_dist.mean.float()
        if not state["done"]:
            state |= {"shift_factor": mean.mean().item(), "scaling_factor": 1 / mean.std().item()}
        first, state["done"] = state["done"], state["done"] + len(batch)
        normal = (mean - state["shift_factor"]) * state["scaling_factor"]
        latents[first : state["done"]] = normal.cpu().numpy()
        if state["done"] % 1000 == 0:
            latents.flush()
            mark.write_text(json.dumps(state))
            print(f"encoded {state['done']}/{count}", flush=True)
    vae.register_to_config(**{key: state[key] for key in ("shift_factor", "scaling_factor")})
    return latents


def flow_loss(
    network: nn.Module,
    family: ModuleType,
    pipeline: DiffusionPipeline,
    latents: np.ndarray,
    seed: int,
    step: int,
) -> Tensor:
    """The mean squared error of the velocity, noise - latent, on the batch of (seed, step)."""
    rng = np.random.default_rng((seed, step))
    chosen = rng.choice(len(latents), BATCH, replace=False)
    # The empty captions teach what guidance steers away from.
    captions = ["" if rng.random() < 0.1 else scenes.sample(int(i)).caption() for i in chosen]
    device = pipeline.device
    text = family.embed(pipeline, captions)
    latent = torch.from_numpy(latents[chosen].astype(np.float32)).to(device)
    noise = torch.from_numpy(rng.standard_normal(latent.shape, np.float32)).to(device)
    shift = pipeline.scheduler.config.shift
    u = torch.from_numpy(rng.standard_normal(BATCH, np.float32)).to(device).sigmoid()
    sigma = shift * u / (1 + (shift - 1) * u)
    noisy = torch.lerp(latent, noise, sigma[:, None, None, None])
    with lower_precision(device.type):
        velocity = family.velocity(network, noisy, sigma, text)
    return F.mse_loss(velocity.float(), noise - latent)


def optimizers(network: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for all else."""
    matrices, others = [], []
    for name, parameter in network.named_parameters():
        inner = parameter.ndim == 2 and name.startswith(BLOCKS)
        (matrices if inner else others).append(parameter)
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, weight_decay=0.01, betas=(0.9, 0.99)),
    ]


def train_transformer(
    family: ModuleType,
    pipeline: DiffusionPipeline,
    latents: np.ndarray,
    path: Path,
    out: Path,
    steps: int,
    seed: int,
) -> None:
    """Train, leaving the moving average of the weights in the pipeline and in `out`.

    Args:
        family: `benchmarks.model.sd3` or `benchmarks.model.lumina`.
        pipeline: What its `build_pipeline` made.
        latents: (n, 8, 32, 32), as the pipeline has them.
        path: The checkpoint.
        out, steps, seed: See the command line.
    """

    def loss(network: nn.Module, step: int) -> Tensor:
        return flow_loss(network, family, pipeline, latents, seed, step)

    average = pipeline.transformer
    train_average("transformer", average, path, steps, BATCH, loss, lambda: export(pipeline, out))


def train_average(
    name: str,
    average: nn.Module,
    path: Path,
    steps: int,
    batch: int,
    loss_of: Callable[[nn.Module, int], Tensor],
    keep: Callable[[], None],
) -> None:
    """Train a copy of a network, whose weights' moving average is left in `average`.

    Args:
        name, batch: For what is printed.
        average: The network to begin with.
        path: The checkpoint, from which training goes on.
        steps: In all.
        loss_of: The loss of the network in a step.
        keep: Called after each checkpoint.
    """
    network = copy.deepcopy(average).train()
    parts = {"model": network, "average": average}
    done = 0
    parts |= {f"optimizer{i}": o for i, o in enumerate(optimizers(network))}
    if path.exists():
        state = torch.load(path, map_location=next(average.parameters()).device)
        for key, part in parts.items():
            part.load_state_dict(state[key])
        done = state["step"]
    fast = torch.compile(network)
    for step, figures in steps_left(name, done, steps, batch):
        loss = figures["loss"] = loss_of(fast, step)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for key in ("optimizer0", "optimizer1"):
            set_rate(parts[key], step, steps, 2e-3)
            parts[key].step()
        network.zero_grad()
        rate = max(10 / (step + 10), 1e-3)
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), rate)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save(path, step=step + 1, **{key: part.state_dict() for key, part in parts.items()})
            keep()


def train_or_draw(
    doc: str,
    train: Callable[[Path, Path, int, int], None],
    draw_sheet: Callable[[Path, Path], None],
    steps: int,
) -> None:
    """The command of a module that trains one model: `--work` to train, or `--sheet` to draw.

    Args:
        doc: The module's docstring.
        train: Takes `--work`, `--out`, `--steps` and `--seed`.
        draw_sheet: Takes `--out` and `--sheet`.
        steps: As many as there are unless told.
    """
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    parser.add_argument("--work", type=Path, help="where checkpoints and data are kept")
    parser.add_argument("--steps", type=COUNT, default=steps)
    parser.add_argument("--seed", type=STEP, default=0)
    parser.add_argument("--sheet", type=Path, help="only draw samples of --out, as this PNG")
    args = parser.parse_args()
    if args.sheet:
        draw_sheet(args.out, args.sheet)
        return
    if not args.work:
        parser.error("training needs --work")
    args.work.mkdir(parents=True, exist_ok=True)
    train(args.work, args.out, args.steps, args.seed)


def unseen() -> Iterator[scenes.Scene]:
    """Scenes from `UNSEEN` on, without those that the pipeline was trained on."""
    seen = {replace(scenes.sample(i), seed=0) for i in range(SCENES)}
    fresh = (scenes.sample(i) for i in range(UNSEEN, 2 * UNSEEN))
    return (scene for scene in fresh if replace(scene, seed=0) not in seen)


def draw_sheet(out: Path, sheet: Path, device: str = "cpu", count: int = 32) -> None:
    """Draw captions of unseen scenes, image i from seed i, as one PNG."""
    pipeline = load(out).to(device)
    columns, height = 8, SIDE + 60
    page = Image.new("RGB", (columns * SIDE, -(-count // columns) * height), "white")
    pen = ImageDraw.Draw(page)
    for i, scene in enumerate(islice(unseen(), count)):
        caption = scene.caption()
        image = pipeline(
            caption,
            num_inference_steps=28,
            guidance_scale=4.0,
            max_sequence_length=0,
            generator=torch.Generator("cpu").manual_seed(i),
        ).images[0]
        x, y = i % columns * SIDE, i // columns * height
        page.paste(image, (x, y))
        pen.text((x + 4, y + SIDE + 2), f"{i}: " + textwrap.fill(caption, 38), fill="black")
    page.save(sheet)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the pipeline folder")
    parser.add_argument("--work", type=Path, help="where checkpoints and latents are kept")
    parser.add_argument("--steps", type=COUNT, default=5900, help="of the transformer")
    parser.add_argument("--vae-steps", type=COUNT, default=2600)
    parser.add_argument("--seed", type=STEP, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sheet", type=Path, help="only draw samples of --out, as this PNG")
    args = parser.parse_args()
    if args.sheet:
        draw_sheet(args.out, args.sheet, args.device)
        return
    if not args.work:
        parser.error("training needs --work")
    args.work.mkdir(parents=True, exist_ok=True)
    vae = train_vae(args.work, args.vae_steps, args.seed, args.device)
    latents = encode(vae, args.work, args.device, SCENES)
    pipeline = sd3.build_pipeline(vae, args.work, args.seed).to(args.device)
    path = args.work / "transformer.pt"
    train_transformer(sd3, pipeline, latents, path, args.out, args.steps, args.seed)


if __name__ == "__main__":
    as_command(main)
