"""What a layer keeps of its keys, or of its values: rows of all tokens, and how they changed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import ras_kernels

from .tokens import room, write


class Kept(NamedTuple):
    """Rows `(B, S, G, D)`, as they are or as codes of 8 bits with scales.

    Attributes:
        rows: In the model's dtype, or one of `ras_kernels.CODES`.
        changes: `(B, N, G, D)`, what the last change of each of the first N was, if that is kept.
        scales, change_scales: `(B, S, G)` and `(B, N, G)` float32, those of codes.
    """

    rows: Tensor
    changes: Tensor | None = None
    scales: Tensor | None = None
    change_scales: Tensor | None = None

    @classmethod
    def zeros(
        cls, shape: tuple[int, ...], moving: int | None, dtype: torch.dtype, device: torch.device
    ) -> Kept:
        """Room for rows, and for the changes of the first `moving` of them, None for no changes."""
        batch, _, *row = shape
        rows, changes = room(None, shape, dtype, device), None
        scales = change_scales = None
        if moving is not None:
            changes = room(None, (batch, moving, *row), dtype, device)
        if dtype in ras_kernels.CODES:
            scales = room(None, shape[:3], torch.float32, device)
            if changes is not None:
                change_scales = room(None, changes.shape[:3], torch.float32, device)
        return cls(rows, changes, scales, change_scales)

    def part(self, begin: int, end: int) -> Kept:
        """The rows from `begin` to `end`, with their changes if these are kept of all of them."""
        if self.changes is not None and end > self.changes.shape[1]:
            return self.without_changes().part(begin, end)
        parts = {
            name: each[:, begin:end] for name, each in self._asdict().items() if each is not None
        }
        return Kept(**parts)

    def write(self, index: Tensor | None, new: Tensor) -> None:
        """Overwrite rows `(B, k)`, or all (None), and note by how much they change.

        With autocast `new` may be of another dtype than its layer, after a norm.
        """
        if self.scales is not None:
            ras_kernels.quantize_tokens_(
                self.rows,
                self.scales,
                index,
                new,
                change_codes=self.changes,
                change_scales=self.change_scales,
            )
        elif self.changes is not None:
            ras_kernels.update_tokens_(self.rows, self.changes, index, new.to(self.rows.dtype))
        else:
            write(self.rows, index, new.to(self.rows.dtype))

    def without_changes(self) -> Kept:
        """The rows as they are, held from now on."""
        return self._replace(changes=None, change_scales=None)

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return [each for each in self if each is not None]


def read(key: Kept, value: Kept, gain: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All keys and values in a dtype, carried on by a share of their last change, `(B, N)`."""
    if key.changes is None or value.changes is None:
        gain = None
    if key.scales is not None:
        return _decoded(key, gain, dtype), _decoded(value, gain, dtype)
    if gain is None or key.changes is None or value.changes is None:
        return key.rows, value.rows
    return ras_kernels.carry_keys_and_values(key.rows, value.rows, key.changes, value.changes, gain)


def _decoded(kept: Kept, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
    assert kept.scales is not None
    carries = gain is not None
    return ras_kernels.dequantize_tokens(
        kept.rows,
        kept.scales,
        dtype,
        change_codes=kept.changes if carries else None,
        change_scales=kept.change_scales if carries else None,
        gain=gain,
    )
