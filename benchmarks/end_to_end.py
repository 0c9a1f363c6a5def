"""Time a pipeline's whole denoising loop, dense and with RAS, in turn.

    python -m benchmarks.end_to_end
    python -m benchmarks.end_to_end --layers 1 --image-tokens 64 --steps 8 --pairs 1

The pipeline is a `StableDiffusion3Pipeline` around a transformer of random weights and of the
shape that the options give; by default SD3-medium's, cut to 4 layers. Dense means not enabled. A
round is one dense run and one with each ratio; speed-ups are ratios within a round, of which the
median is given, and an interval that holds it with at least 95 % confidence (order statistics of
the binomial; the whole range if there are fewer than 6 rounds). The ceiling is
`steps / (dense + sparse * (k + T) / (N + T))` for N image tokens, T text tokens and k tokens
in a sparse step.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

import ras
import ras_kernels

from .timing import device_name

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark on the command line `argv` (default: the process's own)."""
    options = parse(argv)
    pipe = build(options)
    call = inputs(options)
    configs = {
        ratio: ras.RASConfig.paper(sample_ratio=ratio, error_reset_steps=options.resets)
        for ratio in options.ratios
    }
    report: dict[str, Any] = {
        "device": device_name(options.device),
        "kernels": ras_kernels.backend(options.device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **{name: value for name, value in vars(options).items() if name != "json"},
        "rows": measure(pipe, call, configs, options),
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(
        f"{report['device']}, torch {report['torch']}, {report['threads']} threads, "
        f"{options.dtype}; {options.layers} layers of {options.heads} heads of "
        f"{options.head_dim}, {options.image_tokens} image and {options.text_tokens} text tokens, "
        f"batch {options.batch}, {options.steps} steps, {options.pairs} rounds"
    )
    print("| ratio | dense + sparse steps | speed-up (95 %) | ceiling | quotient | caches, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in report["rows"]:
        low, high = row["interval"]
        print(
            f"| {row['ratio']:g} | {row['steps_dense']} + {row['steps_sparse']} "
            f"| {row['speedup']:.3f} ({low:.3f} to {high:.3f}) | {row['ceiling']:.3f} "
            f"| {row['speedup'] / row['ceiling']:.3f} | {row['cache_bytes'] / 1e6:.1f} |"
        )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.end_to_end", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--layers", type=int, default=4)
    add("--heads", type=int, default=24)
    add("--head-dim", type=int, default=64)
    add("--image-tokens", type=int, default=1024, help="a square number")
    add("--text-tokens", type=int, default=333)
    add("--batch", type=int, default=1, help="the transformer's batch, guidance being off")
    add("--steps", type=int, default=28)
    add("--resets", type=int, nargs="*", default=[12, 20])
    add("--ratios", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    add("--pairs", type=int, default=7, help="rounds of one dense run and one of each ratio")
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", action="store_true")
    options = parser.parse_args(argv)
    if math.isqrt(options.image_tokens) ** 2 != options.image_tokens:
        parser.error(f"--image-tokens must be a square number, got {options.image_tokens}")
    return options


def build(options: argparse.Namespace) -> StableDiffusion3Pipeline:
    """The pipeline, without text encoders and autoencoder: only the loop is timed."""
    torch.manual_seed(0)
    width = options.heads * options.head_dim
    side = math.isqrt(options.image_tokens)
    transformer = SD3Transformer2DModel(
        sample_size=2 * side,
        num_layers=options.layers,
        num_attention_heads=options.heads,
        attention_head_dim=options.head_dim,
        caption_projection_dim=width,
        pos_embed_max_size=max(192, side),
    ).to(options.device, DTYPES[options.dtype])
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys(("vae", *ENCODERS, *TOKENIZERS)),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(options: argparse.Namespace) -> dict[str, Any]:
    """The call's arguments: random text, random noise, latents out."""
    kind = dict(device=options.device, dtype=DTYPES[options.dtype])
    side = 2 * math.isqrt(options.image_tokens)
    return dict(
        prompt_embeds=torch.randn(options.batch, options.text_tokens, 4096, **kind),
        pooled_prompt_embeds=torch.randn(options.batch, 2048, **kind),
        latents=torch.randn(options.batch, 16, side, side, **kind),
        height=8 * side,
        width=8 * side,
        guidance_scale=1.0,
        output_type="latent",
        num_inference_steps=options.steps,
    )


def measure(
    pipe: StableDiffusion3Pipeline,
    call: dict[str, Any],
    configs: dict[float, ras.RASConfig],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One row per ratio. Runs go dense, first ratio, second ratio, …, dense, …"""
    ratios: dict[float, list[float]] = {ratio: [] for ratio in configs}
    rows: dict[float, dict[str, Any]] = {}
    warm_up = {**call, "num_inference_steps": min(options.steps, 6)}
    seconds(pipe, warm_up, options.device)
    for config in configs.values():
        with ras.enabled(pipe, config):
            seconds(pipe, warm_up, options.device)
    for _ in range(options.pairs):
        dense = seconds(pipe, call, options.device)
        for ratio, config in configs.items():
            with ras.enabled(pipe, config):
                ratios[ratio].append(dense / seconds(pipe, call, options.device))
                rows[ratio] = describe(ras.stats(pipe))
    for ratio, row in rows.items():
        row |= {
            "ratio": ratio,
            "speedup": statistics.median(ratios[ratio]),
            "interval": median_interval(ratios[ratio]),
        }
    return list(rows.values())


def seconds(pipe: StableDiffusion3Pipeline, call: dict[str, Any], device: str) -> float:
    start = clock(device)
    pipe(**call)
    return clock(device) - start


def clock(device: str) -> float:
    """Seconds, read when the device has nothing left to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def describe(stats: ras.Stats) -> dict[str, Any]:
    return {
        "steps_dense": stats.steps_dense,
        "steps_sparse": stats.steps_sparse,
        "ceiling": stats.speedup_ceiling,
        "cache_bytes": stats.cache_bytes,
    }


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The tightest pair of order statistics that holds the median with 95 % confidence.

    With n values the pair of ranks (i, n - 1 - i) misses it with probability
    `2 * P(X <= i)` for X binomial of n trials at one half.
    """
    ordered, n = sorted(values), len(values)
    chances = [math.comb(n, i) / 2**n for i in range(n)]
    rank = max((i for i in range(n // 2) if 2 * sum(chances[: i + 1]) <= 0.05), default=0)
    return ordered[rank], ordered[n - 1 - rank]


if __name__ == "__main__":
    main()
