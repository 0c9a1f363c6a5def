"""The branches of a session, and the memory that they take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ras_kernels

from .branch import Branch
from .config import RASConfig
from .family import Family
from .layout import Layout, Rows
from .mount import Mount
from .parallel import ranks_of
from .plan import Reuse
from .site import KVCache
from .slots import heads_of_keys


class Branches(dict[Any, Branch]):
    """The branches of a session by name, and what their keys and values may take up."""

    def __init__(self, config: RASConfig) -> None:
        super().__init__()
        self._config = config
        self._carries = config.kv_correction

    def use(self, config: RASConfig) -> None:
        """Keep what a run is going to reuse by these settings, and nothing by others.

        There count `cache_dtype`, `max_cache_bytes`, `keep_caches` and `kv_correction`.
        """
        if self and _of_caches(config) != _of_caches(self._config):
            self.clear()
        self._config = config
        self._carries = config.kv_correction  # as far as is known, there is room for changes

    def __missing__(self, name: Any) -> Branch:
        self[name] = Branch()
        return self[name]

    @property
    def caches(self) -> list[KVCache]:
        """The keys and values of all."""
        return [cache for branch in list(self.values()) for cache in branch.caches]

    @property
    def held(self) -> list[Tensor]:
        """All that is kept of those begun; masks, which layers may share, once."""
        found = [branch.held for branch in list(self.values()) if branch.begun]
        return [tensor for each in found for tensor in each] + self._masks

    @property
    def _masks(self) -> list[Tensor]:
        masks = [cache.mask for cache in self.caches if cache.mask is not None]
        return list({mask.data_ptr(): mask for mask in masks}.values())

    def make_room(
        self,
        branch: Branch,
        mount: Mount,
        latents: Tensor | list[Tensor],
        dtype: torch.dtype,
        layout: Layout,
        *,
        reuse: Reuse,
        caches: bool,
    ) -> bool:
        """Make room for a branch; False if its keys and values are more than there may be."""
        carries = reuse is not Reuse.HELD and self._carries
        if caches and not branch.caches and self._config.max_cache_bytes is not None:
            for name in [name for name, each in self.items() if each.step < 0]:
                del self[name]  # kept from another run
            kind = self._config.cache_dtype or dtype
            sizes = cache_bytes(mount.transformer, mount.family, layout, kind)
            kept, changes = (len(latents) * size for size in sizes)
            if carries and kept + changes > self._bytes_left():
                carries = self._carries = False
                for cache in self.caches:
                    cache.forget_changes()
            if kept > self._bytes_left():
                return False
        mount.make_room(
            branch,
            len(latents),
            layout,
            dtype,
            latents[0].device,
            reuse=reuse,
            caches=caches,
            carries=carries,
            cache_dtype=self._config.cache_dtype,
        )
        if self._config.keep_caches and caches:  # tell compilers: CUDA graphs may write to it
            for tensor in branch.held:
                torch._dynamo.mark_static_address(tensor, guard=False)
        return True

    def fit(self) -> bool:
        """Whether there is room for the masks, too, which nobody knows before the first step."""
        return self._config.max_cache_bytes is None or self._bytes_left() >= 0

    def _bytes_left(self) -> int:
        assert self._config.max_cache_bytes is not None
        kept = [tensor for cache in self.caches for tensor in cache.tensors] + self._masks
        return self._config.max_cache_bytes - sum(tensor.nbytes for tensor in kept)

    def forget(self) -> None:
        """Reuse nothing of what was, and free it unless it is to be kept."""
        if not self._config.keep_caches:
            self.clear()
        for branch in list(self.values()):
            branch.forget()

    def after_step(self, step: int) -> None:
        """Free those not called in a step: guidance has ended, or another transformer goes on."""
        if not self._config.keep_caches or step == 0:
            for name in [name for name, branch in list(self.items()) if branch.step != step]:
                del self[name]
        for branch in list(self.values()):
            branch.rows = None
            if branch.step != step:
                branch.forget()


def _of_caches(config: RASConfig) -> tuple[Any, ...]:
    return config.cache_dtype, config.max_cache_bytes, config.keep_caches, config.kv_correction


def cache_bytes(
    transformer: Any, family: Family, layout: Layout, dtype: torch.dtype
) -> tuple[int, int]:
    """What a sample's keys and values of a dtype take up in one branch, and their changes.

    Of codes of 8 bits, the scales are among it.
    """
    kept = changes = 0
    scale = torch.float32.itemsize if dtype in ras_kernels.CODES else 0
    for attn, rows in family.attention_layers(transformer):
        tokens = layout.sequence if rows is Rows.JOINT else layout.image
        heads, width = heads_of_keys(attn)
        size = 2 * heads * (width * dtype.itemsize + scale)
        kept, changes = kept + tokens * size, changes + layout.image * size
    ranks = ranks_of(transformer)
    return (kept, changes) if ranks is None else (kept // ranks.size, changes // ranks.size)
