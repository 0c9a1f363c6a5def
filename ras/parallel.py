"""Context parallelism of diffusers: each rank has a share of the rows that walk.

Attention is that of Ulysses (arXiv 2309.14509): each rank gets all rows of a share of the heads, so
that keys and values are kept by heads, and gives back the rows of all heads. Selection looks at the
gathered noise. Diffusers' hooks split and gather in calls that RAS lets be; where it has a say in
how tokens go, they stand still, and the rows that walk are spread evenly, whichever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

HOOKS = "cp_input---", "cp_output---"  # how the names of diffusers' hooks of it begin


@dataclass(frozen=True)
class Ranks:
    """Those that a transformer's rows are split among.

    Attributes:
        group: Their process group.
        rank, size: Which of how many this process is.
    """

    group: Any
    rank: int
    size: int

    def counts(self, rows: int) -> list[int]:
        """How many of so many rows each rank has, as `torch.tensor_split` has it."""
        return [rows // self.size + (rank < rows % self.size) for rank in range(self.size)]

    def span(self, rows: int) -> tuple[int, int]:
        """The first of so many rows that are this rank's, and the first that are the next one's."""
        counts = self.counts(rows)
        begin = sum(counts[: self.rank])
        return begin, begin + counts[self.rank]

    def gather(self, rows: Tensor, total: int, dim: int = 1) -> Tensor:
        """The rows of all ranks, `total` of them along `dim`, from this rank's share."""
        counts, rows = self.counts(total), rows.transpose(0, dim)
        padded = F.pad(rows, [0] * (2 * rows.ndim - 1) + [counts[0] - len(rows)]).contiguous()
        found = padded.new_empty(self.size * counts[0], *padded.shape[1:])
        dist.all_gather_into_tensor(found, padded, group=self.group)
        parts = [part[:count] for part, count in zip(found.split(counts[0]), counts)]
        return torch.cat(parts).transpose(0, dim)

    def to_heads(self, parts: Iterable[Tensor], rows: tuple[int, int]) -> list[Tensor]:
        """All rows of this rank's share of the heads, from this rank's rows of all heads.

        Args:
            parts: Queries, keys and values, `(B, n, H, D)` each.
            rows: How many of all ranks' come first in the joint sequence, and how many then.

        Returns:
            `(B, sum(rows), H / size, D)` each.
        """
        stacked = torch.stack(list(parts))  # (3, B, n, H, D)
        by_rank = stacked.unflatten(3, (self.size, -1)).permute(3, 2, 0, 1, 4, 5)
        shares = [*zip(*map(self.counts, rows))]
        sent = [sum(shares[self.rank])] * self.size
        found = self._exchange(by_rank.flatten(0, 1), sent, [sum(share) for share in shares])
        if all(rows):  # each rank's are next to each other
            pieces = found.split([count for share in shares for count in share])
            found = torch.cat([*pieces[::2], *pieces[1::2]])
        return list(found.permute(1, 2, 0, 3, 4))

    def to_rows(self, output: Tensor, rows: tuple[int, int]) -> Tensor:
        """This rank's rows of all heads, `(B, n, H, D)`; the inverse of `to_heads`."""
        found = output.transpose(0, 1)
        shares = [*zip(*map(self.counts, rows))]
        if all(rows):
            parts = [part.split(self.counts(len(part))) for part in found.split(list(rows))]
            found = torch.cat([piece for pair in zip(*parts) for piece in pair])
        received = [sum(shares[self.rank])] * self.size
        found = self._exchange(found, [sum(share) for share in shares], received)
        return found.unflatten(0, (self.size, -1)).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        found = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(found, rows.contiguous(), received, sent, group=self.group)
        return found

    def agree(self, rows: Tensor) -> Tensor:
        """The first rank's, so that no tie, and no other rounding, has ranks choose unlike rows."""
        rows = rows.contiguous().clone()
        dist.broadcast(rows, dist.get_global_rank(self.group, 0), group=self.group)
        return rows


