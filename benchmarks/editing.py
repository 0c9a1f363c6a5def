"""The ruler for editing: how near to the dense result each method comes, and in what time.

    python -m benchmarks.editing
    python -m benchmarks.editing --count 300 --methods regions --labels 2x

Unseen edits of drawn scenes (`benchmarks.model.kontext`) by the bundled editing model, one at a
time, each by every method in turn; a speed-up is the median of the ratios to the dense run of the
same edit, and compute that of multiply-adds where the method computes whole steps, else of tokens.
*Small* edits change at most a quarter of the image's tokens, *large* ones more, or the background.
The region of an edit is where the drawn scenes before and after it differ, widened by a token; PSNR
is to the dense image, in all and inside of it. *Asked* is the share of edits that change what they
are asked to as they are asked to, as a classifier sees it (`benchmarks.quality.judge`), *all* of
those whose objects are all as they are to be, with no others, *kept* the PSNR outside to the
picture, and *missed* the number of edits whose region is nearer to the picture than to the dense
image, which has changed it. A last table tells what the model itself does, by what is changed.

Beside the rivals of `benchmarks.quality` there are, from the papers' descriptions in our own words,
*references behind*: the image's tokens in every step, over keys and values of the references that
two dense steps have left; and what `RASConfig.regione` and `RASConfig.spotedit` have of RegionE and
SpotEdit. *RAS* is the default, of whole steps; *regions* is `sample_ratio="edited"` besides.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import ras
from ras.cli.runs import clock
from ras.files import write_text

from .commands import COUNT, as_command
from .model import edits, kontext
from .model.edits import Edit
from .model.scenes import COLOURS, PLACES, Scene
from .model.sd3 import SIDE
from .quality import judge, rivals
from .quality.drawing import Item, decode, draw, encode, model
from .quality.measures import psnr
from .quality.setting import STEPS, Setting, as_it_is
from .tables import RESULTS, grid

SPEEDUPS = (1.5, 2.0, 2.6, 3.0, 4.0, 6.0)
TARGETS = (1.5, 2.0, 2.6, 3.0, 4.0)  # speed-ups that methods are compared at
SIDES = (16, 16)  # tokens of the image
QUARTER = 0.25
PEAK = 100.0  # dB: equal images have no finite PSNR
RIVALS = ("fewer", "FirstBlock", "TaylorSeer", "SeaCache", "DBCache")
KINDS = ("small", "large")
BESIDE = 4  # runs that a dense one is beside


def settings(pipe: Any) -> list[Setting]:
    """All methods."""

    def ours(method: str, label: str, *given: Any, **options: Any) -> Setting:
        return Setting(method, label, STEPS, lambda pipe: ras.enabled(pipe, *given, **options))

    found = []
    for _, each in itertools.groupby(rivals.settings(pipe, lambda pipe: None), _method):
        line = list(each)
        found += line[:: 1 if len(line) < 5 else 2] if line[0].method.startswith(RIVALS) else []
    found.append(Setting("references behind", "", STEPS, references_behind))
    regione, spotedit = ras.RASConfig.regione, ras.RASConfig.spotedit
    papers = {
        "RegionE": [regione(), regione(error_reset_steps=(10, 13, 16, 19, 22))],
        "SpotEdit": [spotedit(), spotedit(error_reset_steps=(16,))],
    }
    for name, configs in papers.items():
        found += [ours(name, f"{len(each.error_reset_steps)} resets", each) for each in configs]
    edited: dict[str, Any] = dict(sample_ratio="edited")
    found += [ours("regions", f"{x:g}x", speedup=x, **edited) for x in SPEEDUPS]
    return found + [ours("RAS", f"{x:g}x", speedup=x) for x in SPEEDUPS]


@contextmanager
def references_behind(pipe: Any) -> Iterator[None]:
    almost = (SIDES[0] * SIDES[1] - 1) / (SIDES[0] * SIDES[1])  # a step of all tokens is dense
    plan = [1.0, 1.0, *[almost] * (STEPS - 2)]
    with (
        mock.patch("ras.references.references_under", lambda *_: None),
        ras.enabled(pipe, plan=plan, mask=False, kv_correction=False),
    ):
        yield


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark on the command line `argv` (default: the process's own)."""
    parser = argparse.ArgumentParser(prog="benchmarks.editing", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", default="kontext", help="a pipeline's folder; default: the bundled one")
    add("--count", type=COUNT, default=24, help="edits")
    add("--first", type=COUNT, default=1, help="the number of the first of them")
    add("--methods", nargs="+", help="only methods whose names hold one of these")
    add("--labels", nargs="+", help="only these settings of theirs")
    add("--out", type=Path, default=RESULTS / "editing-cpu.json")
    options = parser.parse_args(argv)
    rows = measure(model(options.model), options)
    write_text(options.out, json.dumps(rows, indent=1) + "\n")
    print(report(rows))


def measure(pipe: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each method and edit."""
    methods = [
        each
        for each in settings(pipe)
        if not options.methods or any(each.method.startswith(part) for part in options.methods)
        if not options.labels or each.label in options.labels
    ]
    chosen = itertools.islice(
        enumerate(kontext.unseen()), options.first - 1, options.first - 1 + options.count
    )
    judges, rows = judge.load_classifier(), []
    dense = Setting("dense", "", STEPS, as_it_is)
    for number, edit in tqdm(list(chosen), desc="edits"):
        item = Item(number, edit.instruction(), edit.after, edit.before)
        inputs = encode(pipe, [item])
        before, after = (
            torch.from_numpy(scene.draw(SIDE)).movedim(-1, 0)[None] / 255
            for scene in (edit.before, edit.after)
        )
        region = region_of(before, after)
        share = region.mean().item()
        kind = KINDS[edit.kind == "background" or share > QUARTER]
        wide = F.interpolate(F.max_pool2d(region, 3, 1, 1), (SIDE, SIDE))
        truth, seconds, _ = run(pipe, inputs, dense)
        changed = psnr(before, truth, wide).item()
        for turn, method in enumerate([dense, *methods]):
            if turn and turn % BESIDE == 0:  # as machines have their moods
                seconds = run(pipe, inputs, dense)[1]
            image, taken, ceiling = truth, seconds, None
            if turn:
                image, taken, ceiling = run(pipe, inputs, method)
            near = psnr(image, truth, wide).clamp(max=PEAK).item()
            rows.append(
                {
                    "edit": number,
                    "kind": kind,
                    "change": edit.kind,
                    "share": share,
                    "method": method.method,
                    "label": method.label,
                    "speedup": seconds / taken,
                    "compute": ceiling or (STEPS / method.steps if method.steps < STEPS else None),
                    "psnr": psnr(image, truth).clamp(max=PEAK).item(),
                    "inside": near,
                    "asked": is_done(judges, image, edit),
                    "all": is_right(judges, image, edit.after),
                    "kept": None if wide.all() else psnr(image, before, 1 - wide).item(),
                    "missed": near < psnr(image, before, wide).item() and changed < near,
                }
            )
    return rows


def run(pipe: Any, inputs: dict[str, Any], method: Setting) -> tuple[Tensor, float, float | None]:
    """The image, the seconds of the loop, and the ceiling of a run with RAS."""
    with method.switch(pipe):
        start = clock("cpu")
        latents = draw(pipe, inputs, method.steps)
        seconds = clock("cpu") - start
        ceiling = ras.stats(pipe).speedup_ceiling if ras.is_enabled(pipe) else None
    return decode(pipe, latents), seconds, ceiling


@torch.no_grad()
def is_right(judges: judge.Classifier, image: Tensor, scene: Scene) -> bool:
    """Whether an image `(1, 3, 256, 256)` shows the scene's objects, and no others."""
    presence, *logits = judges(image)
    wanted = judge.labels([scene])
    there = wanted[..., 0] >= 0
    read = torch.stack([value.argmax(-1) for value in logits], dim=-1)
    return bool(((presence > 0) == there).all() and (read == wanted)[there].all())


@torch.no_grad()
def is_done(judges: judge.Classifier, image: Tensor, edit: Edit) -> bool:
    """Whether an image `(1, 3, 256, 256)` has the one thing that an edit is to change."""
    if edit.kind == "background":
        return background_of(image) == edit.after.colour
    presence, *logits = judges(image)
    there = dict(zip(PLACES, (presence[0] > 0).tolist()))
    old, new = edit.before.objects, edit.after.objects
    if edit.kind in ("presence", "place"):
        gone, come = ({thing.place for thing in things} for things in (old, new))
        return all(there[place] for place in come - gone) and not any(
            there[place] for place in gone - come
        )
    changed = next(now for was, now in zip(old, new, strict=True) if was != now)
    at, which = list(PLACES).index(changed.place), list(judge.WORDS).index(edit.kind)
    wanted = judge.labels([edit.after])[0, at, which]
    return there[changed.place] and bool(logits[which][0, at].argmax() == wanted)


def background_of(image: Tensor) -> str:
    """The colour word nearest to what most of an image `(1, 3, H, W)` is like, however bright."""
    middle = image[0].flatten(1).median(dim=1).values
    words = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    return list(COLOURS)[int(F.cosine_similarity(words, middle[None]).argmax())]


def region_of(before: Tensor, after: Tensor) -> Tensor:
    """The tokens in which two images `(1, 3, H, W)` differ, `(1, 1, 16, 16)` of zeros and ones."""
    differs = (before - after).abs().amax(1, keepdim=True) > 0.02
    return F.adaptive_max_pool2d(differs.float(), SIDES)


# --- what is told ---------------------------------------------------------------------------------


def report(rows: list[dict[str, Any]]) -> str:
    """A table of each kind of edit, and one at equal wall time."""
    parts = []
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        if not mine:
            continue
        count = len({row["edit"] for row in mine})
        parts.append(f"{count} {kind} edits:\n\n{table(mine)}")
        parts.append(f"{kind}, PSNR in dB at equal wall time:\n\n{at_equal_time(mine)}")
    parts.append(f"by what is changed, the model itself:\n\n{by_change(rows)}")
    return "\n\n".join(parts)


def by_setting(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["method"], row["label"]), []).append(row)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for (method, label), mine in by_setting(rows).items():
        mean = partial(_mean, mine)
        interval = 1.96 * statistics.pstdev(row["psnr"] for row in mine) / len(mine) ** 0.5
        lines.append(
            [
                method,
                label,
                f"{_middle(mine, 'speedup'):.2f}",
                "" if mine[0]["compute"] is None else f"{_middle(mine, 'compute'):.2f}",
                f"{mean('psnr'):.1f} ± {interval:.1f}",
                f"{mean('inside'):.1f}",
                f"{mean('asked'):.0%}",
                f"{mean('all'):.0%}",
                "" if None in [row["kept"] for row in mine] else f"{mean('kept'):.1f}",
                f"{sum(row['missed'] for row in mine)}",
            ]
        )
    titles = "method | setting | speed-up | compute | PSNR | inside | asked | all | kept | missed"
    return grid(titles, lines)


def by_change(rows: list[dict[str, Any]]) -> str:
    """What the dense results have got right, by what an edit is to change."""
    found = []
    for change in edits.KINDS:
        mine = [r for r in rows if (r["method"], r["change"]) == ("dense", change)]
        if mine:
            shares = (f"{_mean(mine, name):.0%}" for name in ("asked", "all"))
            found.append([change, str(len(mine)), *shares])
    return grid("change | edits | asked | all", found)


def at_equal_time(rows: list[dict[str, Any]]) -> str:
    """Each method on the line between its settings, in the logarithm of the speed-up."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for (method, _), mine in by_setting(rows).items():
        lines.setdefault(method, []).append((_middle(mine, "speedup"), _mean(mine, "psnr")))
    found = []
    for method, points in lines.items():
        speeds, values = map(np.array, zip(*sorted(points)))
        cells = [
            f"{np.interp(np.log(x), np.log(speeds), values):.1f}"
            if speeds[0] <= x <= speeds[-1] and len(points) > 1
            else ""
            for x in TARGETS
        ]
        if any(cells):
            found.append([method, *cells])
    return grid(" | ".join(["method", *(f"{x:g}×" for x in TARGETS)]), found)


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


def _middle(rows: list[dict[str, Any]], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def _method(setting: Setting) -> str:
    return setting.method


if __name__ == "__main__":
    as_command(main)
