"""`ras generate --prompts`: an image for each prompt of a file, in a folder."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import ras

from ..many import MANIFEST, share
from ..stats import aligned
from .loading import load
from .options import IMAGES

LARGEST = 2**30  # bytes


def read(file: str) -> list[str | dict[str, Any]]:
    """The prompts of a file: a line of text each, or of JSON where its name ends in .jsonl.

    Raises:
        ValueError: It has none, is no text, or a line is no object with a prompt.
        OSError: It cannot be read.
    """
    if Path(file).stat().st_size > LARGEST:
        raise ValueError(f"{file} is larger than {LARGEST:,} bytes")
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no text in UTF-8") from None
    told = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not told:
        raise ValueError(f"{file} has no prompts; write one a line")
    if not file.endswith(".jsonl"):
        return [line for _, line in told]
    return [_object(f"{file}, line {number}", line) for number, line in told]


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise ValueError(f'{where} must be an object with a text as its "prompt"')
    return found


def main(options: argparse.Namespace, config: ras.RASConfig, call: dict[str, Any]) -> None:
    """Draw this process's share of the prompts, and print what there is now.

    Args:
        options: Of the command.
        config: The settings.
        call: Arguments of the pipeline's calls, but for the steps.
    """
    folder, prompts = Path(options.out), read(options.prompts)
    if folder.suffix in IMAGES or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"--out {str(folder)!r} must be a folder, which is made, with --prompts")
    if options.animate:
        raise ValueError("--animate is of a single prompt; leave out --prompts")
    rank, world = share()
    pipe = load(options, ras.bundled_model())
    call = {**call, "num_inference_steps": options.steps}
    began = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    with warnings.catch_warnings(), ras.enabled(pipe, config):
        warnings.simplefilter("ignore", ras.RASWarning)  # they are told below
        records = ras.generate(pipe, prompts, folder, seed=options.seed, **call)
    for warning in {each: None for record in records for each in record["stats"]["warnings"]}:
        print("ras: warning:", warning, file=sys.stderr)
    drawn = [record["seconds"] for record in records if record["started"] >= began]
    report = {
        "process": f"{rank + 1} of {world}",
        "images": len(records),
        "drawn": len(drawn),
        "seconds": round(sum(drawn), 3),
        "written": str(folder / MANIFEST),
    }
    print(json.dumps(report, indent=2) if options.json else aligned(report))
