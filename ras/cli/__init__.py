"""The command line: `ras generate`, `ras edit`, `ras demo`, `ras models` and `ras info`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from transformers.utils import logging as transformers_logging

import ras

from ..checks import MOST_STEPS
from ..config import DEFAULT_SPEEDUP
from ..files import writable
from ..pictures.film import SUFFIXES as ANIMATIONS
from . import demo, edit, generate, info, models
from .loading import DTYPES, quiet
from .options import IMAGES, number

MOST_PIXELS = 2**15  # of a side


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (default: the process's own) and return its exit status.

    0 is success; with 2, one line on stderr says what was wrong; 130 is an interrupt. `--help` and
    `--version` raise SystemExit(0), as argparse has it.
    """
    try:
        options = _parser().parse_args(argv)
        if getattr(options, "animate", None) == getattr(options, "out", ""):
            raise ValueError(f"--out and --animate are both {str(options.out)!r}; name two files")
        with quiet(transformers_logging):
            options.command(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("ras: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        line = f"ras: error: {text if len(text) <= 1000 else text[:1000] + '…'}"
        print(line.encode(errors="backslashreplace").decode(), file=sys.stderr)
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

    making = commands.add_parser(
        "generate",
        help="make an image, dense and with RAS, side by side",
        description="Make an image twice, dense (every token computed in every step) and with "
        "RAS, and write both, where they differ, and a map of how often each region was computed.",
    )
    making.set_defaults(command=generate.main)
    add = making.add_argument
    add("prompt", nargs="?", type=_prompt, help="what the image shows")
    add(
        "--prompts",
        type=_file,
        metavar="FILE",
        help="draw the prompts of a file instead, into the folder --out: one a line, or JSON lines "
        "(.jsonl) of a prompt, a seed and arguments of the pipeline",
    )
    add("--no-compare", action="store_true", help="write the RAS image alone")
    _add_common(making, Path)
    add("--plan", metavar="FILE", help="a plan that ras.calibrate has made, instead")
    add(
        "--sample-ratio",
        type=float,
        metavar="RATIO",
        help="the paper's schedule instead, in which a sparse step computes that share",
    )
    add("--height", type=number(int, 1, MOST_PIXELS), metavar="PIXELS", help="default: the model's")
    add("--width", type=number(int, 1, MOST_PIXELS), metavar="PIXELS", help="default: the model's")
    add("--negative-prompt", type=_prompt, metavar="TEXT", help="what the image does not show")

    editing = commands.add_parser(
        "edit",
        help="edit a picture by an instruction, dense and with RAS, side by side",
        description="Edit a picture twice, dense and with RAS, which computes what changes, and "
        "write both beside the picture, with where they differ and a map of how often each region "
        "was computed.",
    )
    editing.set_defaults(command=edit.main)
    add = editing.add_argument
    add("image", nargs="?", type=_file, help="the picture; without one, a drawn one is made first")
    add("instruction", type=_prompt, help="what to change")
    add("--mask", type=_file, metavar="FILE", help="a picture that is white where it may change")
    add("--whole-steps", action="store_true", help="compute all of the image, or nothing")
    add("--preserve", action="store_true", help="keep all pixels that the edit does not change")
    add(
        "--picture",
        type=_prompt,
        default=edit.PICTURE,
        metavar="TEXT",
        help="what the picture shows that is made without one",
    )
    _add_common(editing, _writable(*IMAGES))

    showing = commands.add_parser(
        "demo",
        help="serve a page in the browser that draws dense and with RAS",
        description="Serve a page on this machine that draws a prompt dense and with RAS, and "
        "shows how often each region was computed. It needs gradio: the extra `demo`.",
    )
    showing.set_defaults(command=demo.main)
    _add_model(showing)
    port = number(int, 1, 65535)
    showing.add_argument("--port", type=port, help="default: the first that is free from 7860")

    listing = commands.add_parser("models", help="print which models are supported, and how")
    listing.set_defaults(command=models.main)

    describing = commands.add_parser("info", help="print what a bug report needs")
    describing.set_defaults(command=info.main)
    return parser


def _add_common(parser: argparse.ArgumentParser, out: Callable[[str], Path]) -> None:
    """Add what all commands take that make images; `out` takes the file to write."""
    add = parser.add_argument
    add("--out", type=out, default="out.png", metavar="FILE", help="default: %(default)s")
    add(
        "--animate",
        type=_writable(*ANIMATIONS),
        metavar="FILE",
        help="an animation to write besides, of what each step computes: a .gif or .webp",
    )
    _add_model(parser)
    add("--seed", type=number(int, 0, 2**64 - 1), default=0, help="default: %(default)s")
    add("--steps", type=number(int, 1, MOST_STEPS), default=28, help="default: %(default)s")
    add(
        "--speedup",
        type=float,
        metavar="FACTOR",
        help=f"tokens of a dense run per token computed; default: {DEFAULT_SPEEDUP:g}",
    )
    add("--guidance-scale", type=number(float, 0), metavar="SCALE", help="default: the model's")
    add("--json", action="store_true", help="print the figures as JSON")


def _add_model(parser: argparse.ArgumentParser) -> None:
    """Add which pipeline to load, and where to."""
    add = parser.add_argument
    add("--model", type=_model, help="a pipeline's folder or hub id; default: the bundled model")
    add("--device", type=_device, default=_default_device(), help="default: %(default)s")
    add("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 on a GPU")


def _file(text: str) -> str:
    """A file that there is."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return text


def _prompt(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("must be text in UTF-8") from None
    return text


def _writable(*suffixes: str) -> Callable[[str], Path]:
    """A converter into a file that can be written, of a type that Pillow writes."""

    def convert(text: str) -> Path:
        try:
            return writable(text, suffixes)
        except (ValueError, OSError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


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
    if device.type == "cuda" and device.index is None:  # that of a process of many
        rank = os.environ.get("LOCAL_RANK", "0")
        if not rank.isdecimal() or int(rank) >= present > 0:
            raise argparse.ArgumentTypeError(
                f"LOCAL_RANK must be the number of a GPU, of which this machine has {present}, "
                f"counted from 0; got {rank!r}; start as many processes on it as it has GPUs"
            )
        device = torch.device("cuda", int(rank))
    if (device.index or 0) >= present:
        raise argparse.ArgumentTypeError(
            f"{device} is not available on this machine; use --device {_default_device()}"
        )
    return device


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
