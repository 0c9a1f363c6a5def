"""Pipelines from folders and from the hub, without what the libraries have to say meanwhile."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import is_accelerate_available
from diffusers.utils import logging as diffusers_logging

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Pipeline = Any  # a DiffusionPipeline; its classes share no call that a type could describe


def load(options: argparse.Namespace, bundled: Path) -> Pipeline:
    """The pipeline of the options `model`, `device` and `dtype`, else the bundled one.

    Raises ValueError, whatever the reason, if there is none.
    """
    source = str(options.model or bundled)
    dtype = options.dtype or ("float32" if options.device.type == "cpu" else "bfloat16")
    try:
        with quiet(diffusers_logging):
            if options.model and sys.stderr.isatty():
                diffusers_logging.enable_progress_bar()
            pipe = DiffusionPipeline.from_pretrained(
                source,
                torch_dtype=DTYPES[dtype],
                use_safetensors=True,
                low_cpu_mem_usage=is_accelerate_available(),
                **absent_parts(Path(source)),
            )
            return pipe.to(options.device)
    except Exception as error:  # whatever the libraries make of a stranger's files
        hub = options.model is not None and not Path(source).is_dir()
        where = " (no such folder) from the hub" if hub else ""
        raise ValueError(f"cannot load {source}{where}: {error}") from error


def absent_parts(folder: Path) -> dict[str, None]:
    """The parts that a pipeline was saved without, such as T5: diffusers has to be told again."""
    index = folder / "model_index.json"
    if not index.is_file():
        return {}
    parts = json.loads(index.read_text())
    return {name: None for name, part in parts.items() if part == [None, None]}


@contextmanager
def quiet(library: ModuleType) -> Iterator[None]:
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
