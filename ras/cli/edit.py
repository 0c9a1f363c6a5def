"""`ras edit`: a picture edited by an instruction, dense and with RAS, and the figures of both."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

import ras

from ..config import DEFAULT_SPEEDUP, EDITED
from ..edits import pixels_of
from ..files import written_whole
from ..pictures import psnr
from . import generate
from .loading import Pipeline, load
from .runs import Job, finite, lines, side_by_side, tell

SIDE = 256  # pixels, of the bundled model's pictures
BUNDLED_CALL: dict[str, Any] = {
    "height": SIDE,
    "width": SIDE,
    "max_area": SIDE * SIDE,
    "max_sequence_length": 16,
    "_auto_resize": False,
}
PICTURE = "a small red star, top right, on a blue background"
"""What is drawn for want of a picture to edit."""


def main(options: argparse.Namespace) -> None:
    """Edit the picture, write what came of it and print what was measured."""
    ratio = None if options.whole_steps or options.mask else EDITED
    speedup = DEFAULT_SPEEDUP if options.speedup is None else options.speedup
    config = ras.RASConfig(speedup, sample_ratio=ratio, preserve=options.preserve)
    mask = None if options.mask is None else _read(options.mask).convert("L")
    shown = [("Picture", _read(options.image))] if options.image else _drawn(options)
    picture = shown[-1][1]
    pipe = load(options, ras.bundled_model("edit"))
    _check(pipe)
    call: dict[str, Any] = {"prompt": options.instruction}
    if options.model is None:
        call |= BUNDLED_CALL
        picture = ImageOps.fit(picture, (SIDE, SIDE))
        mask = None if mask is None else ImageOps.fit(mask, (SIDE, SIDE))
    if options.guidance_scale is not None:
        call["guidance_scale"] = options.guidance_scale
    call["image"] = picture
    job = Job(pipe, options.device, call, options.steps, options.seed, config, mask)
    dense, sparse = job.compare()
    edited = sparse[0].stats.edited
    regions = None if edited is None else edited[0]
    of_size = picture.resize(sparse[0].image.size, Image.Resampling.LANCZOS)
    image = sparse[0].image
    if options.preserve and regions is not None:
        image = ras.put_back(image, of_size, regions)
        sparse = [dataclasses.replace(run, image=image) for run in sparse]
    report = {
        "image": options.image or "drawn",
        "prompt": options.instruction,
        "model": options.model or "bundled",
        **job.report(dense, sparse),
        "edited": None if regions is None else regions.float().mean().item(),
        "psnr_outside_db": _outside(image, of_size, regions),
        "out": str(options.out),
        "animation": job.animate(options.animate),
    }
    kept = report["psnr_outside_db"]
    told = [f"outside to the picture {kept:.1f} dB"] if kept is not None else []
    if regions is not None:
        told.insert(0, f"{report['edited']:.0%} edited")
    panels = [
        *((title, each.resize(image.size, Image.Resampling.LANCZOS)) for title, each in shown[:-1]),
        (shown[-1][0], of_size),
        (f"Dense · {report['seconds_dense']:.2f} s", dense[0].image),
        (f"RAS · {report['seconds_ras']:.2f} s", image),
    ]
    with written_whole(options.out) as part:
        side_by_side(panels, sparse[0], report, told).save(part)
    found = lines(report)
    if told:
        found["edit"] = ", ".join(told)
    tell(report, found, as_json=options.json)


def _read(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}") from None


def _drawn(options: argparse.Namespace) -> list[tuple[str, Image.Image]]:
    """A picture by the bundled model, dense and with RAS, by their titles."""
    own = argparse.Namespace(model=None, device=options.device, dtype=options.dtype)
    call = {"prompt": options.picture, **generate.BUNDLED_CALL}
    pipe = load(own, ras.bundled_model())
    job = Job(pipe, options.device, call, 28, options.seed, ras.RASConfig())
    dense, sparse = job.run("picture", 28), job.run_ras("picture", 28)
    return [("Picture, dense", dense.image), ("Picture, RAS", sparse.image)]


def _check(pipe: Pipeline) -> None:
    """Raise ValueError for a pipeline that edits no pictures."""
    taken = inspect.signature(type(pipe).__call__).parameters
    if not {"image", "prompt"} <= taken.keys():
        raise ValueError(
            f"{type(pipe).__name__} takes no image and prompt, and so edits nothing; name a "
            "pipeline that does, such as a FluxKontextPipeline"
        )


def _outside(
    image: Image.Image, picture: Image.Image, regions: torch.Tensor | None
) -> float | None:
    """PSNR to the picture where nothing is edited; None where that is nowhere, or all is equal."""
    if regions is None:
        return None
    outside = ~pixels_of(regions, image.size).numpy()
    if not outside.any():
        return None
    whole, own = (np.asarray(each.convert("RGB"))[outside] for each in (image, picture))
    return finite(psnr(Image.fromarray(whole[None]), Image.fromarray(own[None])))
