"""Stable Diffusion 3 and 3.5: joint attention of image and text tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import (
    Attention,
    FusedJointAttnProcessor2_0,
    JointAttnProcessor2_0,
)
from einops import rearrange
from torch import Tensor

import ras_kernels

from ..attention import RASAttnProcessor
from ..projections import Projection, Rows, finished, keys_and_values
from .base import Adapter


class SD3AttnProcessor(RASAttnProcessor):
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
        walk = self.walk()
        if walk is None or not walk.main or not walk.caches:
            return self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs
            )
        fused = isinstance(self.original, FusedJointAttnProcessor2_0)
        query, image = _image_projections(attn, hidden_states, fused)
        text_query, text = None, None
        if encoder_hidden_states is not None and encoder_hidden_states.shape[1]:
            text_query, text = _text_projections(attn, encoder_hidden_states, fused)
        key, value = self.cache.update(image, text, walk)
        tokens = query.shape[1]
        if text_query is not None and not attn.context_pre_only:
            query = torch.cat([query, text_query], dim=1)
        output = ras_kernels.sparse_attention(query.to(key.dtype), key, value)
        image_output = _out(attn, output[:, :tokens])
        if encoder_hidden_states is None:
            return image_output
        if attn.context_pre_only:  # nobody reads the text after the last block
            return image_output, None
        return image_output, attn.to_add_out(output[:, tokens:].flatten(2))


def _image_projections(
    attn: Attention, hidden_states: Tensor, fused: bool
) -> tuple[Tensor, Rows | Projection]:
    if fused:  # diffusers' fused processor leaves the norms out
        return _split(attn, attn.to_qkv(hidden_states))
    query = finished(attn.to_q(hidden_states), attn.heads, attn.norm_q)
    return query, keys_and_values(hidden_states, attn.to_k, attn.to_v, attn.heads, attn.norm_k)


def _text_projections(
    attn: Attention, hidden_states: Tensor, fused: bool
) -> tuple[Tensor, Rows | Projection]:
    if fused:
        return _split(attn, attn.to_added_qkv(hidden_states))
    heads = attn.heads
    query = finished(attn.add_q_proj(hidden_states), heads, attn.norm_added_q)
    layers = attn.add_k_proj, attn.add_v_proj
    return query, keys_and_values(hidden_states, *layers, heads, attn.norm_added_k)


def _split(attn: Attention, projected: Tensor) -> tuple[Tensor, Rows]:
    """The query, and key and value, from one projection, `(B, n, 3 * H * D)`."""
    query, key, value = (
        rearrange(part, "b n (h d) -> b n h d", h=attn.heads) for part in projected.chunk(3, dim=-1)
    )
    return query, Rows(key, value)


def _out(attn: Attention, output: Tensor) -> Tensor:
    projection, dropout = attn.to_out
    return dropout(projection(output.flatten(2)))


class SD3(Adapter):
    """`SD3Transformer2DModel` with all that its pipelines and ControlNet hand it."""

    model = SD3Transformer2DModel
    blocks = "transformer_blocks"
    enter = "pos_embed"
    leave = "proj_out"
    processor = SD3AttnProcessor

    def attention_layers(self, transformer: Any) -> Iterator[Any]:
        for block in transformer.transformer_blocks:
            yield block.attn
            if block.attn2 is not None:
                yield block.attn2

    def gather_entered(self, output: Tensor, rows: Tensor) -> Tensor:
        return ras_kernels.gather_tokens(output, rows)

    def gather_inputs(
        self, inputs: Mapping[str, Any], rows: Tensor, *, reuse_text: bool
    ) -> dict[str, Any]:
        gathered: dict[str, Any] = {}
        residuals = inputs.get("block_controlnet_hidden_states")
        if residuals is not None:
            gathered["block_controlnet_hidden_states"] = [
                ras_kernels.gather_tokens(residual, rows) for residual in residuals
            ]
        if reuse_text:
            gathered["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :0]
        return gathered

    def branch(self, inputs: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(inputs.get("skip_layers") or ())

    def text_tokens(self, inputs: Mapping[str, Any]) -> int:
        return inputs["encoder_hidden_states"].shape[1]

    def usual_text_tokens(self, pipe: Any) -> int:
        t5_tokens = inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default
        return pipe.tokenizer_max_length + t5_tokens
