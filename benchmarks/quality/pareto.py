"""The ruler: quality against cost, of RAS and of the methods that it has to beat.

    python -m benchmarks.quality.pareto
    python -m benchmarks.quality.pareto --quick
    python -m benchmarks.quality.pareto --model photos --guidance 1
    python -m benchmarks.quality.pareto --half b --methods "fewer steps" TaylorSeer --out results

Every setting of `rivals` and of `ours`, beside this file, draws the same images as the dense
pipeline, which takes 28 steps: those of captions, instructions or classes that training never saw,
image i from the noise of seed i. The models are those of `drawing.MODELS`, or a folder. Constants
are chosen on half a of the bundled model's captions, the even ones, and judged on half b and on the
other models.

Time is that of the denoising loop: prompts are encoded before it and images decoded after. A batch
of prompts goes through each setting once, in an order that is drawn anew for each batch, and
through the dense pipeline first, half-way and last, so that a drift of the machine shows. The
speed-up in a batch is the median of those three times over the setting's. *Compute* is the ratio
of the multiply-adds of matrix products, attention's included, so that what is skipped counts
nothing, be it a step, a block, an attention or a token; they are counted by PyTorch's own counter
in one more, untimed run of the first batch. With `--untimed` they are counted in the runs
themselves, which are then made once, and stand for the times.

Quality is PSNR (100 dB at most) and SSIM to the dense image, PSNR to the *limit* of the equation
(`--limit` steps from the same noise), which the dense image is but near to, and, where scenes are
drawn, the share of objects whose place, shape, colour and texture are right, and the Fréchet
distance to real scenes, as `benchmarks.quality.judge` sees them.

The folder `--out` is added to after each batch; a run of the same options goes on where it stops.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

import ras
from ras.cli.info import version
from ras.cli.loading import DTYPES
from ras.cli.options import number
from ras.cli.runs import clock
from ras.fingerprint import differences, plain

from ..commands import COUNT, STEP, as_command
from ..speed import timing
from ..tables import RESULTS
from . import judge, measures, ours, report, rivals
from .drawing import GUIDANCE, MODELS, calibrate, decode, draw, encode, items, model
from .setting import Setting, as_it_is

PEAK = 100.0  # dB: equal images have no finite PSNR


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark on the command line `argv` (default: the process's own)."""
    options = parse(argv)
    pipe = model(options.model).to(options.device)
    if options.dtype != "float32":
        pipe.to(DTYPES[options.dtype])
    ruler = Ruler(pipe, options)
    ruler.measure()
    print(report.write(ruler.results, options.out))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.quality.pareto", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", default="bundled", help=f"{', '.join(MODELS)}, or a pipeline's folder")
    add("--guidance", type=number(float, 0), default=GUIDANCE, help="where there is any")
    add("--limit", type=STEP, default=280, help="steps of the limit; 0: without")
    add("--prompts", type=Path, help="a file of one prompt a line, instead of captions")
    add("--count", type=COUNT, help="prompts, both halves together; 128, or 16 if --quick")
    add("--half", choices=("a", "b"), help="only the even (a) or the odd (b) prompts")
    add("--batch", type=COUNT, help="prompts per call of the pipeline; 16, or 8 if --quick")
    add("--methods", nargs="+", help="only methods whose names hold one of these")
    add("--settings", type=COUNT, help="at most so many of each rival but fewer steps")
    add("--ablate", action="store_true", help="our policy without each of its parts instead")
    add("--quick", action="store_true", help="fewer prompts, and two settings of each method")
    add("--untimed", action="store_true", help="compute alone, each run once: for a busy machine")
    add("--dtype", choices=DTYPES, default="float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, help="default: benchmarks/results/pareto-<device>")
    options = parser.parse_args(argv)
    if options.count is None:
        options.count = 16 if options.quick else 128
    if options.batch is None:
        options.batch = 8 if options.quick else 16
    if options.out is None:
        name = "" if options.model == "bundled" else f"-{Path(options.model).name}"
        name += "" if options.guidance == GUIDANCE else f"-guidance-{options.guidance:g}"
        options.out = RESULTS / f"pareto-{options.device}{name}"
    return options


class Ruler:
    """Measures batch by batch, and keeps what has been measured in a folder.

    Row 0 of the results is the dense pipeline's, row i that of setting i - 1.
    """

    def __init__(self, pipe: DiffusionPipeline, options: argparse.Namespace) -> None:
        self.pipe, self.options = pipe, options
        self.items = items(pipe, options)
        scenes = [item.scene for item in self.items if item.scene is not None]
        self.scenes = scenes if len(scenes) == len(self.items) else None
        self.classifier = self.real = None
        if self.scenes is not None:
            self.classifier = judge.load_classifier()
            self.real = judge.real_statistics(self.classifier, options.out)
        dense = Setting("dense", f"{rivals.STEPS} steps", rivals.STEPS, as_it_is)
        folder, _ = MODELS.get(options.model, (Path(options.model), None))
        practice = partial(calibrate, guidance=options.guidance)
        own = ours.ablations() if options.ablate else ours.settings(folder, practice)
        others = [] if options.ablate else rivals.settings(pipe, practice)
        self.settings = [dense, *chosen([*others, *own], options)]
        mine = {setting.method for setting in own if setting.method not in ours.WHOLE}
        self.results = self.empty(mine)
        self.features: dict[str, Tensor] = {}  # by row: (images, 64)
        self.take_up()

    # --- what is kept -------------------------------------------------------------------------

    def empty(self, own: set[str]) -> dict[str, Any]:
        rows = [
            {
                "method": setting.method,
                "label": setting.label,
                "steps": setting.steps,
                "ours": setting.method in own,
                "seconds": [],  # per batch: of one image
                "speedup": [],  # per batch
                "psnr": [],  # per image, as all that follows
                "limit": [],  # PSNR to the limit
                "ssim": [],
                "right": [],  # objects that have each of judge.ATTRIBUTES right
                "frechet": None,  # of all images
            }
            for setting in self.settings
        ]
        kept = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self.options).items()
            if name != "out"
        }
        return {
            "options": kept,
            "machine": machine(self.options.device),
            "weights": measures.fingerprint(self.pipe.transformer.parameters()),
            "notes": rivals.left_out(self.pipe),
            "prompts": [item.text for item in self.items],
            "objects": [len(scene.objects) for scene in self.scenes or ()],
            "dense": [],  # per batch: the seconds of the first run, the one half-way and the last
            "rows": rows,
        }

    def take_up(self) -> None:
        """Go on with the results in the folder. Raises ValueError if they are of another run."""
        path = self.options.out / "results.json"
        if not path.exists():
            return
        found = json.loads(path.read_text())
        told = differences(identity(found), identity(self.results))
        if told:
            raise ValueError(f"{path} is of another run ({'; '.join(told)}); name another --out")
        images = len(found["rows"][0]["ssim"])
        if self.classifier and images:
            path = path.with_name("features.safetensors")
            if not path.exists():
                return
            kept = safetensors.torch.load_file(path)  # may be a batch ahead
            self.features = {row: features[:images] for row, features in kept.items()}
        self.results = found

    def keep(self) -> None:
        """Write everything, each file at once, so that an interruption leaves the last one."""
        out = self.options.out
        out.mkdir(parents=True, exist_ok=True)
        part = out / "part"
        if self.features:
            safetensors.torch.save_file(self.features, part)
            part.replace(out / "features.safetensors")
        part.write_text(json.dumps(self.results))
        part.replace(out / "results.json")

    # --- measuring ----------------------------------------------------------------------------

    def measure(self) -> None:
        size = self.options.batch
        left = range(0, len(self.items), size)[len(self.results["dense"]) :]
        if not left:
            return
        # Anew for each process, unless there is no GPU to be warmed up.
        to_count = self.options.device != "cpu" or "compute" not in self.results["rows"][-1]
        to_count = to_count and not self.options.untimed
        again = 0 if self.options.untimed else 2  # runs of the dense pipeline
        runs = to_count * len(self.settings) + len(left) * (len(self.settings) + again)
        with tqdm(total=runs, unit="run") as progress:
            if to_count:
                self.count(encode(self.pipe, self.items[:size]), progress)
                self.keep()
            for start in left:
                self.batch(slice(start, start + size), progress)
                self.keep()
                report.write(self.results, self.options.out)

    def count(self, inputs: dict[str, Any], progress: tqdm) -> None:
        """Note each setting's compute, and warm it up."""
        counts = []
        for setting in self.settings:
            with setting.switch(self.pipe), multiply_adds() as counted:
                self.draw(inputs, setting.steps)
            counts.append(counted.get_total_flops())
            progress.update()
        for row, count in zip(self.results["rows"], counts):
            row["compute"] = counts[0] / count

    def draw(self, inputs: dict[str, Any], steps: int) -> Tensor:
        return draw(self.pipe, inputs, steps, self.options.guidance)

    def batch(self, images: slice, progress: tqdm) -> None:
        """Time and judge a batch of images by every setting."""
        inputs = encode(self.pipe, self.items[images])
        order = list(range(1, len(self.settings)))
        random.Random(images.start).shuffle(order)
        half = len(order) // 2
        runs = (0, *order) if self.options.untimed else (0, *order[:half], 0, *order[half:], 0)
        cost: list[list[float]] = [[] for _ in self.settings]
        reference, limit = None, None
        if self.options.limit:
            limit = decode(self.pipe, self.draw(inputs, self.options.limit))
        for place in runs:
            setting = self.settings[place]
            with setting.switch(self.pipe):
                latents, own = self.measured(inputs, setting.steps)
            cost[place].append(own)
            if len(cost[place]) == 1:
                pictures = decode(self.pipe, latents)
                reference = pictures if reference is None else reference
                self.judge(place, images, pictures, reference, limit)
            progress.update()
        dense = statistics.median(cost[0])
        for row, each in zip(self.results["rows"], cost):
            row["seconds"].append(statistics.median(each) / len(reference))
            row["speedup"].append(dense / statistics.median(each))
            if self.options.untimed:
                row["compute"] = statistics.mean(row["speedup"])
        self.results["dense"].append(cost[0])

    def measured(self, inputs: dict[str, Any], steps: int) -> tuple[Tensor, float]:
        """What is drawn and its cost: seconds, or 10^12 multiply-adds."""
        if self.options.untimed:
            with multiply_adds() as counted:
                latents = self.draw(inputs, steps)
            return latents, counted.get_total_flops() / 2e12
        start = clock(self.options.device)
        latents = self.draw(inputs, steps)
        return latents, clock(self.options.device) - start

    def judge(
        self,
        number: int,
        images: slice,
        pictures: Tensor,
        reference: Tensor,
        limit: Tensor | None,
    ) -> None:
        """Note the quality of a row's pictures, (B, 3, H, W) in [0, 1]."""
        row = self.results["rows"][number]
        row["psnr"] += rounded(measures.psnr(pictures, reference).clamp(max=PEAK))
        if limit is not None:
            row["limit"] += rounded(measures.psnr(pictures, limit).clamp(max=PEAK))
        row["ssim"] += rounded(measures.ssim(pictures, reference))
        if self.classifier is None:
            return
        captioned = self.scenes[images]
        right = judge.attributes(self.classifier, pictures, captioned).long()
        parts = right.split([len(scene.objects) for scene in captioned])
        row["right"] += [part.sum(0).tolist() for part in parts]
        features = self.classifier.features(pictures)
        kept = self.features.get(str(number), features[:0])
        self.features[str(number)] = kept = torch.cat([kept, features])
        if len(kept) > 1:  # one image has no covariance
            row["frechet"] = measures.frechet(kept, *self.real)