@dataclass(frozen=True)
class Share:
    """What of a call's rows is this rank's.

    Attributes:
        ranks: See above.
        text: How many rows of text walk, on all ranks.
        image: `(B, k)` this rank's of the rows that walk of noise and references.
        joint: `(B, t + k)` those of the model's joint sequence, its text's included.
    """

    ranks: Ranks
    text: int
    image: Tensor
    joint: Tensor

    def own(self, rows: int) -> int:
        """How many of so many rows are this rank's."""
        return self.ranks.counts(rows)[self.ranks.rank]

    def attend(
        self,
        attend: Callable[..., Tensor],
        parts: Iterable[Tensor],
        mask: Tensor | None,
        text: int,
        image: int,
        *,
        image_first: bool,
    ) -> Tensor:
        """Attend with this rank's heads.

        Args:
            attend: Attends with all rows of some heads: `attend(query, key, value, mask)`.
            parts: Query, key and value, `(B, n, H, D)`, of this rank's rows.
            mask: `(B, n)` of this rank's keys, or of all.
            text, image: Rows of all ranks.
            image_first: The order of the joint sequence.

        Returns:
            `(B, n, H, D)`.
        """
        parts, rows = list(parts), (image, text) if image_first else (text, image)
        own = parts[1].shape[1]
        if mask is not None and mask.shape[-1] == own != sum(rows):
            begin = self.own(rows[0])
            halves = mask[..., :begin], mask[..., begin:]
            whole = [
                self.ranks.gather(half, total, half.ndim - 1)
                for half, total in zip(halves, rows)
                if total
            ]
            mask = torch.cat(whole, dim=-1)
        return self.ranks.to_rows(attend(*self.ranks.to_heads(parts, rows), mask), rows)


def ranks_of(transformer: nn.Module) -> Ranks | None:
    """Those that its rows are split among, or None where it has all of them."""
    context = _context(transformer)
    if context is None:
        return None
    group = context._flattened_mesh.get_group()
    return Ranks(group, dist.get_rank(group), dist.get_world_size(group))


def obstacle(
    transformer: nn.Module, family: Any, heads: Iterable[int], *, by_picture: bool
) -> str | None:
    """Why there are no partial steps as a transformer is spread over processes, or None.

    Args:
        transformer: See above.
        family: Its record.
        heads: How many heads of keys the layers have whose keys are kept.
        by_picture: Whether the plan is made by what a call is given, a mask or a picture to edit.
    """
    if by_picture and any(map(_is_sharded, transformer.modules())):
        return (
            "with FSDP all ranks skip the same steps, and masks and edits have plans of their own"
        )
    name = type(transformer).__name__
    config = getattr(transformer, "_parallel_config", None)
    if getattr(config, "tensor_parallel_config", None) is not None:
        return "tensor parallelism splits the heads of a layer among processes"
    context = _context(transformer)
    if context is None:
        return None
    if context.ring_degree > 1:
        return f"ring_degree={context.ring_degree} keeps rows apart; take ulysses_degree alone"
    if not family.parallel:
        return f"{name} has none in context parallelism"
    unlike = [count for count in heads if count % context.ulysses_degree]
    if unlike:
        return f"ulysses_degree={context.ulysses_degree} does not divide {unlike[0]} heads"
    return None


def splits_rows(name: str, transformer: nn.Module) -> bool:
    """Whether a hook of diffusers, by its name, is of the context parallelism in use."""
    return name.startswith(HOOKS) and _context(transformer) is not None


class Stilled:
    """Diffusers' hooks that split and gather, which do nothing until `back`."""

    def __init__(self, transformer: nn.Module) -> None:
        self._were = [(hook, hook.metadata) for hook in _hooks(transformer)]
        for hook, metadata in self._were:
            hook.metadata = {} if isinstance(metadata, dict) else [None] * len(metadata)

    def back(self) -> None:
        for hook, metadata in self._were:
            hook.metadata = metadata
        self._were = []


def _is_sharded(module: nn.Module) -> bool:
    """Whether it is FSDP2's, which takes seconds to import."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def _context(transformer: nn.Module) -> Any:
    config = getattr(transformer, "_parallel_config", None)
    return getattr(config, "context_parallel_config", None)


def _hooks(transformer: nn.Module) -> Iterator[Any]:
    """Diffusers' hooks of context parallelism."""
    for module in transformer.modules():
        registry = vars(module).get("_diffusers_hook")
        for name, hook in ({} if registry is None else registry.hooks).items():
            if name.startswith(HOOKS):
                yield hook
