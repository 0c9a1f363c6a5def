"""Transformers of images: where tokens enter, attend and leave."""

from __future__ import annotations

import inspect
import math
from typing import Any

from diffusers.models.embeddings import LuminaPatchEmbed

from ..family import (
    BOTH_LISTS,
    IMAGES,
    IMAGES_BY_CHANNEL,
    Family,
    Inputs,
    patched,
    text_of,
)
from ..layout import Layout, Rows
from ..others import change_of_output
from ..processors import LuminaAttnProcessor, SD3AttnProcessor

IMAGE, JOINT, TABLE, JOINT_TABLE, GRID, TEXT, TEXT_TABLE = Rows


def _z_image_layout(transformer: Any, inputs: Inputs) -> Layout:
    """Image and text are padded to multiples of 32 each."""
    _, frames, height, width = inputs["x"][0].shape
    grid = (height // 2, width // 2) if frames == 1 else (frames, height // 2, width // 2)
    text = max(map(len, inputs["cap_feats"]))
    return Layout(grid, text + -text % 32, -math.prod(grid) % 32)


def _z_image_obstacle(transformer: Any, inputs: Inputs) -> str | None:
    if isinstance(inputs["x"][0], list):
        return "several images make up a sample"
    sizes = inputs.get("patch_size", 2), inputs.get("f_patch_size", 1)
    return None if sizes == (2, 1) else f"the patch size is {sizes}"


def _lumina2_layout(transformer: Any, inputs: Inputs) -> Layout:
    """The text that is not padding; the transformer itself reads how long it is, in each call."""
    image = patched()(transformer, inputs)
    return Layout(image.grid, max(_lumina2_lengths(inputs)))


def _lumina2_lengths(inputs: Inputs) -> tuple[int, ...]:
    return tuple(inputs["encoder_attention_mask"].sum(dim=1).tolist())


def _lumina2_obstacle(transformer: Any, inputs: Inputs) -> str | None:
    unlike = len(set(_lumina2_lengths(inputs))) > 1
    return "the samples' texts are of unlike length" if unlike else None


def _aura_flow_layout(transformer: Any, inputs: Inputs) -> Layout:
    found = patched("encoder_hidden_states")(transformer, inputs)
    return Layout(found.grid, found.text + transformer.register_tokens.shape[1])


def _hunyuan_image_layout(transformer: Any, inputs: Inputs) -> Layout:
    """Both texts, with their padding; those of the refiner, latents with frames, are whole."""
    if inputs["hidden_states"].ndim > 4:
        return Layout()
    image, other = patched("encoder_hidden_states")(transformer, inputs), "encoder_hidden_states_2"
    glyphs = text_of(inputs, other if inputs.get(other) is not None else None)
    return Layout(image.grid, image.text + glyphs)


def _glm_obstacle(transformer: Any, inputs: Inputs) -> str | None:
    caches = inputs.get("kv_caches")
    edits = caches is not None and caches[0].mode is not None
    return "the model keeps keys and values itself" if edits else None


def _hidream_layout(transformer: Any, inputs: Inputs) -> Layout:
    """Pictures that are not square are padded; each layer has a text of its own, of one length."""
    if inputs["hidden_states"].ndim != 4:  # cut into patches and padded by somebody else
        return Layout()
    grid = patched()(transformer, inputs).grid
    padding = 0 if grid[0] == grid[1] else transformer.max_seq - math.prod(grid)
    llama = inputs["encoder_hidden_states_llama3"].shape[2]
    return Layout(grid, text_of(inputs, "encoder_hidden_states_t5") + 2 * llama, padding)


def _sd3_text(pipe: Any) -> int:
    t5_tokens = inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default
    return pipe.tokenizer_max_length + t5_tokens


def _lumina_obstacle(transformer: Any, inputs: Inputs) -> str | None:
    """Diffusers' embedder makes the mask of all ones, which is not to be read on a GPU."""
    embedder = transformer.patch_embedder
    known = type(embedder).forward is LuminaPatchEmbed.forward
    if known and change_of_output(embedder, transformer) is None:
        return None
    return "its patch embedder is not diffusers', and may mask tokens"


def _lumina_rotary(inputs: Inputs) -> Any:
    """The table's last entry, which tells the two tables of a run apart (`scaling_watershed`).

    The pipeline makes them on the CPU, so that nothing waits for the GPU here.
    """
    return tuple(inputs["image_rotary_emb"][-1, -1].tolist())


# --- the records ----------------------------------------------------------------------------------

RECORDS: tuple[Family, ...] = (
    Family(
        "SD3Transformer2DModel",
        ("StableDiffusion3", "StableDiffusion3ControlNet", "StableDiffusion3Inpaint"),
        blocks=("transformer_blocks",),
        attention={"transformer_blocks.*.attn": JOINT, "transformer_blocks.*.attn2": IMAGE},
        enter={
            "": {"block_controlnet_hidden_states": IMAGE, "encoder_hidden_states": TEXT},
            "pos_embed": {None: IMAGE},
        },
        leave="proj_out",
        image_first=True,
        layout=patched("encoder_hidden_states"),
        output=IMAGES,
        text={"encoder_hidden_states": 1},
        processor=SD3AttnProcessor,
        parallel=True,
        whole="skip_layers",
        usual_text=_sd3_text,
    ),
    Family(
        "LuminaNextDiT2DModel",
        ("Lumina",),
        blocks=("layers",),
        attention={"layers.*.attn1": IMAGE},
        enter={"patch_embedder": {0: IMAGE, 3: IMAGE}},
        leave="norm_out.linear_2",
        layout=patched(),
        output=IMAGES,
        processor=LuminaAttnProcessor,
        rotary=_lumina_rotary,
        obstacle=_lumina_obstacle,
    ),
    Family(
        "ZImageTransformer2DModel",
        ("ZImage", "ZImageControlNet", "ZImageImg2Img", "ZImageInpaint"),
        blocks=("noise_refiner", "layers"),
        attention={"noise_refiner.*.attention": IMAGE, "layers.*.attention": JOINT},
        enter={
            "": {"controlnet_block_samples": JOINT},
            "noise_refiner.0": {"x": IMAGE},
            "noise_refiner.*": {"freqs_cis": IMAGE},
            "layers.*": {"freqs_cis": JOINT},
        },
        leave="all_final_layer.2-1.linear",
        leaves=JOINT,
        image_first=True,
        latents="x",
        lists=True,
        layout=_z_image_layout,
        output="b (f h w) (p q c) -> b c f (h p) (w q)",
        patch=lambda transformer: (1, 2, 2),
        obstacle=_z_image_obstacle,
    ),
    Family(
        "CogView4Transformer2DModel",
        ("CogView4",),
        attention={"transformer_blocks.*.attn1": JOINT},
        enter={"patch_embed": {0: IMAGE}, "rope": {0: TABLE, 1: TABLE}},
        leave="proj_out",
        layout=patched("encoder_hidden_states"),
        output=IMAGES_BY_CHANNEL,
    ),
    Family(
        "PixArtTransformer2DModel",
        ("PixArtAlpha", "PixArtSigma"),
        attention={"transformer_blocks.*.attn1": IMAGE},
        enter={"pos_embed": {None: IMAGE}},
        leave="proj_out",
        layout=patched(),
        output=IMAGES,
    ),
    Family(
        "AuraFlowTransformer2DModel",
        ("AuraFlow",),
        attention={
            "joint_transformer_blocks.*.attn": JOINT,
            "single_transformer_blocks.*.attn": JOINT,
        },
        enter={"pos_embed": {None: IMAGE}},
        leave="proj_out",
        layout=_aura_flow_layout,
        output=IMAGES,
    ),
    Family(
        "Lumina2Transformer2DModel",
        ("Lumina2",),
        attention={"layers.*.attn": JOINT},  # the two refiners' stay dense
        enter={"layers.0": {"hidden_states": JOINT}, "layers.*": {"image_rotary_emb": JOINT}},
        leave="norm_out.linear_2",
        leaves=JOINT,
        layout=_lumina2_layout,
        output=IMAGES,
        lengths=_lumina2_lengths,
        obstacle=_lumina2_obstacle,
    ),
    Family(
        "HunyuanImageTransformer2DModel",
        ("HunyuanImage",),
        attention=BOTH_LISTS,
        enter={"x_embedder": {None: IMAGE}, "rope": {0: TABLE, 1: TABLE}},
        leave="proj_out",
        image_first=True,
        layout=_hunyuan_image_layout,
        output=IMAGES_BY_CHANNEL,
        usual_text=lambda pipe: pipe.tokenizer_max_length + pipe.tokenizer_2_max_length,
    ),
    Family(
        "CogView3PlusTransformer2DModel",
        ("CogView3Plus",),
        blocks=("transformer_blocks",),
        attention={"transformer_blocks.*.attn1": JOINT},
        enter={"patch_embed": {None: JOINT}},
        leave="proj_out",
        layout=patched("encoder_hidden_states"),
        output=IMAGES_BY_CHANNEL,
    ),
    Family(
        "GlmImageTransformer2DModel",
        ("GlmImage",),
        attention={"transformer_blocks.*.attn1": JOINT},
        enter={
            "image_projector": {None: IMAGE},
            "prior_projector": {None: IMAGE},
            "rope": {0: TABLE, 1: TABLE},
        },
        leave="proj_out",
        layout=patched("encoder_hidden_states"),
        output=IMAGES_BY_CHANNEL,
        obstacle=_glm_obstacle,
        note="edits: whole steps; calls before the loop are computed",
    ),
    Family(
        "HiDreamImageTransformer2DModel",
        ("HiDreamImage",),
        blocks=("double_stream_blocks", "single_stream_blocks"),
        attention={
            "double_stream_blocks.*.block.attn1": JOINT,
            "single_stream_blocks.*.block.attn1": JOINT,
        },
        enter={
            "x_embedder": {None: IMAGE},
            "pe_embedder": {None: JOINT},
            "double_stream_blocks.*": {"hidden_states_masks": IMAGE},
            "single_stream_blocks.*": {"hidden_states_masks": JOINT},
        },
        leave="final_layer.linear",
        image_first=True,
        layout=_hidream_layout,
        output=IMAGES,
        usual_text=lambda pipe: 3 * 128,  # T5's, and Llama's twice
    ),
    Family(
        "DiTTransformer2DModel",
        ("DiT",),
        blocks=("transformer_blocks",),
        attention={"transformer_blocks.*.attn1": IMAGE},
        enter={"pos_embed": {None: IMAGE}},
        leave="proj_out_2",
        tested="ras.check",
        layout=patched(),
        output=IMAGES,
    ),
)
