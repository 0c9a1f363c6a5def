"""The command line: `ras generate` makes an image and compares, `ras info` describes the set-up."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import is_accelerate_available
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from transformers.utils import logging as transformers_logging

import ras
import ras_kernels

from . import pictures
from .config import DEFAULT_SPEEDUP

BUNDLED_CALL: dict[str, Any] = {"guidance_scale": 4.0, "max_sequence_length": 0}
"""What the bundled model's pipeline is called with: it was trained without T5's tokens."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
WARM_UP_STEPS = 6  # enough to meet both kinds of step
REPEATS = 5  # of each timed run, unless they take long
PATIENCE = 10.0  # seconds of dense runs after which none is repeated


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (default: the process's own) and return its exit status.

    0 is success; with 2, one line on stderr says what was wrong. `--help` and `--version`
    raise SystemExit(0), as argparse has it.
    """
    try:
        options = _parser().parse_args(argv)
        with _quiet(transformers_logging):
            options.command(options)
    except (ValueError, TypeError, OSError, torch.cuda.OutOfMemoryError) as error:
        print("ras: error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


# --- what the user types --------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are exceptions, so that they end up as one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ras", description="Region-adaptive sampling of diffusion transformers.")
    parser.add_argument("--version", action="version", version=f"ras {ras.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate",
        help="make an image, dense and with RAS, side by side",
        description="Make an image twice, dense (every token computed in every step) and with "
        "RAS, and write both beside a map of how often each region was computed.",
    )
    generate.set_defaults(command=_generate)
    add = generate.add_argument
    add("prompt", type=_prompt, help="what the image shows")
    add("--out", type=_out, default="out.png", metavar="FILE", help="default: %(default)s")
    add("--no-compare", action="store_true", help="write the RAS image alone")
    add("--model", type=_model, help="a pipeline's folder or hub id; default: the bundled model")
    add("--device", type=_device, default=_default_device(), help="default: %(default)s")
    add("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on a GPU")
    add("--seed", type=_number(int, 0, 2**64 - 1), default=0, help="default: %(default)s")
    add("--steps", type=_number(int, 1), default=28, help="default: %(default)s")
    add(
        "--speedup",
        type=float,
        metavar="FACTOR",
        help=f"tokens of a dense run per token computed; default: {DEFAULT_SPEEDUP:g}",
    )
    add("--plan", metavar="FILE", help="a plan that ras.calibrate has made, instead")
    add(
        "--sample-ratio",
        type=float,
        metavar="RATIO",
        help="the paper's schedule instead, in which a sparse step computes that share",
    )
    add("--height", type=_number(int, 1), metavar="PIXELS", help="default: the model's")
    add("--width", type=_number(int, 1), metavar="PIXELS", help="default: the model's")
    add("--negative-prompt", metavar="TEXT", help="what the image does not show")
    add("--guidance-scale", type=_number(float, 0), metavar="SCALE", help="default: the model's")
    add("--json", action="store_true", help="print the figures as JSON")

    info = commands.add_parser("info", help="print what a bug report needs")
    info.set_defaults(command=_info)
    return parser


def _number(
    kind: type[int | float], low: float, high: float = sys.float_info.max
) -> Callable[[str], float]:
    """A converter of text into a finite number from `low` to `high`, both included."""
    noun = "a whole number" if kind is int else "a number"
    span = f"of at least {low}" if high == sys.float_info.max else f"from {low} to {high}"

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {noun} {span}, got {text!r}")
        return value

    return convert


def _prompt(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _out(text: str) -> Path:
    """A file that can be written, of a type that Pillow writes."""
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in one of {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def _model(text: str) -> str:
    """A pipeline folder, or what looks like a hub id."""
    path = Path(text)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise argparse.ArgumentTypeError(f"{text!r} is no pipeline: it has no model_index.json")
    elif path.exists():
        raise argparse.ArgumentTypeError(f"{text!r} is a file; name the pipeline's folder")
    elif not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a folder nor a hub id (org/name)")
    return text


def _device(text: str) -> torch.device:
    """A device that this machine has."""
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:N") from None
    present = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(device.type, 0)
    if (device.index or 0) >= present:
        raise argparse.ArgumentTypeError(
            f"{text} is not available on this machine; use --device {_default_device()}"
        )
    return device


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# --- ras generate ---------------------------------------------------------------------------------

_Pipeline = Any  # a DiffusionPipeline; its classes share no call that a type could describe


@dataclass(frozen=True)
class _Run:
    """An image and the seconds that the pipeline's whole call took, from prompt to pixels."""

    image: Image.Image
    seconds: float


@dataclass(frozen=True)
class _RasRun(_Run):
    stats: ras.Stats


def _generate(options: argparse.Namespace) -> None:
    plan = None if options.plan is None else ras.Plan.load(options.plan)
    config = ras.RASConfig(options.speedup, plan, options.sample_ratio)
    pipe = _load(options)
    dense: list[_Run]
    sparse: list[_RasRun]
    if options.no_compare:
        dense, sparse = [], [_run_ras(pipe, options, config, "RAS", options.steps)]
    else:
        dense, sparse = _compare(pipe, options, config)
    report = {
        "prompt": options.prompt,
        "negative_prompt": options.negative_prompt,
        "model": options.model or "bundled",
        "device": str(options.device),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "seed": options.seed,
        "steps": options.steps,
        "width": sparse[0].image.width,
        "height": sparse[0].image.height,
        "config": dataclasses.asdict(config),
        **_figures(dense, sparse),
        "out": str(options.out),
    }
    picture = _side_by_side(dense[0], sparse[0], report) if dense else sparse[0].image
    picture.save(options.out)
    for warning in report["warnings"]:
        print("ras: warning:", warning, file=sys.stderr)
    print(json.dumps(report, indent=2) if options.json else _summary(report))


def _load(options: argparse.Namespace) -> _Pipeline:
    """The pipeline on its device. Raises ValueError, whatever the reason, if there is none."""
    source = str(options.model or ras.bundled_model())
    dtype = options.dtype or ("float32" if options.device.type == "cpu" else "bfloat16")
    try:
        with _quiet(diffusers_logging):
            if options.model and sys.stderr.isatty():
                diffusers_logging.enable_progress_bar()
            pipe = DiffusionPipeline.from_pretrained(
                source,
                torch_dtype=DTYPES[dtype],
                use_safetensors=True,
                low_cpu_mem_usage=is_accelerate_available(),
                **_absent_parts(Path(source)),
            )
            return pipe.to(options.device)
    except Exception as error:  # whatever the libraries make of a stranger's files
        hub = options.model is not None and not Path(source).is_dir()
        where = " (no such folder) from the hub" if hub else ""
        raise ValueError(f"cannot load {source}{where}: {error}") from error


def _absent_parts(folder: Path) -> dict[str, None]:
    """The parts that a pipeline was saved without, such as T5: diffusers has to be told again."""
    index = folder / "model_index.json"
    if not index.is_file():
        return {}
    parts = json.loads(index.read_text())
    return {name: None for name, part in parts.items() if part == [None, None]}


@contextmanager
def _quiet(library: ModuleType) -> Iterator[None]:
    """Without the remarks and the loading bars of diffusers or transformers (their `logging`)."""
    level = library.get_verbosity()
    library.set_verbosity(logging.CRITICAL)
    library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        library.set_verbosity(level)
        library.enable_progress_bar()


def _compare(
    pipe: _Pipeline, options: argparse.Namespace, config: ras.RASConfig
) -> tuple[list[_Run], list[_RasRun]]:
    """Dense and RAS runs in turn, as many of each, after a warm-up: one if long, more if brief."""
    warm_up = min(options.steps, WARM_UP_STEPS)
    _run_ras(pipe, options, config, "warm-up", warm_up)  # first, since it may refuse the model
    dense: list[_Run] = []
    sparse: list[_RasRun] = []
    with _quiet(diffusers_logging):  # what there is to say of the prompt has been said
        _run(pipe, options, "warm-up", warm_up)
        while len(dense) < REPEATS and sum(run.seconds for run in dense) < PATIENCE:
            dense.append(_run(pipe, options, "dense", options.steps))
            sparse.append(_run_ras(pipe, options, config, "RAS", options.steps))
    return dense, sparse


def _run_ras(
    pipe: _Pipeline,
    options: argparse.Namespace,
    config: ras.RASConfig,
    label: str,
    steps: int,
) -> _RasRun:
    with warnings.catch_warnings(), ras.enabled(pipe, config):
        warnings.simplefilter("ignore", ras.RASWarning)  # the statistics repeat them
        run = _run(pipe, options, label, steps)
        return _RasRun(run.image, run.seconds, ras.stats(pipe))


def _run(pipe: _Pipeline, options: argparse.Namespace, label: str, steps: int) -> _Run:
    """One image from the noise of the options' seed, with a bar of that label on a terminal."""
    call = dict(BUNDLED_CALL) if options.model is None else {}
    for name in ("height", "width", "negative_prompt", "guidance_scale"):
        if getattr(options, name) is not None:
            call[name] = getattr(options, name)
    generator = torch.Generator().manual_seed(options.seed)
    pipe.set_progress_bar_config(desc=label, leave=False, disable=not sys.stderr.isatty())
    start = _clock(options.device)
    output = pipe(options.prompt, num_inference_steps=steps, generator=generator, **call)
    return _Run(output.images[0], _clock(options.device) - start)


def _clock(device: torch.device) -> float:
    """Seconds on a clock, read when the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _figures(dense: list[_Run], sparse: list[_RasRun]) -> dict[str, Any]:
    """What was measured; what needs a dense run is None without one.

    Times are medians in seconds. An infinite PSNR is None, and `identical` says so.
    """
    stats = sparse[0].stats
    seconds = statistics.median(run.seconds for run in sparse)
    figures: dict[str, Any] = {
        "runs": len(sparse),
        "seconds_dense": None,
        "seconds_ras": seconds,
        "speedup": None,
        "speedup_ceiling": stats.speedup_ceiling,
        "psnr_db": None,
        "identical": None,
        "steps_dense": stats.steps_dense,
        "steps_sparse": stats.steps_sparse,
        "steps_skipped": stats.steps_skipped,
        "tokens_computed": stats.tokens_computed,
        "tokens_total": stats.tokens_total,
        "text_tokens": stats.text_tokens,
        "cache_bytes": stats.cache_bytes,
        "warnings": list(stats.warnings),
    }
    if dense:
        psnr = pictures.psnr(dense[0].image, sparse[0].image)
        figures["seconds_dense"] = statistics.median(run.seconds for run in dense)
        figures["speedup"] = figures["seconds_dense"] / seconds
        figures["psnr_db"] = psnr if math.isfinite(psnr) else None
        figures["identical"] = psnr == math.inf
    return figures


def _side_by_side(dense: _Run, sparse: _RasRun, report: dict[str, Any]) -> Image.Image:
    counts = sparse.stats.region_counts
    assert counts is not None  # as there was a run
    figures = [
        f"{report['steps']} steps",
        f"{report['steps_dense']} steps dense, {report['steps_sparse']} sparse, "
        f"{report['steps_skipped']} skipped",
        f"seed {report['seed']}",
        f"speed-up {report['speedup']:.2f}x (ceiling {report['speedup_ceiling']:.2f}x)",
        _difference(report),
    ]
    return pictures.comparison(
        dense.image,
        sparse.image,
        counts[0].cpu().numpy(),
        titles=(
            f"Dense · {report['seconds_dense']:.2f} s",
            f"RAS · {report['seconds_ras']:.2f} s",
            "Times computed",
        ),
        caption=(report["prompt"], " · ".join(figures)),
    )


def _difference(report: dict[str, Any]) -> str:
    return "identical" if report["identical"] else f"PSNR {report['psnr_db']:.1f} dB"


def _summary(report: dict[str, Any]) -> str:
    """The report's main figures, one a line."""
    share = report["tokens_computed"] / report["tokens_total"]
    ras_run = (
        f"{report['seconds_ras']:.2f} s ({report['steps_dense']} dense steps, "
        f"{report['steps_sparse']} sparse and {report['steps_skipped']} skipped, {share:.0%} of "
        "the image tokens)"
    )
    ceiling = f"{report['speedup_ceiling']:.2f}x"
    if report["speedup"] is None:
        lines = {"RAS": ras_run, "ceiling": ceiling, "timed": "one run, without a warm-up"}
    else:
        runs = "one run each" if report["runs"] == 1 else f"medians of {report['runs']} runs each"
        lines = {
            "dense": f"{report['seconds_dense']:.2f} s",
            "RAS": ras_run,
            "speed-up": f"{report['speedup']:.2f}x, where the token count allows {ceiling}",
            "difference": _difference(report),
            "timed": f"{runs}, in turn after a warm-up, from prompt to pixels",
        }
    lines["written"] = report["out"]
    return _table(lines)


def _table(lines: dict[str, str]) -> str:
    width = max(map(len, lines)) + 2
    return "\n".join(f"{name:{width}}{value}" for name, value in lines.items())


# --- ras info -------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> None:
    """Print versions, devices with the kernels that would run on them, and the bundled model."""
    lines = {"ras": ras.__version__, "ras_kernels": ras_kernels.__version__}
    lines["python"] = f"{platform.python_version()} on {platform.platform()}"
    lines["torch"] = torch.__version__  # its metadata may lack the build, such as +cu130
    lines |= {name: _version(name) for name in ("triton", "diffusers", "transformers")}
    lines["cpu"] = _device_line(f"{_processor()}, {torch.get_num_threads()} threads", "cpu")
    for index in range(torch.cuda.device_count()):
        name = f"cuda:{index}"
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.1f} GiB"
        capability = f"sm_{properties.major}{properties.minor}"
        lines[name] = _device_line(f"{properties.name}, {memory}, {capability}", name)
    lines["bundled model"] = _folder_line(ras.bundled_model())
    print(_table(lines))


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _device_line(description: str, device: str) -> str:
    return f"{description}; kernels: {ras_kernels.backend(torch.device(device))}"


def _processor() -> str:
    """The CPU's name where Linux tells it, else its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _folder_line(folder: Path) -> str:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{folder} ({size / 1e6:.1f} MB)" if size else f"missing from {folder}"
