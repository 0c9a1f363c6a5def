"""Where tokens enter a transformer and leave it: the rows alone that walk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import ras_kernels

from .layout import Layout, Rows
from .parallel import Ranks, Share
from .site import Walk


def take(value: Any, rows: Rows, walk: Walk) -> Any:
    """The rows that walk of a tensor, or of all tensors in a list or a dictionary.

    What has one row, or no such dimension, is the same for all tokens, and stays.

    Raises:
        ValueError: There are rows, but not one for each token.
    """
    if isinstance(value, list | tuple):
        return type(value)(take(part, rows, walk) for part in value)
    if isinstance(value, dict):
        return {name: take(part, rows, walk) for name, part in value.items()}
    if not isinstance(value, Tensor) or value.ndim <= rows.dim:
        return value
    if not rows.image:
        return value if walk.share is None else _own_text(value, rows.dim, walk)
    if rows is Rows.GRID:
        tokens = take(value.flatten(2).transpose(1, 2), Rows.IMAGE, walk)
        # Contiguous, so that compiled blocks get the strides that they are used to.
        return tokens.transpose(1, 2).contiguous().unflatten(2, (-1, *[1] * (value.ndim - 3)))
    count, index, layout = value.shape[rows.dim], walk.active, walk.layout
    own = walk if walk.share is None else walk.share
    if count == 1:
        return value
    if rows.text and layout.text and count == layout.sequence:
        index = own.joint
    elif count == layout.image:
        index = own.image
    elif count != layout.tokens or walk.share is not None:
        raise ValueError(
            f"there are {count} rows where {layout.image} image tokens were expected"
            + (f", or {layout.sequence} with the text's" if rows.text else "")
        )
    assert index is not None
    index = index.to(value.device)
    if rows.dim == 0:
        return value[index[0].long()] if walk.shared else value[index.long()]
    return ras_kernels.gather_tokens(value.expand(len(index), *value.shape[1:]), index)


def _own_text(value: Tensor, dim: int, walk: Walk) -> Tensor:
    """This rank's rows of text that walks."""
    assert walk.share is not None
    if value.shape[dim] != walk.share.text:
        raise ValueError(
            f"there are {value.shape[dim]} rows where {walk.share.text} text tokens were expected"
        )
    begin, end = walk.share.ranks.span(walk.share.text)
    return value.narrow(dim, begin, end - begin)


def take_arguments(
    spots: Mapping[str, Rows],
    positions: list[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    walk: Walk,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A module's arguments, those named in `spots` with the rows alone that walk."""
    given = list(args)
    for name, rows in spots.items():
        at = positions.index(name)
        if at < len(given):
            given[at] = take(given[at], rows, walk)
        elif name in kwargs:
            kwargs = {**kwargs, name: take(kwargs[name], rows, walk)}
    return tuple(given), kwargs


def take_outputs(spots: Mapping[int | None, Rows], output: Any, walk: Walk) -> Any:
    """A module's output, that or its elements in `spots` with the rows alone that walk."""
    if None in spots:
        return take(output, spots[None], walk)
    return tuple(
        take(part, spots[at], walk) if at in spots else part for at, part in enumerate(output)
    )


def leave(noise: Tensor, walk: Walk, *, joint: bool) -> Tensor:
    """What a transformer goes on with for the noise of its tokens: that of all.

    Args:
        noise: `(B, n, C)` of the tokens that walk: those of the noise, then references.
        walk: How the tokens go.
        joint: Whether the text's rows are there too.
    """
    text = walk.layout.text if joint and not walk.image_first else 0  # before the image
    active, noise = walk.active, noise.to(walk.held.noise.device)
    count = walk.layout.tokens if active is None else active.shape[1]
    if walk.share is not None:
        whole = walk.layout.image if walk.image is None else walk.image.shape[1]
        noise = walk.share.ranks.gather(noise, whole)
    fresh = noise[:, text : text + count]
    if walk.rows is not None and active is None:
        fresh = ras_kernels.gather_tokens(fresh, walk.rows)
    merged = walk.held.merge(fresh, walk.rows, walk.gain)
    if walk.rows is None:
        return noise
    return torch.cat([noise[:, :text], merged], dim=1) if text else merged


def among(ranks: Ranks, walk: Walk) -> Walk:
    """How the tokens go, of which each rank has a share."""
    layout, image, noise = walk.layout, walk.image, walk.held.noise
    text = 0 if walk.reuse_text and image is not None else layout.text
    if image is None:
        every = torch.arange(layout.image, dtype=torch.int32, device=noise.device)
        image = every.expand(len(noise), -1)
    begin, end = ranks.span(image.shape[1])
    own = image[:, begin:end].contiguous()
    joint = joint_rows(own, layout, walk.image_first, ranks.span(text))
    return dataclasses.replace(walk, share=Share(ranks, text, own, joint))


def joint_rows(
    rows: Tensor, layout: Layout, image_first: bool, span: tuple[int, int] | None = None
) -> Tensor:
    """The rows `(B, T + k)` of a model's joint sequence that walk, all of the text's among them, or
    those from `span[0]` to `span[1]`."""
    if not layout.text:
        return rows
    text = torch.arange(*(span or (0, layout.text)), dtype=rows.dtype, device=rows.device)
    text = text.expand(len(rows), -1)
    if image_first:
        return torch.cat([rows, text + layout.image], dim=1)
    return torch.cat([text, rows + layout.text], dim=1)
