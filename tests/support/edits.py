"""Pipelines that edit, edits that are given, and what a run of them computed."""

from functools import partial
from unittest import mock

import torch

import ras
from ras.policy import edits
from ras.policy.selection import Selection
from ras.references import references_under
from support.zoo.flux import flux_with_vae
from support.zoo.parts import SIDE, picture

STEPS = 12
EDITED = dict(speedup=2, sample_ratio="edited")
TWO = dict(num_images_per_prompt=2)


def kontext(**inputs):
    picture_ = picture(SIDE, SIDE)
    return flux_with_vae(
        "FluxKontextPipeline", image=picture_, _auto_resize=False, max_area=SIDE**2, **inputs
    )


def regions(*boxes):
    """A stand-in for `edited`: the samples' boxes (y, x, height, width), call by call the same."""

    def found(scores, rms, grid, margin):
        assert scores.shape[0] == len(boxes) and margin == 1
        marked = torch.zeros(len(boxes), *grid, dtype=torch.bool)
        for each, (y, x, height, width) in zip(marked, boxes, strict=True):
            each[y : y + height, x : x + width] = True
        return marked.flatten(1)

    return mock.patch.object(edits, "edited", found)


SMALL = (1, 2, 2, 3), (4, 4, 2, 2)  # of two samples
LARGE = (0, 0, 8, 8), (4, 4, 2, 2)


def noted(pipe, call, boxes=SMALL, more=TWO, steps=STEPS, **settings):
    """Latents, the rows of each partial step by step, and the statistics of a run."""
    rows, choose = {}, Selection.choose
    if not {"config", "plan", "sample_ratio"} & settings.keys():
        settings |= dict(sample_ratio="edited")

    def choosing(selection, *args, **kwargs):
        chosen = choose(selection, *args, **kwargs)
        rows[session.run.step] = chosen.clone()
        return chosen

    with regions(*boxes), ras.enabled(pipe, **settings):
        (session,) = [m for m in pipe.transformer._ras_mount.sessions]
        with mock.patch.object(Selection, "choose", choosing):
            latents = call(steps, **more)
        under = partial(references_under, layout=session.run.planned.layout)
        return latents, rows, ras.stats(pipe), under
