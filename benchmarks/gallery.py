"""The gallery: pictures by the bundled models, dense and with RAS, and what was computed of them.

    python -m benchmarks.gallery

draws those of `docs/gallery.md`, in two minutes on a CPU. A PSNR is that to the dense picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

import ras
from ras.cli.edit import BUNDLED_CALL as EDIT
from ras.cli.edit import SIDE
from ras.cli.generate import BUNDLED_CALL as DRAW
from ras.cli.loading import load
from ras.cli.runs import Job, RasRun
from ras.files import written_whole
from ras.pictures import difference_map, plan_strip, psnr
from ras.pictures.panels import comparison

from .commands import as_command

PICTURES = Path(__file__).parents[1] / "docs/pictures/gallery"
STEPS, SEED = 28, 0
DRAWN = {
    "star": "a large dotted green star, right, on a grainy white background",
    "ring": "a striped red ring, top left, on a blue background",
    "shapes": "a small yellow cross, top, and a large blue square, bottom, on an orange background",
}
PICTURE = "a small red star, top right, on a blue background"
SMALL, LARGE, MASKED = "make the star green", "make the background white", "make the star yellow"
QUALITY = 85  # of a WebP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=PICTURES, help="a folder; default: %(default)s")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    picture = _draw_all(out)
    _edit_all(out, picture)


def _draw_all(out: Path) -> Image.Image:
    """From texts: by whole steps, and by regions; returns a picture to edit."""
    pipe = _load(ras.bundled_model())
    whole, regions = ras.RASConfig(2.0), ras.RASConfig(sample_ratio=0.3)
    for name, prompt in DRAWN.items():
        call = {"prompt": prompt, **DRAW}
        dense = _job(pipe, call).run(name, STEPS).image
        runs = [_job(pipe, call, config).run_ras(name, STEPS) for config in (whole, regions)]
        panels = [
            ("Dense", dense),
            (_title("speedup=2", dense, runs[0].image), runs[0].image),
            (_title("sample_ratio=0.3", dense, runs[1].image), runs[1].image),
            ("Where that differs", difference_map(dense, runs[1].image)),
        ]
        _save(out / f"{name}.webp", panels, runs[1], prompt)
        if name == "ring":
            _job(pipe, call, regions).animate(out / "ring-steps.webp")
            for each, label in zip(runs, ("whole", "regions")):
                with written_whole(out / f"plan-{label}.png") as part:
                    assert each.stats.plan is not None
                    plan_strip(each.stats.plan).save(part, optimize=True)
    return _job(pipe, {"prompt": PICTURE, **DRAW}).run("picture", STEPS).image


def _edit_all(out: Path, picture: Image.Image) -> None:
    """Of one picture: an edit of a part, one of nearly all, and one with a mask."""
    pipe = _load(ras.bundled_model("edit"))
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).rectangle((SIDE * 9 // 16, 0, SIDE, SIDE * 7 // 16), 255)
    followed = ras.RASConfig(2.0, sample_ratio="edited", preserve=True)
    masked = ras.RASConfig(2.0, preserve=True)
    for name, words, config, given in (
        ("edit-part", SMALL, followed, None),
        ("edit-background", LARGE, followed, None),
        ("edit-mask", MASKED, masked, mask),
    ):
        call = {"prompt": words, "image": picture, **EDIT}
        dense, job = _job(pipe, call).run(name, STEPS).image, _job(pipe, call, config, given)
        run = job.run_ras(name, STEPS)
        image = run.image
        if run.stats.edited is not None:
            image = ras.put_back(image, picture, run.stats.edited[0])
        panels = [("Picture", picture)]
        if given is not None:
            panels.append(("Mask", given.convert("RGB")))
        panels += [("Dense", dense), (_title("RAS", dense, image), image)]
        _save(out / f"{name}.webp", panels, run, words)
        if name == "edit-part":
            job.animate(out / "edit-steps.webp")


def _load(folder: Path) -> Any:
    options = argparse.Namespace(model=None, device=torch.device("cpu"), dtype=None)
    return load(options, folder)


def _job(pipe: Any, call: dict[str, Any], config: Any = None, mask: Any = None) -> Job:
    return Job(pipe, torch.device("cpu"), call, STEPS, SEED, config or ras.RASConfig(), mask)


def _title(name: str, dense: Image.Image, image: Image.Image) -> str:
    return f"{name} · {psnr(dense, image):.0f} dB"


def _save(path: Path, panels: list[tuple[str, Image.Image]], run: RasRun, words: str) -> None:
    """Pictures beside each other, with how often each region of a run was computed."""
    stats = run.stats
    assert stats.region_counts is not None
    told = (
        f"{stats.steps_dense} steps dense, {stats.steps_sparse} partial, {stats.steps_skipped} "
        f"skipped · {stats.tokens_computed / stats.tokens_total:.0%} of the image tokens computed"
    )
    drawn = comparison(panels, stats.region_counts[0].numpy(), "Times computed", (words, told))
    with written_whole(path) as part:
        drawn.save(part, quality=QUALITY)


if __name__ == "__main__":
    as_command(main)
