"""Time a pipeline's whole denoising loop, dense and with RAS, in turn.

    python -m benchmarks.speed.end_to_end
    python -m benchmarks.speed.end_to_end --family lumina --layers 24 --image-tokens 4096 --guidance
    python -m benchmarks.speed.end_to_end --family flux --layers 2 --ratios 0.5 0.25 --compile
    python -m benchmarks.speed.end_to_end --layers 1 --image-tokens 64 --steps 8 --pairs 1

The pipeline is diffusers' own around a transformer of random weights and of the shape that the
options give; by default a published model's, cut to 4 layers. FLUX's layers are its double blocks,
19 in FLUX.1-dev, and there are twice as many single ones besides, as there; Wan makes one latent
frame. Dense means not enabled. A round is one dense run and one with each setting: the paper's
schedule with each ratio, and the plan that `ras` makes by itself for each speed-up. Speed-ups are
ratios within a round, of which the median is given, and an interval that holds it with at least
95 % confidence (order statistics of the binomial; the whole range if there are fewer than 6
rounds). The ceiling is `steps / (dense + sparse * (k + T) / (N + T))` for N image tokens, T text
tokens that walk with them (0 for Lumina and Wan, whose text does not) and k image tokens in a
sparse step; skipped steps cost nothing. Peak memory is the most that PyTorch's tensors took up on
the GPU in a run, weights included. It is told which of PyTorch's attentions dense runs take; on a
GPU an eager round has a dense run by cuDNN's, too, which PyTorch need not take where it is faster.

`--compile` compiles each block of the transformer by itself, in runs that are not timed. A timed
run that needs another compilation is an error.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ras
import ras_kernels
from ras.cli.loading import DTYPES
from ras.cli.runs import clock

from ..commands import COUNT, DURATION, SHARE, SPEEDUP, STEP, as_command
from ..tables import NOT_MEASURED, grid
from .attention import BY_CUDNN, Attentions, cudnn_first, has_cudnn
from .families import FAMILIES
from .timing import machine, median_interval
from .untrained import build, inputs

WARM_UP_STEPS = 6  # enough for a sparse step
TITLES = (
    "setting | dense + sparse + skipped steps | speed-up (95 %) | ceiling | quotient | caches, MB"
    " | peak memory, MB"
)

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark on the command line `argv` (default: the process's own)."""
    began = time.perf_counter()
    options = parse(argv)
    report: dict[str, Any] = {
        **{name: value for name, value in vars(options).items() if name not in ("json", "out")},
        **machine(options.device),
        **measure(build(options), inputs(options), settings(options), options, began),
    }
    written = json.dumps(report, indent=1)
    if options.out:
        options.out.write_text(written, encoding="utf-8")
    print(written if options.json else table(report))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.speed.end_to_end", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--family", choices=FAMILIES, default="sd3", help="gives what is left out below")
    add("--layers", type=COUNT, default=4)
    add("--heads", type=COUNT)
    add("--head-dim", type=COUNT)
    add("--image-tokens", type=COUNT, default=1024, help="a square number")
    add("--text-tokens", type=STEP)
    add("--batch", type=COUNT, default=1, help="images of a run")
    add("--guidance", action="store_true", help="doubles the transformer's batch or its calls")
    add("--steps", type=COUNT)
    add("--resets", type=STEP, nargs="*")
    add("--ratios", type=SHARE, nargs="*", default=[0.5, 0.25, 0.125], help="the paper's schedule")
    add("--speedups", type=SPEEDUP, nargs="*", default=[], help="plans that ras makes by itself")
    add("--pairs", type=COUNT, default=7, help="rounds of one dense run and one of each setting")
    add("--seconds", type=DURATION, help="after which no other round begins")
    add("--compile", nargs="?", const="inductor", metavar="BACKEND")
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", action="store_true", help="print JSON, not a table")
    add("--out", type=Path, help="a file for the JSON")
    options = parser.parse_args(argv)
    if math.isqrt(options.image_tokens) ** 2 != options.image_tokens:
        parser.error(f"--image-tokens must be a square number, got {options.image_tokens}")
    family = FAMILIES[options.family]
    for name in ("heads", "head_dim", "text_tokens", "steps", "resets"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(family, name))
    return options


def settings(options: argparse.Namespace) -> dict[str, ras.RASConfig]:
    """What is timed beside the dense runs, by name."""
    paper = {
        f"{ratio:g}": ras.RASConfig.paper(sample_ratio=ratio, error_reset_steps=options.resets)
        for ratio in options.ratios
    }
    return paper | {f"speedup={s:g}": ras.RASConfig(speedup=s) for s in options.speedups}


class Run(NamedTuple):
    """Seconds, and bytes of GPU memory where there is a GPU."""

    seconds: float
    peak: int | None


