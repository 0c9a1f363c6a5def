"""Transformers of videos: where tokens enter, attend and leave."""

from __future__ import annotations

import math
from typing import Any

from ..family import (
    BOTH_LISTS,
    VIDEOS,
    VIDEOS_BY_CHANNEL,
    Family,
    Inputs,
    patched,
    text_of,
)
from ..layout import Layout, Rows

IMAGE, JOINT, TABLE, JOINT_TABLE, GRID, TEXT, TEXT_TABLE = Rows


def _cosmos_obstacle(transformer: Any, inputs: Inputs) -> str | None:
    if inputs["timestep"].ndim > 1:
        return "each frame has a time of its own"
    # The pipelines of Cosmos 1 step twice, first with the noise of both guidance copies.
    first = transformer.config.extra_pos_embed_type is not None
    return "the scheduler is not given the guided noise alone" if first else None


def _easy_animate_layout(transformer: Any, inputs: Inputs) -> Layout:
    other = "encoder_hidden_states_t5"
    found = patched("encoder_hidden_states")(transformer, inputs)
    more = text_of(inputs, other if inputs.get(other) is not None else None)
    return Layout(found.grid, found.text + more)


def _ltx_layout(transformer: Any, inputs: Inputs) -> Layout:
    grid = tuple(inputs.get(name) or 0 for name in ("num_frames", "height", "width"))
    return Layout(grid) if math.prod(grid) == inputs["hidden_states"].shape[1] else Layout()


# --- the records ----------------------------------------------------------------------------------

RECORDS: tuple[Family, ...] = (
    Family(
        "WanTransformer3DModel",
        ("Wan", "WanImageToVideo"),
        attention={"blocks.*.attn1": IMAGE},
        enter={
            "": {"timestep": IMAGE},
            "rope": {0: IMAGE, 1: IMAGE},
            "patch_embedding": {None: GRID},
        },
        leave="proj_out",
        layout=patched(),
        output=VIDEOS,
        parallel=True,
        note="one or two transformers",
    ),
    Family(
        "WanVACETransformer3DModel",
        ("WanVACE",),
        attention={"blocks.*.attn1": IMAGE, "vace_blocks.*.attn1": IMAGE},
        enter={
            "rope": {0: IMAGE, 1: IMAGE},
            "patch_embedding": {None: GRID},
            "vace_patch_embedding": {None: GRID},
        },
        leave="proj_out",
        tested="ras.check",
        layout=patched(),
        output=VIDEOS,
    ),
    Family(
        "SkyReelsV2Transformer3DModel",
        ("SkyReelsV2",),
        attention={"blocks.*.attn1": IMAGE},
        enter={"rope": {0: IMAGE, 1: IMAGE}, "patch_embedding": {None: GRID}},
        leave="proj_out",
        layout=patched(),
        output=VIDEOS,
        obstacle=lambda _, inputs: (
            "each frame has a time of its own" if inputs.get("enable_diffusion_forcing") else None
        ),
    ),
    Family(
        "HunyuanVideoTransformer3DModel",
        ("HunyuanVideo",),
        attention=BOTH_LISTS,
        enter={"x_embedder": {None: IMAGE}, "rope": {0: TABLE, 1: TABLE}},
        leave="proj_out",
        image_first=True,
        layout=patched("encoder_hidden_states"),
        output=VIDEOS_BY_CHANNEL,
        obstacle=lambda transformer, _: (
            "the first frame's tokens are counted"
            if transformer.config.image_condition_type == "token_replace"
            else None
        ),
    ),
    Family(
        "LTXVideoTransformer3DModel",
        ("LTX", "LTXImageToVideo"),
        attention={"transformer_blocks.*.attn1": IMAGE},
        enter={
            "": {"hidden_states": IMAGE, "timestep": IMAGE},
            "rope": {0: IMAGE, 1: IMAGE},
        },
        leave="proj_out",
        layout=_ltx_layout,
    ),
    Family(
        "CogVideoXTransformer3DModel",
        ("CogVideoX", "CogVideoXImageToVideo"),
        attention={"transformer_blocks.*.attn1": JOINT},
        enter={"": {"image_rotary_emb": TABLE}, "patch_embed": {None: JOINT}},
        leave="proj_out",
        layout=patched("encoder_hidden_states", frames_at=1),
        output="b (f h w) (c t p q) -> b (f t) c (h p) (w q)",
    ),
    Family(
        "CosmosTransformer3DModel",
        ("Cosmos2TextToImage", "CosmosTextToWorld"),
        blocks=("transformer_blocks",),
        attention={"transformer_blocks.*.attn1": IMAGE},
        enter={
            "": {"block_controlnet_hidden_states": IMAGE},
            "rope": {0: TABLE, 1: TABLE},
            "transformer_blocks.0": {"hidden_states": IMAGE},
        },
        leave="proj_out",
        layout=patched(),
        output="b (f h w) (p q t c) -> b c (f t) (h p) (w q)",
        obstacle=_cosmos_obstacle,
        note="Cosmos 1, and frames with times of their own: whole steps",
    ),
    Family(
        "EasyAnimateTransformer3DModel",
        ("EasyAnimate",),
        blocks=("transformer_blocks",),
        attention={"transformer_blocks.*.attn1": JOINT},
        enter={
            "rope_embedding": {0: TABLE, 1: TABLE},
            "transformer_blocks.0": {"hidden_states": IMAGE},
        },
        leave="proj_out",
        tested="ras.check",
        layout=_easy_animate_layout,
        output=VIDEOS_BY_CHANNEL,
        usual_text=lambda pipe: 256,
    ),
)
