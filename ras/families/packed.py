"""Transformers of images whose pipelines pack latents into tokens: FLUX and its kin."""

from __future__ import annotations

import math
from typing import Any

from ..family import (
    BOTH_LISTS,
    Family,
    Inputs,
    by_ids,
    text_of,
)
from ..layout import Layout, Rows

IMAGE, JOINT, TABLE, JOINT_TABLE, GRID, TEXT, TEXT_TABLE = Rows


def _qwen_layout(transformer: Any, inputs: Inputs) -> Layout:
    shapes = inputs["img_shapes"][0]
    (frames, height, width), *others = shapes if isinstance(shapes[0], list | tuple) else [shapes]
    grid = (height, width) if frames == 1 else (frames, height, width)
    references = inputs["hidden_states"].shape[1] - math.prod(grid)
    # Each picture is an image; layers of one, as other pipelines have them, are of no account here.
    whole = sum(map(math.prod, others)) == references and all(other[0] == 1 for other in others)
    pictures = tuple((h, w) for _, h, w in others) if whole else ()
    return Layout(grid, text_of(inputs, "encoder_hidden_states"), references, pictures)


# --- the records ----------------------------------------------------------------------------------

FLUX_RESIDUALS: dict[str | int | None, Rows] = {
    "controlnet_block_samples": IMAGE,
    "controlnet_single_block_samples": IMAGE,
}

RECORDS: tuple[Family, ...] = (
    Family(
        "FluxTransformer2DModel",
        (
            "Flux",
            "FluxControl",
            "FluxControlInpaint",
            "FluxControlNet",
            "FluxFill",
            "FluxImg2Img",
            "FluxInpaint",
            "FluxKontext",
            "FluxKontextInpaint",
            "FluxModular",
        ),
        attention=BOTH_LISTS,
        enter={
            "": {"hidden_states": IMAGE, "encoder_hidden_states": TEXT, **FLUX_RESIDUALS},
            "pos_embed": {0: JOINT_TABLE, 1: JOINT_TABLE},
        },
        leave="proj_out",
        layout=by_ids("img_ids", "encoder_hidden_states"),
        packed=2,
        text={"encoder_hidden_states": 1, "txt_ids": 0},
        references=True,
        parallel=True,
    ),
    Family(
        "Flux2Transformer2DModel",
        ("Flux2", "Flux2Klein", "Flux2KleinKV"),
        attention=BOTH_LISTS,
        enter={
            "": {"hidden_states": IMAGE},
            "transformer_blocks.*": {"image_rotary_emb": JOINT_TABLE},
            "single_transformer_blocks.*": {"image_rotary_emb": JOINT_TABLE},
        },
        leave="proj_out",
        layout=by_ids("img_ids", "encoder_hidden_states"),
        packed=2,
        obstacle=lambda _, inputs: (
            "the model keeps keys and values itself" if inputs.get("kv_cache_mode") else None
        ),
        references=True,
        note="KleinKV: whole steps; the one that fills the model's own cache is computed",
    ),
    Family(
        "ChromaTransformer2DModel",
        ("Chroma", "ChromaInpaint"),
        attention=BOTH_LISTS,
        enter={
            "": {"hidden_states": IMAGE, **FLUX_RESIDUALS},
            "pos_embed": {0: JOINT_TABLE, 1: JOINT_TABLE},
        },
        leave="proj_out",
        layout=by_ids("img_ids", "encoder_hidden_states"),
        packed=2,
    ),
    Family(
        "QwenImageTransformer2DModel",
        (
            "QwenImage",
            "QwenImageControlNet",
            "QwenImageEdit",
            "QwenImageEditInpaint",
            "QwenImageEditPlus",
            "QwenImageInpaint",
        ),
        attention={"transformer_blocks.*.attn": JOINT},
        enter={
            "": {"hidden_states": IMAGE, "controlnet_block_samples": IMAGE},
            "pos_embed": {0: TABLE, 1: TEXT_TABLE},
            "transformer_blocks.0": {"encoder_hidden_states": TEXT},
            "transformer_blocks.*": {"modulate_index": IMAGE, "encoder_hidden_states_mask": TEXT},
        },
        leave="proj_out",
        layout=_qwen_layout,
        packed=2,
        text={"encoder_hidden_states": 1, "encoder_hidden_states_mask": 1},
        references=True,
        parallel=True,
    ),
    Family(
        "Krea2Transformer2DModel",
        ("Krea2",),
        attention={"transformer_blocks.*.attn": JOINT},
        enter={"": {"hidden_states": IMAGE}, "rotary_emb": {0: JOINT_TABLE, 1: JOINT_TABLE}},
        leave="final_layer.linear",
        layout=by_ids("position_ids", "encoder_hidden_states"),
        packed=2,
    ),
    Family(
        "OvisImageTransformer2DModel",
        ("OvisImage",),
        attention=BOTH_LISTS,
        enter={"": {"hidden_states": IMAGE}, "pos_embed": {0: JOINT_TABLE, 1: JOINT_TABLE}},
        leave="proj_out",
        layout=by_ids("img_ids", "encoder_hidden_states"),
        packed=2,
        text={"encoder_hidden_states": 1, "txt_ids": 0},
    ),
    Family(
        "LongCatImageTransformer2DModel",
        ("LongCatImage",),
        attention=BOTH_LISTS,
        enter={"": {"hidden_states": IMAGE}, "pos_embed": {0: JOINT_TABLE, 1: JOINT_TABLE}},
        leave="proj_out",
        layout=by_ids("img_ids", "encoder_hidden_states"),
        packed=2,
        text={"encoder_hidden_states": 1, "txt_ids": 0},
        usual_text=lambda pipe: pipe.tokenizer_max_length,
        references=True,
    ),
    Family(
        "BriaTransformer2DModel",
        ("Bria",),
        blocks=("transformer_blocks", "single_transformer_blocks"),
        attention=BOTH_LISTS,
        enter={
            "": {"hidden_states": IMAGE, **FLUX_RESIDUALS},
            "pos_embed": {0: JOINT_TABLE, 1: JOINT_TABLE},
        },
        leave="proj_out",
        layout=by_ids("img_ids", "encoder_hidden_states"),
        packed=1,  # which the scale of its autoencoder counts already
        text={"encoder_hidden_states": 1, "txt_ids": 0},
    ),
    Family(
        "BriaFiboTransformer2DModel",
        ("BriaFibo",),
        attention=BOTH_LISTS,
        enter={"": {"hidden_states": IMAGE}, "pos_embed": {0: JOINT_TABLE, 1: JOINT_TABLE}},
        leave="proj_out",
        layout=by_ids("img_ids", "encoder_hidden_states"),
    ),
    Family(
        "Flux3Transformer2DModel",
        ("Flux3Modular",),
        attention={
            "mode_blocks.image.*.attn": IMAGE,
            "single_transformer_blocks.*.attn": JOINT,
        },
        enter={
            "": {"hidden_states": IMAGE},
            "mode_blocks.image.*": {"image_rotary_emb": TABLE},
            "single_transformer_blocks.*": {"image_rotary_emb": JOINT_TABLE},
        },
        leave="proj_out",
        layout=by_ids("img_ids", "encoder_hidden_states"),
        patch=lambda transformer: (1, 1, 1),
        packed=2,
        obstacle=lambda _, inputs: (
            "pictures walk beside the noise"
            if inputs.get("image_cond_hidden_states") is not None
            else None
        ),
        note="edits: whole steps",
    ),
)
