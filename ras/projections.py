"""From tokens to queries, and to keys and values in a cache: by fused kernels where they may be.

On a GPU, kernels take the place of layers that are exactly what their class says: no hook, no
replaced forward, a plain weight of the tokens' dtype on their device. LoRA, quantised, offloaded
and layerwise-cast layers are called as they are, and what they return is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from einops import rearrange
from torch import Tensor, nn

import ras_kernels

from .kept import Kept

KeyValue = tuple[Tensor, Tensor]
NORMS = {
    (RMSNorm, False): "rms_norm",
    (nn.LayerNorm, True): "layer_norm_across_heads",
}
"""What `ras_kernels` calls a norm's class, by whether it is over all heads of a token at once."""


@dataclass(frozen=True)
class Projected:
    """Keys and values, `(B, n, G, D)` each, of some tokens.

    Attributes:
        key, value: See above.
        finish: What is left to be done to the keys, as `ras_kernels.norm_rotary` takes it.
    """

    key: Tensor
    value: Tensor
    finish: dict[str, Any] = field(default_factory=dict)

    def put(self, key: Kept, value: Kept, index: Tensor | None) -> None:
        """Write them to rows `(B, n)` of the caches, or to all (None), in order."""
        if self.finish and key.scales is None:
            ras_kernels.norm_rotary_scatter_(
                key.rows, index, self.key, **self.finish, changes=key.changes
            )
        else:
            key.write(index, self.plain().key)
        value.write(index, self.value)

    def plain(self) -> Projected:
        """The same with nothing left to be done."""
        if not self.finish:
            return self
        return Projected(ras_kernels.norm_rotary(self.key, **self.finish), self.value)


@dataclass(frozen=True)
class Projection:
    """Keys and values that are projected straight into the caches.

    Attributes:
        tokens: `(B, n, C)`.
        to_key, to_value: Plain layers.
        heads: G.
    """

    tokens: Tensor
    to_key: nn.Linear
    to_value: nn.Linear
    heads: int

    def put(self, key: Kept, value: Kept, index: Tensor | None) -> None:
        """Write them to rows of the caches, see `Projected.put`."""
        ras_kernels.linear_scatter_(
            key.rows,
            value.rows,
            index,
            self.tokens,
            key_weight=self.to_key.weight,
            value_weight=self.to_value.weight,
            key_bias=self.to_key.bias,
            value_bias=self.to_value.bias,
            key_changes=key.changes,
            value_changes=value.changes,
        )

    def plain(self) -> Projected:
        """They themselves, before they are in any cache."""
        key, value = (layer(self.tokens) for layer in (self.to_key, self.to_value))
        return Projected(_heads(key, self.heads), _heads(value, self.heads))


