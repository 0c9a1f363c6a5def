"""Attention processors that project straight into the caches, by fused kernels where they may.

Joint attention of image and text tokens (Stable Diffusion 3 and 3.5), and rotary self-attention
with grouped queries (Lumina-Next-T2I).
"""

from __future__ import annotations

import math
from typing import Any

from diffusers.models.attention_processor import (
    Attention,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
    LuminaAttnProcessor2_0,
)
from einops import rearrange
from torch import Tensor

import ras_kernels

from . import projections
from .projections import (
    JointProjection,
    Projected,
    Projection,
    finished,
    joint_projection,
    keys_and_values,
)
from .seam import can_redirect, redirect
from .site import KVCache, RASAttnProcessor, Site, Walk


class _Fusing(RASAttnProcessor):
    """Has kernels take the place of layers; steps of all tokens without kernels are as found.

    To the bit, that is: attention over the same numbers in another layout, or by fewer queries at a
    time, rounds otherwise.
    """

    def __init__(self, original: Any, site: Site) -> None:
        super().__init__(original, site)
        self._found = redirect(original, site) if can_redirect(original) else None

    def plain(self, tokens: Tensor) -> Any:
        """What is to be called in the place of this one, or None."""
        walk = self.ras_site.walk()
        if walk is None or self.ras_site.cache is None:
            return self.ras_original
        dense = walk.active is None and self._found is not None and not projections.fuses(tokens)
        return self._dense if dense else None

    def _dense(self, *args: Any, **kwargs: Any) -> Any:
        assert self._found is not None and self.ras_site.cache is not None
        output = self._found(*args, **kwargs)
        self.ras_site.cache.mask = None  # for which partial steps have no use here
        return output


