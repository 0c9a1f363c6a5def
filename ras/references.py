"""The picture to edit, among the tokens that only condition."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .branch import Branch
from .layout import Layout
from .run import Run


def original(latents: Tensor, layout: Layout) -> Tensor | None:
    """The tokens of the picture, `(B, N, C)`, where the image's are; resampled if of another size.

    None where there is none of the image's shape.

    Args:
        latents: `(B, N + R, C)`, as the transformer gets them.
        layout: Of a sample.
    """
    if layout.picture is None:
        return None
    begin, sides = layout.picture
    begin += layout.tokens
    picture = latents[:, begin : begin + math.prod(sides)]
    if sides == layout.grid:
        return picture.clone()
    image = picture.transpose(1, 2).unflatten(2, sides).float()
    image = F.interpolate(image, layout.grid, mode="bilinear", antialias=True)
    return image.flatten(2).transpose(1, 2).to(picture.dtype)


def references_under(rows: Tensor, layout: Layout) -> Tensor | None:
    """The references that walk with some tokens of the noise: those of the picture beneath them.

    Keys and values of references change with the time that the model is told, and what attends to
    a place of the picture is above all what is to be in that place. None where there is no picture
    of the image's shape.

    Args:
        rows: `(S, k)` tokens of the noise.
        layout: Of a sample.

    Returns:
        `(S, layout.under(k))` int32 in [0, R), ascending.
    """
    if layout.picture is None:
        return None
    begin, sides = layout.picture
    if sides == layout.grid:
        return rows.to(torch.int32) + begin
    chosen = torch.zeros(len(rows), layout.tokens, device=rows.device)
    chosen.scatter_(1, rows.long(), 1)
    beneath = F.interpolate(
        chosen.unflatten(1, (1, *layout.grid)), sides, mode="bilinear", antialias=True
    )
    found = beneath.flatten(1).topk(layout.under(rows.shape[1]), dim=1).indices
    return found.sort(dim=1).values.to(torch.int32) + begin


def gain_of_references(run: Run, branch: Branch, layout: Layout, known: bool) -> Tensor | None:
    """How keys and values go on of references that stay behind in a call, `(B, R)`.

    Which of them walk is noted in the branch, and when.
    """
    times, latents = branch.reference_times, branch.tokens.noise
    if not known:
        times.allocate((len(latents), layout.references), latents.device)
    if branch.skips:
        return None
    rows = branch.rows
    branch.references = None if rows is None else references_under(rows, layout)
    if rows is None or branch.references is not None:
        times.note(branch.references, run.sigma, first=not known)
    gain = times.line(run.sigma)
    return gain if run.planned.extrapolation[run.step] else torch.zeros_like(gain)
