"""Lumina-Next-T2I: rotary self-attention with grouped queries, and cross-attention to the text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import LuminaNextDiT2DModel
from diffusers.models.attention_processor import Attention, LuminaAttnProcessor2_0
from torch import Tensor

import ras_kernels

from ..attention import RASAttnProcessor
from ..projections import finished, keys_and_values
from .base import Adapter


class LuminaAttnProcessor(RASAttnProcessor):
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
            attention_mask: `(B, N)`, not 0 for the tokens to attend to.
            query_rotary_emb, key_rotary_emb: `(B or 1, k, D / 2)`, complex.
            base_sequence_length: Tokens that the model was trained with; the scores are scaled
                by `sqrt(log(N, base_sequence_length))` (proportional attention,
                arXiv 2406.18583). N is the full length, however few the queries.

        Returns:
            `(B, k, H, D)`, which the block projects.
        """
        walk = self.walk()
        if walk is None or not walk.main or not walk.caches:
            return self.original(
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                query_rotary_emb,
                key_rotary_emb,
                base_sequence_length,
            )
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
        key, value = self.cache.update(rows, None, walk)
        scale = attn.scale
        if base_sequence_length is not None:
            scale *= math.sqrt(math.log(key.shape[1], base_sequence_length))
        mask = None if attention_mask is None else attention_mask.bool()
        return ras_kernels.sparse_attention(
            query.to(key.dtype), key, value, key_mask=mask, scale=scale
        )


class LuminaNext(Adapter):
    """`LuminaNextDiT2DModel`."""

    model = LuminaNextDiT2DModel
    blocks = "layers"
    enter = "patch_embedder"
    leave = "norm_out"
    processor = LuminaAttnProcessor

    def attention_layers(self, transformer: Any) -> Iterator[Any]:
        for layer in transformer.layers:
            yield layer.attn1

    def gather_entered(self, output: tuple, rows: Tensor) -> tuple:
        tokens, mask, sizes, rotary = output
        rotary = rotary.expand(len(rows), -1, -1)
        return (
            ras_kernels.gather_tokens(tokens, rows),
            mask,  # of the keys, which are all there
            sizes,
            ras_kernels.gather_tokens(rotary, rows),
        )

    def positions(self, inputs: Mapping[str, Any]) -> Tensor:
        # The table's last entry tells the two tables of a run apart (`scaling_watershed`); the
        # pipeline makes them on the CPU, so that nothing waits for the GPU here. Of a copy: a view
        # would keep the table alive, which is a new one in each step.
        return inputs["image_rotary_emb"][-1, -1].cpu().clone()