def measure(
    pipe: Any,
    call: dict[str, Any],
    configs: dict[str, ras.RASConfig],
    options: argparse.Namespace,
    began: float,
) -> dict[str, Any]:
    """The dense runs, and a row per setting. Runs go dense, first setting, second, …, dense, …"""
    dense: list[Run] = []
    rows: dict[str, Row] = {}
    # Compiled code, a kernel's too, may be missed as late as in a whole run's last step.
    compiles = options.compile or ras_kernels.backend(options.device) == "triton"
    steps = options.steps if compiles else min(options.steps, WARM_UP_STEPS)
    warm_up = {**call, "num_inference_steps": steps}
    ways: dict[str, Callable[[], AbstractContextManager[object]]] = {
        name: partial(ras.enabled, pipe, config) for name, config in configs.items()
    }
    attentions = {"dense": attentions_of(pipe, call)}
    if not options.compile and has_cudnn(options.device):
        ways[BY_CUDNN] = cudnn_first
        with cudnn_first():
            attentions[BY_CUDNN] = attentions_of(pipe, call)
    others: dict[str, list[Run]] = {name: [] for name in ways}
    run(pipe, warm_up, options.device)
    for within in ways.values():
        with within():
            run(pipe, warm_up, options.device)
    last = math.inf if options.seconds is None else began + options.seconds
    with torch.compiler.set_stance("fail_on_recompile") if options.compile else nullcontext():
        while not dense or (len(dense) < options.pairs and time.perf_counter() < last):
            dense.append(run(pipe, call, options.device))
            for name, within in ways.items():
                with within():
                    others[name].append(run(pipe, call, options.device))
                    rows[name] = describe(pipe, options.steps)
    for name, row in rows.items():
        ratios = [plain.seconds / other.seconds for plain, other in zip(dense, others[name])]
        row |= {
            "setting": name,
            "speedup": statistics.median(ratios),
            "interval": median_interval(ratios),
            **summary(others[name]),
        }
    found = {"rounds": len(dense), "attentions": attentions, "dense": summary(dense)}
    return found | {"rows": list(rows.values())}


def attentions_of(pipe: Any, call: dict[str, Any]) -> list[str]:
    """What a step takes that is not enabled; compiled code is made of the same."""
    with torch.compiler.set_stance("force_eager"), Attentions() as found:
        pipe(**call | {"num_inference_steps": 1})
    return found.names


def run(pipe: Any, call: dict[str, Any], device: str) -> Run:
    gpu = torch.device(device).type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    start = clock(device)
    pipe(**call)
    return Run(clock(device) - start, torch.cuda.max_memory_allocated(device) if gpu else None)


def describe(pipe: Any, steps: int) -> Row:
    if not ras.is_enabled(pipe):
        skipped = dict.fromkeys(("steps_sparse", "steps_skipped", "cache_bytes"), 0)
        return {"steps_dense": steps, "ceiling": 1.0, **skipped}
    stats = ras.stats(pipe)
    return {
        "steps_dense": stats.steps_dense,
        "steps_sparse": stats.steps_sparse,
        "steps_skipped": stats.steps_skipped,
        "ceiling": stats.speedup_ceiling,
        "cache_bytes": stats.cache_bytes,
    }


def summary(runs: Sequence[Run]) -> Row:
    return {
        "seconds": statistics.median(one.seconds for one in runs),
        "peak_bytes": max((one.peak for one in runs if one.peak is not None), default=None),
    }


def table(report: dict[str, Any]) -> str:
    """What was run, and a row per setting."""
    code = f"compiled by {report['compile']}" if report["compile"] else "eager"
    taken = (f"{way}, {' and '.join(names)}" for way, names in report["attentions"].items())
    guided = "with" if report["guidance"] else "without"
    said = (
        f"{report['device']}, torch {report['torch']}, {report['threads']} threads, "
        f"{report['dtype']}, {code}; {FAMILIES[report['family']].title}, {report['layers']} layers "
        f"of {report['heads']} heads of {report['head_dim']}, {report['image_tokens']} image and "
        f"{report['text_tokens']} text tokens, batch {report['batch']} {guided} guidance, "
        f"{report['steps']} steps, {report['rounds']} rounds. A dense run: "
        f"{report['dense']['seconds']:.3f} s, peak memory {megabytes(report['dense'])}. "
        f"Attention: {'; '.join(taken)}."
    )
    return f"{said}\n\n{grid(TITLES, map(entries, report['rows']))}"


def entries(row: Row) -> list[str]:
    low, high = row["interval"]
    return [
        row["setting"],
        f"{row['steps_dense']} + {row['steps_sparse']} + {row['steps_skipped']}",
        f"{row['speedup']:.3f} ({low:.3f} to {high:.3f})",
        f"{row['ceiling']:.3f}",
        f"{row['speedup'] / row['ceiling']:.3f}",
        f"{row['cache_bytes'] / 1e6:.1f}",
        megabytes(row),
    ]


def megabytes(row: Row) -> str:
    return NOT_MEASURED if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"


if __name__ == "__main__":
    as_command(main)
