"""Many prompts: an image of each in a folder, by any number of processes, which may be cut off."""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import json
import os
import re
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image, PngImagePlugin

from .api import stats
from .checks import check_count, check_kind, shown
from .config import RASConfig
from .denoisers import modules_of
from .files import locked, remove_parts, write_text, written_whole
from .fingerprint import differences, of_call, of_model, of_weights, plain
from .scope import Settings
from .sessions import enabled_session
from .stats import Stats

MANIFEST, LOCK = "manifest.jsonl", ".manifest.lock"
RECORD = "ras"  # the name of the text in an image that is its line of the manifest
OURS = {"generator", "num_images_per_prompt", "output_type", "return_dict"}
TOLD = (  # of a run's statistics
    "steps_dense",
    "steps_sparse",
    "steps_skipped",
    "calls_computed",
    "calls_total",
    "tokens_computed",
    "tokens_total",
    "cache_bytes",
    "speedup_ceiling",
)

Record = dict[str, Any]
Prompt = str | Mapping[str, Any]


def generate(
    pipe: DiffusionPipeline,
    prompts: Iterable[Prompt],
    out: str | PathLike[str],
    *,
    seed: int = 0,
    **call: Any,
) -> list[Record]:
    """Draw an image for each prompt into a folder, this process's share of them.

    Of `WORLD_SIZE` processes, as `torchrun` and `accelerate launch` start them, that of `RANK` r
    draws prompts r, r + WORLD_SIZE and so on. Prompt 3 is `00003.png`, which is there whole or not
    at all, with its record in it (`Image.open(file).info["ras"]`). What is there is not drawn
    again, so that whoever is cut off, in whatever way, starts the same once more. `manifest.jsonl`
    has the records of all images that are there when a process ends, a line for each.

    Args:
        pipe: An enabled pipeline that takes a prompt and makes images.
        prompts: Texts, or mappings of `prompt`, maybe `seed`, and other arguments of the call. All
            processes are given the same ones.
        out: The folder, which is made.
        seed: Prompt i is drawn from noise of the seed `seed + i`, unless it has its own.
        **call: Arguments of the pipeline's calls.

    Returns:
        The records of the share, also of what was there: `index`, `prompt`, `seed`, `file`,
        `started` (UTC), `seconds` of the pipeline's call, `made_with` (the pipeline's
        classes, configurations and digests of all weights, the call's arguments, the mask, and the
        settings that are not the default ones) and `stats`.

    Raises:
        TypeError: No pipeline, or a prompt or an argument of a wrong type.
        ValueError: The pipeline is not enabled, or takes no prompt; an argument that it does not
            take; a file that is there of something else. Nothing is drawn before that is known of
            all prompts of a list; of other iterables each is looked at in its turn. Or the pipeline
            makes no images, which the first call shows.
        OSError: A file cannot be written.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"generate takes a pipeline, got {type(pipe).__name__}")
    session = enabled_session(pipe)
    if not isinstance(prompts, Iterable) or isinstance(prompts, str | bytes | Mapping):
        raise TypeError(f"prompts must be texts or mappings, got {shown(prompts)}")
    check_count("seed", seed, 0, 2**63 - 1)
    rank, world = share()
    takes = inspect.signature(type(pipe).__call__).parameters
    if not _takes("prompt", takes):
        raise ValueError(f"{type(pipe).__name__} takes no prompt, which is what is drawn")
    listed = list(enumerate(prompts)) if isinstance(prompts, Sequence) else []
    for i, prompt in listed:
        _asked(prompt, i, seed, call, takes)
    made_with = _made_with(pipe, session.settings)

    def asked(i: int, prompt: Prompt) -> tuple[Record, dict[str, Any]]:
        text, own, more = _asked(prompt, i, seed, call, takes)
        told = {"prompt": text, "seed": own, "made_with": {**made_with, **of_call(more)}}
        return json.loads(json.dumps(told)), more

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    there = {i: _there(folder, i, asked(i, prompt)[0]) for i, prompt in listed[rank::world]}
    total = len(prompts) if isinstance(prompts, Sequence) else None
    bar = diffusers_logging.tqdm(total=total, unit="image", disable=True if rank else None)
    records: list[Record] = []
    try:
        with bar, _without_bar(pipe):
            for i, prompt in enumerate(prompts):
                if i % world != rank:
                    continue
                told, more = asked(i, prompt)
                found = there.get(i) or _there(folder, i, told)
                records.append(found or _drawn(pipe, folder, i, told, more))
                if not bar.disable:
                    bar.n = len(_names(folder))  # of all processes
                    bar.refresh()
    finally:
        _write_manifest(folder)
    return records


def share() -> tuple[int, int]:
    """The rank of this process and how many there are, by the environment."""
    told = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    rank, world = (int(text) if text.isdecimal() else -1 for text in told)
    if not 0 <= rank < world:
        raise ValueError(
            "RANK and WORLD_SIZE must be whole numbers, the former below the latter; got "
            f"{told[0]} and {told[1]}"
        )
    return rank, world


def _asked(
    prompt: Any, index: int, seed: int, call: Mapping[str, Any], takes: Mapping[str, Any]
) -> tuple[str, int, dict[str, Any]]:
    """The text of a prompt, its seed and the arguments of its call."""
    name = f"prompt {index}"
    given = {"prompt": prompt} if isinstance(prompt, str) else prompt
    check_kind(name, given, Mapping, "a text or a mapping")
    more = {**call, **given}
    check_kind(f"{name}'s prompt", more.pop("prompt", None), str, "a text")
    own = more.pop("seed", seed + index)
    check_count(f"{name}'s seed", own, 0, 2**63 - 1)
    for each in more:
        if each in OURS or not _takes(each, takes):
            what = "is not to be set here" if each in OURS else "is no argument of the pipeline"
            raise ValueError(f"{name}: {shown(each)} {what}")
    return given["prompt"], own, more


def _takes(name: str, parameters: Mapping[str, Any]) -> bool:
    any_name = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return name in parameters or any_name


def _path(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.png"


def _there(folder: Path, index: int, asked: Record) -> Record | None:
    """The record of an image that is there, whole. Raises ValueError if it is of something else."""
    path = _path(folder, index)
    if not path.exists() or not _is_whole(path):
        return None
    there = _record(path)
    if there is None:
        raise ValueError(f"{path} is there and not of ras.generate; name another folder")
    unlike = differences(_flat(there), _flat(asked))
    if unlike:
        raise ValueError(
            f"{path} is there and drawn otherwise ({'; '.join(unlike)}); name another folder"
        )
    return there


def _is_whole(path: Path) -> bool:
    """Whether a file is an image that can be read, not what a crash of the machine has left."""
    try:
        with Image.open(path) as image:
            image.verify()
    except (PermissionError, IsADirectoryError):
        raise
    except (OSError, SyntaxError, ValueError, EOFError, struct.error):
        return False
    return True


def _drawn(pipe: Any, folder: Path, index: int, asked: Record, call: Mapping[str, Any]) -> Record:
    """Draw an image; its record."""
    path, before = _path(folder, index), stats(pipe).warnings
    started, begin = datetime.datetime.now(datetime.timezone.utc), time.perf_counter()
    generator = torch.Generator().manual_seed(asked["seed"])
    output = pipe(prompt=asked["prompt"], generator=generator, **call)
    seconds, images = time.perf_counter() - begin, getattr(output, "images", None)
    if not images or not isinstance(images[0], Image.Image):
        raise ValueError(f"{type(pipe).__name__} makes no images, which is what is written")
    record = {
        "index": index,
        "prompt": asked["prompt"],
        "seed": asked["seed"],
        "file": path.name,
        "started": started.isoformat(timespec="milliseconds"),
        "seconds": round(seconds, 3),
        "made_with": asked["made_with"],
        "stats": _told(stats(pipe), before),
    }
    note = PngImagePlugin.PngInfo()
    note.add_itxt(RECORD, json.dumps(record))
    with written_whole(path) as part:
        images[0].save(part, format="PNG", pnginfo=note)
    return record


def _told(found: Stats, before: Sequence[str]) -> Record:
    """Figures of a call, and what was not yet warned of before it."""
    new = [each for each in found.warnings if each not in before]
    return {name: getattr(found, name) for name in TOLD} | {"warnings": new}


def _made_with(pipe: Any, settings: Settings) -> Record:
    """All that an image is made with but for what a call says; of settings, what is not usual."""
    modules = modules_of(pipe)
    told = {role: part for role, part in modules.items() if isinstance(_config(part), Mapping)}
    found = {"pipeline": type(pipe).__name__, **of_model(told, pipe.scheduler)}
    found |= of_weights(modules)
    usual, config = dataclasses.asdict(RASConfig()), dataclasses.asdict(settings.config)
    found |= {f"ras.{name}": plain(config[name]) for name in config if config[name] != usual[name]}
    return found if settings.mask is None else {**found, "ras.mask": plain(settings.mask)}


def _config(part: Any) -> Any:
    return getattr(part, "config", None)  # transformers' have no mapping as theirs


def _flat(record: Record) -> Record:
    return {"prompt": record["prompt"], "seed": record["seed"], **record["made_with"]}


def _names(folder: Path) -> list[str]:
    """The images that are there, in order."""
    found = [each.name for each in os.scandir(folder) if re.fullmatch(r"\d{5,}\.png", each.name)]
    return sorted(found, key=lambda name: int(name.removesuffix(".png")))


def _record(path: Path) -> Record | None:
    """The record in an image, or None if it has none."""
    try:
        with Image.open(path) as image:
            found = json.loads(image.info[RECORD])
    except (OSError, SyntaxError, KeyError, TypeError, ValueError, RecursionError, struct.error):
        return None
    whole = isinstance(found, dict) and found.keys() >= {"prompt", "seed", "made_with"}
    return found if whole and isinstance(found["made_with"], dict) else None


def _write_manifest(folder: Path) -> None:
    """Write the records of all images, and remove what killed processes have left.

    One process at a time reads what there is and writes it, so that the last one's has all.
    """
    with locked(folder / LOCK):
        records = filter(None, (_record(folder / name) for name in _names(folder)))
        write_text(folder / MANIFEST, "".join(f"{json.dumps(each)}\n" for each in records))
        remove_parts(folder)


@contextmanager
def _without_bar(pipe: Any) -> Iterator[None]:
    """Without a pipeline's bar of steps."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe._progress_bar_config = before