class SD3AttnProcessor(_Fusing):
    """Joint attention (or, in SD3.5-medium's `attn2`, that of the image alone)."""

    replaces = (JointAttnProcessor2_0, FusedJointAttnProcessor2_0)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Attend as the original processor does, over the cached keys and values.

        Args:
            attn: The layer.
            hidden_states: `(B, k, C)`, the image tokens that walk.
            encoder_hidden_states: `(B, T, C)`, the text tokens; T is 0 where they stay behind.
        """
        walk, cache = self.ras_site.walk(), self.ras_site.cache
        plain = self.plain(hidden_states)
        if walk is None or cache is None or plain is not None:
            return plain(
                attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs
            )
        self.ras_site.reached = True
        text = encoder_hidden_states
        if text is not None and not text.shape[1]:
            text = None
        query, text_query, key, value = self._project(attn, hidden_states, text, walk, cache)
        query = query.to(key.dtype)
        if text_query is None or attn.context_pre_only:
            output = ras_kernels.sparse_attention(query, key, value)
            text_output = output[:, :0]
        else:
            queries = query, text_query.to(key.dtype)
            output, text_output = ras_kernels.sparse_attention(queries, key, value)
        image_output = _out(attn, output)
        if encoder_hidden_states is None:
            return image_output
        if attn.context_pre_only:  # nobody reads the text after the last block
            return image_output, None
        return image_output, attn.to_add_out(text_output.flatten(2))

    def _project(
        self, attn: Attention, image: Tensor, text: Tensor | None, walk: Walk, cache: KVCache
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """The queries, `(B, n, H, D)` of the image and the text, and all keys and values."""
        fused = isinstance(self.ras_original, FusedJointAttnProcessor2_0)
        if not fused and not cache.compressed:
            together = _all_projections(attn, image, text)
            if together is not None:
                query, text_query, key, value = cache.project(together, walk)
                text_query = None if text_query is None else _heads(attn, text_query)
                return _heads(attn, query), text_query, key, value
        query, rows = _image_projections(attn, image, fused)
        text_query, text_rows = None, None
        if text is not None:
            text_query, text_rows = _text_projections(attn, text, fused)
        return query, text_query, *cache.update(rows, text_rows, walk)


def _all_projections(attn: Attention, image: Tensor, text: Tensor | None) -> JointProjection | None:
    """Those of a layer without norms, if they can be made at once."""
    norms = attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k
    if any(norm is not None for norm in norms):
        return None
    text_layers: list[Any] = []
    if text is not None:
        text_layers = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
    return joint_projection(image, [attn.to_q, attn.to_k, attn.to_v], text, text_layers)


def _heads(attn: Attention, projected: Tensor) -> Tensor:
    return rearrange(projected, "b n (h d) -> b n h d", h=attn.heads)


def _image_projections(
    attn: Attention, hidden_states: Tensor, fused: bool
) -> tuple[Tensor, Projected | Projection]:
    if fused:  # diffusers' fused processor leaves the norms out
        return _split(attn, attn.to_qkv(hidden_states))
    query = finished(attn.to_q(hidden_states), attn.heads, attn.norm_q)
    return query, keys_and_values(hidden_states, attn.to_k, attn.to_v, attn.heads, attn.norm_k)


def _text_projections(
    attn: Attention, hidden_states: Tensor, fused: bool
) -> tuple[Tensor, Projected | Projection]:
    if fused:
        return _split(attn, attn.to_added_qkv(hidden_states))
    heads = attn.heads
    query = finished(attn.add_q_proj(hidden_states), heads, attn.norm_added_q)
    layers = attn.add_k_proj, attn.add_v_proj
    return query, keys_and_values(hidden_states, *layers, heads, attn.norm_added_k)


def _split(attn: Attention, projected: Tensor) -> tuple[Tensor, Projected]:
    """The query, and key and value, from one projection, `(B, n, 3 * H * D)`."""
    query, key, value = (_heads(attn, part) for part in projected.chunk(3, dim=-1))
    return query, Projected(key, value)


def _out(attn: Attention, output: Tensor) -> Tensor:
    projection, dropout = attn.to_out
    return dropout(projection(output.flatten(2)))


class LuminaAttnProcessor(_Fusing):
    """Self-attention. Cross-attention needs none: its keys come from the text alone."""

    replaces = (LuminaAttnProcessor2_0,)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Any = None,
        key_rotary_emb: Any = None,
        base_sequence_length: int | None = None,
    ) -> Tensor:
        """Attend as the original processor does, over the cached keys and values.

        Args:
            attn: The layer.
            hidden_states, encoder_hidden_states: `(B, k, C)`, the image tokens that walk.
            attention_mask: `(B, N)`, all ones: the record in `families` sees to that. A mask would
                cost the kernel half as many instructions again.
            query_rotary_emb, key_rotary_emb: `(B or 1, k, D / 2)`, complex.
            base_sequence_length: Tokens that the model was trained with; the scores are scaled
                by `sqrt(log(N, base_sequence_length))` (proportional attention,
                arXiv 2406.18583). N is the full length, however few the queries.

        Returns:
            `(B, k, H, D)`, which the block projects.
        """
        walk, cache = self.ras_site.walk(), self.ras_site.cache
        plain = self.plain(hidden_states)
        if walk is None or cache is None or plain is not None:
            return plain(
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                query_rotary_emb,
                key_rotary_emb,
                base_sequence_length,
            )
        self.ras_site.reached = True
        query = finished(
            attn.to_q(hidden_states),
            attn.heads,
            attn.norm_q,
            across_heads=True,
            rotary=query_rotary_emb,
        )
        rows = keys_and_values(
            encoder_hidden_states,
            attn.to_k,
            attn.to_v,
            attn.inner_kv_dim // query.shape[3],
            attn.norm_k,
            across_heads=True,
            rotary=key_rotary_emb,
        )
        key, value = cache.update(rows, None, walk)
        scale = attn.scale
        if base_sequence_length is not None:
            scale *= math.sqrt(math.log(key.shape[1], base_sequence_length))
        return ras_kernels.sparse_attention(query.to(key.dtype), key, value, scale=scale)
