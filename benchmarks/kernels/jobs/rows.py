"""Jobs that move rows of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import ras_kernels
from ras_kernels import reference

from .job import COPY, DTYPE, Job, Shape, Way, active_index, copied, flat_index, normal


def gather_tokens(s: Shape, device: str) -> Job:
    """The active rows of the hidden states, (B, N, C)."""
    tokens, index = normal(device, s.batch, s.tokens, s.width), active_index(s, device)
    at, wide = flat_index(index, s.tokens), index.long()[:, :, None].expand(-1, -1, s.width)
    rows = tokens[:, : s.active]
    return Job(
        [rows, rows, index],
        Way(lambda: ras_kernels.gather_tokens(tokens, index)),
        {
            "index_select": Way(
                lambda: tokens.flatten(0, 1).index_select(0, at).view(s.batch, -1, s.width)
            ),
            "gather": Way(lambda: tokens.gather(1, wide)),
            "indexing": Way(lambda: reference.gather_tokens(tokens, index)),
            COPY: copied(rows),
        },
        tolerance=0,
    )


def scatter_tokens_(s: Shape, device: str) -> Job:
    """New keys into the image's rows of a cache, (B, N + T, G, D)."""
    cache, index = normal(device, s.batch, s.rows, s.groups, s.size), active_index(s, device)
    rows, image = normal(device, s.batch, s.active, s.groups, s.size), cache[:, : s.tokens]
    at = flat_index(index, s.rows)

    def index_copy() -> Tensor:
        cache.flatten(0, 1).index_copy_(0, at, rows.flatten(0, 1))
        return image

    def indexing() -> Tensor:
        reference.scatter_tokens_(image, index, rows)
        return image

    return Job(
        [rows, rows, index],
        Way(lambda: ras_kernels.scatter_tokens_(image, index, rows)),
        {"index_copy_": Way(index_copy), "indexing": Way(indexing), COPY: copied(rows)},
        written=[cache],
        tolerance=0,
    )


def update_tokens_(s: Shape, device: str) -> Job:
    """New keys into a cache, and how much they changed into another."""
    tokens, changes = (normal(device, s.batch, s.tokens, s.groups, s.size) for _ in range(2))
    rows, index = normal(device, s.batch, s.active, s.groups, s.size), active_index(s, device)
    at = flat_index(index, s.tokens)

    def ours() -> Sequence[Tensor]:
        ras_kernels.update_tokens_(tokens, changes, index, rows)
        return tokens, changes

    def index_copy() -> Sequence[Tensor]:
        new, all_tokens = rows.flatten(0, 1), tokens.flatten(0, 1)
        changes.flatten(0, 1).index_copy_(0, at, new - all_tokens.index_select(0, at))
        all_tokens.index_copy_(0, at, new)
        return tokens, changes

    return Job(
        [rows, rows, rows, rows, index],
        Way(ours),
        {"index_select, sub, index_copy_": Way(index_copy)},
        written=[tokens, changes],
    )


def carry_keys_and_values(s: Shape, device: str) -> Job:
    """A cache's image rows, carried on by their last changes, with its text rows as they are."""
    caches = [normal(device, s.batch, s.rows, s.groups, s.size) for _ in range(2)]
    changes = [normal(device, s.batch, s.tokens, s.groups, s.size) for _ in range(2)]
    gain = normal(device, s.batch, s.tokens, dtype=torch.float32)

    def addcmul() -> Sequence[Tensor]:
        share = gain[:, :, None, None].to(DTYPE)
        return [
            torch.cat([torch.addcmul(kept[:, : s.tokens], change, share), kept[:, s.tokens :]], 1)
            for kept, change in zip(caches, changes)
        ]

    def each() -> Sequence[Tensor]:
        return [ras_kernels.carry_tokens(*pair, gain) for pair in zip(caches, changes)]

    return Job(
        [*caches, *caches, *changes, gain],
        Way(lambda: ras_kernels.carry_keys_and_values(*caches, *changes, gain)),
        {"carry_tokens twice": Way(each), "addcmul, cat": Way(addcmul)},
    )


def quantize_tokens_(s: Shape, device: str) -> Job:
    """New keys into a cache of 8 bits, and how much they changed into another."""
    parts = [*_codes(s, s.tokens, device), *_codes(s, s.tokens, device)]
    rows, index = normal(device, s.batch, s.active, s.groups, s.size), active_index(s, device)
    codes, scales, beside, others = parts
    moved = [part[:, : s.active] for part in parts]

    def ours() -> Sequence[Tensor]:
        ras_kernels.quantize_tokens_(
            codes, scales, index, rows, change_codes=beside, change_scales=others
        )
        return parts

    def plain() -> Sequence[Tensor]:
        reference.quantize_tokens_(*parts, index, rows)
        return parts

    return Job(
        [*moved, *moved[:2], rows, index], Way(ours), {"indexing": Way(plain)}, written=parts
    )


def dequantize_tokens(s: Shape, device: str) -> Job:
    """A cache of 8 bits, its image rows carried on, as keys that attention takes."""
    parts = [*_codes(s, s.rows, device), *_codes(s, s.tokens, device)]
    codes, scales, beside, others = parts
    gain = normal(device, s.batch, s.tokens, dtype=torch.float32)
    options = dict(change_codes=beside, change_scales=others, gain=gain)
    output = torch.empty(codes.shape, dtype=DTYPE, device=device)
    return Job(
        [*parts, gain, output],
        Way(lambda: ras_kernels.dequantize_tokens(codes, scales, DTYPE, **options)),
        {"mul, addcmul, cat": Way(lambda: reference.dequantize_tokens(*parts, gain, DTYPE))},
    )


def _codes(s: Shape, count: int, device: str) -> tuple[Tensor, Tensor]:
    """Codes (B, count, G, D) with their scales."""
    shape = s.batch, count, s.groups, s.size
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
    return codes, torch.rand(shape[:3], device=device)


JOBS = (
    gather_tokens,
    scatter_tokens_,
    update_tokens_,
    carry_keys_and_values,
    quantize_tokens_,
    dequantize_tokens,
)
