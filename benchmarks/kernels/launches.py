"""How many kernels a block of a transformer launches, dense and in a partial step; needs no GPU.

    python -m benchmarks.kernels.launches
    python -m benchmarks.kernels.launches --family lumina

Runs a small pipeline of the family on the CPU, eager, and counts what a GPU would be given: each of
PyTorch's ops that computes counts as one launch, views and allocations as none, and ops of
`ras_kernels` as many as their plans make for an H100, copies of operands included. Sizes do not
matter to it. By the module of the block that launches them; `the block` is what its own forward
does: modulation, gates, residuals.

Settings: dense, `RASConfig.paper()`, and the defaults with a `sample_ratio`, which carry keys and
values on.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ras
import ras_kernels
from ras_kernels import _library, reference

from ..commands import as_command
from ..speed import untrained
from ..speed.families import FAMILIES
from ..tables import grid
from . import variants
from .chips import CHIPS

SETTINGS = {
    "dense": None,
    "paper": ras.RASConfig.paper(),
    "default": ras.RASConfig(sample_ratio=0.5),
}
SIZES = dict(layers=2, heads=4, head_dim=16, image_tokens=64, text_tokens=8, steps=6, batch=1)
OWN = "the block"
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FREE = EMPTY | {"_unsafe_view", "_reshape_alias", "detach", "lift_fresh", "resize_"}
"""Ops that launch nothing, beside those that PyTorch calls views."""

Counts = dict[str, Counter[str]]  # launches by part of the block, of each block


class Launches(TorchDispatchMode):
    """Counts launches, as of a GPU, of what runs on the CPU.

    Attributes:
        counts: By block and part, of the last call of each block.
    """

    def __init__(self, blocks: dict[str, nn.Module]) -> None:
        super().__init__()
        self.counts: Counts = {name: Counter() for name in blocks}
        self._parts = {block: (name, OWN) for name, block in blocks.items()}
        for name, block in blocks.items():
            self._parts |= {module: (name, part) for part, module in block.named_children()}
        self._part: tuple[str, str] | None = None  # under way
        self._noted: list[Any] = []

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count for a `with` block, in which kernels take the place of layers as on a GPU."""
        call_module = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            outer, self._part = self._part, self._parts.get(module, self._part)
            if self._part is not None and module in self._parts and self._part[1] == OWN:
                self.counts[self._part[0]].clear()
            try:
                return call_module(module, *args, **kwargs)
            finally:
                self._part = outer

        with ExitStack() as stack:
            self._noted = stack.enter_context(variants.recording(CHIPS["H100"].architecture))
            for module in (ras_kernels, _library):
                stack.enter_context(patch.object(module, "supports", lambda device, dtype: True))
            # No hooks, by which RAS would take the layers for changed ones.
            stack.enter_context(patch.object(nn.Module, "__call__", call))
            stack.enter_context(self)
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "ras_kernels":
            self._count_ours(func._opname, args)
            return func(*args)
        with self:  # what is made of other ops, such as `contiguous`, counts by these
            output = func.decompose(*args, **(kwargs or {}))
        if output is not NotImplemented:
            return output
        output = func(*args, **(kwargs or {}))
        if not func.is_view and func._opname not in FREE and has_elements(output):
            self._count(1)
        return output

    def _count_ours(self, name: str, args: tuple[Any, ...]) -> None:
        before = len(self._noted)
        with self:  # copies of operands are made beside the plan's launches
            _library.PLANS[name](*args)
        launched = len(self._noted) - before
        self._count(launched)
        if not launched:  # what no kernel takes, the definition does
            copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
            with self:
                getattr(reference, name)(*copies)

    def _count(self, launched: int) -> None:
        if self._part is not None:
            block, part = self._part
            self.counts[block][part] += launched


def has_elements(output: Any) -> bool:
    """Whether an op has anything to compute; one that returns nothing has."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return not tensors or any(tensor.numel() for tensor in tensors)


def blocks_of(transformer: nn.Module) -> dict[str, nn.Module]:
    """The first block of each of a transformer's lists."""
    lists = {name: m for name, m in transformer.named_children() if isinstance(m, nn.ModuleList)}
    found = {name: blocks[0] for name, blocks in lists.items() if len(blocks)}
    return {name: block for name, block in found.items() if list(block.children())}


def count(family: str, config: ras.RASConfig | None) -> Counts:
    """Launches of the blocks of a small pipeline in the last call of a run.

    Args:
        family: One of `FAMILIES`.
        config: With which it is enabled; the last step is then partial. None for dense.
    """
    own = dict(family=family, dtype="float16", device="cpu", compile=None, guidance=True)
    options = argparse.Namespace(**SIZES | own)
    pipe = untrained.build(options)
    launches = Launches(blocks_of(pipe.transformer))
    if config is not None:
        ras.enable(pipe, config)
    with torch.no_grad(), launches.counting():
        pipe(**untrained.inputs(options))
    if config is not None and not ras.stats(pipe).steps_sparse:
        raise RuntimeError(f"{family} had no partial step")
    return launches.counts


def table(family: str) -> str:
    """Launches by block and part, and their sums."""
    found = {setting: count(family, config) for setting, config in SETTINGS.items()}
    rows = []
    for name in found["dense"]:
        columns = [counts[name] for counts in found.values()]
        for part in dict.fromkeys(part for column in columns for part in column):
            rows.append([name, part, *(str(column[part]) for column in columns)])
        rows.append([name, "**sum**", *(f"**{column.total()}**" for column in columns)])
    return grid(" | ".join(["blocks", "part", *found]), rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.kernels.launches", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--family", choices=FAMILIES, default="sd3")
    print(table(parser.parse_args(argv).family))


if __name__ == "__main__":
    as_command(main)