@dataclass(frozen=True)
class JointProjection:
    """All projections of a layer's image tokens, and of its text's, if there are any.

    Attributes:
        tokens, text: `(B, n, C)` and `(B, T, C)`, or None.
        layers, text_layers: Those of query, key and value: plain, all with biases or all without.
    """

    tokens: Tensor
    layers: Sequence[nn.Linear]
    text: Tensor | None
    text_layers: Sequence[nn.Linear]

    def put(self, key: Kept, value: Kept, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Write keys and values as `Projected.put` does, the text's to the last rows.

        Returns:
            The queries of the image and of the text, `(B, n, H * D)`.
        """
        text: dict[str, Any] = {}
        if self.text is not None:
            text["text"] = self.text
            text["text_weights"] = [layer.weight for layer in self.text_layers]
            text["text_biases"] = [layer.bias for layer in self.text_layers]
        return ras_kernels.qkv_scatter_(
            key.rows,
            value.rows,
            index,
            self.tokens,
            weights=[layer.weight for layer in self.layers],
            biases=[layer.bias for layer in self.layers],
            key_changes=key.changes,
            value_changes=value.changes,
            **text,
        )


def joint_projection(
    tokens: Tensor, layers: Sequence[Any], text: Tensor | None, text_layers: Sequence[Any]
) -> JointProjection | None:
    """All projections at once, or None where a kernel may not take the place of all the layers."""
    every = [*layers, *(text_layers if text is not None else ())]
    if not all(_is_plain_linear(layer, tokens) for layer in every):
        return None
    if len({layer.bias is None for layer in every}) > 1:
        return None
    return JointProjection(tokens, layers, text, text_layers)


def finished(
    projected: Tensor,
    heads: int,
    norm: Any,
    *,
    across_heads: bool = False,
    rotary: Tensor | None = None,
) -> Tensor:
    """Queries or keys after their projection: split into heads, normalised and turned.

    Args:
        projected: `(B, n, heads * D)`.
        heads: See above.
        norm: The module, or None.
        across_heads: Whether the norm is over all heads of a token at once.
        rotary: `(B or 1, n, D / 2)`, complex, or None.

    Returns:
        `(B, n, heads, D)`.
    """
    finish = _finish(projected, norm, across_heads, rotary)
    if finish:
        return ras_kernels.norm_rotary(_heads(projected, heads), **finish)
    return _by_modules(projected, heads, norm, across_heads, rotary)


def keys_and_values(
    tokens: Tensor,
    to_key: Any,
    to_value: Any,
    heads: int,
    norm: Any,
    *,
    across_heads: bool = False,
    rotary: Tensor | None = None,
) -> Projected | Projection:
    """Keys and values of tokens, `(B, n, C)`, or what is needed to make them.

    See `finished` for the other arguments.
    """
    layers = to_key, to_value
    if norm is None and rotary is None and all(_is_plain_linear(each, tokens) for each in layers):
        return Projection(tokens, to_key, to_value, heads)
    key, value = to_key(tokens), _heads(to_value(tokens), heads)
    finish = _finish(key, norm, across_heads, rotary)
    if finish:
        return Projected(_heads(key, heads), value, finish)
    return Projected(_by_modules(key, heads, norm, across_heads, rotary), value)


def _by_modules(
    projected: Tensor, heads: int, norm: Any, across_heads: bool, rotary: Tensor | None
) -> Tensor:
    """`finished`, as diffusers does it."""
    if norm is not None and across_heads:
        projected = norm(projected)
    split = _heads(projected, heads)
    if norm is not None and not across_heads:
        split = norm(split)
    if rotary is None:
        return split
    turned: Any = apply_rotary_emb(split, rotary, use_real=False)
    return turned.to(projected.dtype)


def _finish(
    projected: Tensor, norm: Any, across_heads: bool, rotary: Tensor | None
) -> dict[str, Any] | None:
    """The norm and the rotation as `ras_kernels` takes them; None where it should not do them."""
    if not fuses(projected) or (norm is None and rotary is None):
        return None
    if norm is None:
        return {"rotary": rotary}
    name = NORMS.get((type(norm), across_heads))
    if name is None or not _is_plain(norm, projected):
        return None
    bias = getattr(norm, "bias", None)
    return {"norm": name, "weight": norm.weight, "bias": bias, "eps": norm.eps, "rotary": rotary}


def fuses(tokens: Tensor) -> bool:
    """Whether kernels may take the place of layers of such tokens."""
    on_kernels = ras_kernels.supports(tokens.device, tokens.dtype)
    return on_kernels and not torch.is_autocast_enabled(tokens.device.type)


def _is_plain_linear(layer: Any, tokens: Tensor) -> bool:
    return type(layer) is nn.Linear and fuses(tokens) and _is_plain(layer, tokens)


def _is_plain(module: nn.Module, tokens: Tensor) -> bool:
    """Whether a module does what its class says, in the tokens' dtype on their device."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return not hooked and all(
        type(weight) is nn.Parameter
        and (weight.dtype, weight.device) == (tokens.dtype, tokens.device)
        for weight in module.parameters(recurse=False)
    )


def _heads(projected: Tensor, heads: int) -> Tensor:
    return rearrange(projected, "b n (h d) -> b n h d", h=heads)