def multiply_adds() -> FlopCounterMode:
    """Counts, for a `with` block, the FLOPs of matrix products and attention, ours included."""
    aten, own = torch.ops.aten, torch.ops.ras_kernels

    def dense(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def sparse(query: Any, key: Any, *_: Any, **__: Any) -> int:
        return 4 * math.prod(query) * key[1]  # (B, K, H, D) and (B, S, G, D)

    def projected(*shapes: Any, **_: Any) -> int:
        tokens, key_weight = shapes[5:7]
        return 4 * math.prod(tokens) * key_weight[0]

    mapping: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: dense,
        own.sparse_attention: sparse,
        own.linear_scatter_: projected,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def chosen(settings: list[Setting], options: argparse.Namespace) -> list[Setting]:
    """Those of the methods that are asked for, or some of each; if it is to be quick, two."""
    names = [name.lower() for name in options.methods or [""]]
    lines: dict[str, list[Setting]] = {}
    for setting in settings:
        if any(name in setting.method.lower() for name in names):
            lines.setdefault(setting.method, []).append(setting)
    if options.quick:
        lines = {name: spread(line, 2) for name, line in lines.items()}
    elif options.settings:
        most = options.settings
        lines = {
            name: line if name == report.PLAIN or "RAS" in name else spread(line, most)
            for name, line in lines.items()
        }
    return [setting for line in lines.values() for setting in line]


def spread(line: list[Setting], most: int) -> list[Setting]:
    """At most so many of a line's settings, evenly spread over it."""
    if most >= len(line):
        return line
    return [line[round((i + 0.5) * len(line) / most - 0.5)] for i in range(most)]


def rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


def identity(results: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same for a run to go on with the results, by name."""
    found = {name: plain(results[name]) for name in ("weights", "prompts")}
    for part in ("options", "machine"):
        found |= {f"{part}.{name}": plain(value) for name, value in results[part].items()}
    rows = [(row["method"], row["label"], row["steps"]) for row in results["rows"]]
    return found | {"rows": plain(rows)}


def machine(device: str) -> dict[str, Any]:
    return timing.machine(device) | {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "diffusers": version("diffusers"),
        "cache-dit": rivals.cache_dit() and version("cache-dit"),
        "ras": ras.__version__,
    }


if __name__ == "__main__":
    as_command(main)
