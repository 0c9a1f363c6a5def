"""What is known of model families, as data, in one table.

Every transformer can be run by plans of dense and skipped steps. Partial steps need to know where
tokens come in, attend and go out: a record of these below.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

from .family import (
    IMAGES,
    IMAGES_BY_CHANNEL,
    VIDEOS,
    VIDEOS_BY_CHANNEL,
    Family,
    Inputs,
    by_ids,
    patched,
    text_of,
)
from .layout import Layout, Rows
from .processors import LuminaAttnProcessor, SD3AttnProcessor

IMAGE, JOINT, TABLE, JOINT_TABLE, GRID = Rows
OF_REGIONS = "every token's noise"  # held against the oracle's


def family_of(transformer: object, *records: Family) -> Family:
    """The record of a transformer, of `records` first; of whole steps alone if there is none."""
    names = [base.__name__ for base in type(transformer).__mro__]
    known = (*records, *FAMILIES)
    found = (family for name in names for family in known if family.model == name)
    return next(found, Family(type(transformer).__name__))


def support() -> list[dict[str, str]]:
    """The support table, a row for each record.

    Dense steps are exact wherever there are any, and so is a run at a speed-up of 1.
    """
    return [
        {
            "transformer": family.model,
            "pipelines": ", ".join(family.pipelines),
            "skipped steps": "yes" if family.skips else "no",
            "partial steps": "yes" if family.regions else "no",
            "references": _of_references(family),
            "masks": "yes" if family.regions else "no",
            "result": "approximate" if family.skips else "exact",
            "tested": family.tested or OF_REGIONS if family.regions else "every call's output",
            "note": family.note,
        }
        for family in FAMILIES
    ]


def _of_references(family: Family) -> str:
    if not family.references:
        return "–"
    return "kept" if family.regions else "computed"


# --- what some families need ----------------------------------------------------------------------


def _qwen_layout(transformer: Any, inputs: Inputs) -> Layout:
    shapes = inputs["img_shapes"][0]
    (frames, height, width), *others = shapes if isinstance(shapes[0], list | tuple) else [shapes]
    grid = (height, width) if frames == 1 else (frames, height, width)
    references = inputs["hidden_states"].shape[1] - math.prod(grid)
    # Each picture is an image; layers of one, as other pipelines have them, are of no account here.
    whole = sum(map(math.prod, others)) == references and all(other[0] == 1 for other in others)
    pictures = tuple((h, w) for _, h, w in others) if whole else ()
    return Layout(grid, text_of(inputs, "encoder_hidden_states"), references, pictures)


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


def _cosmos_obstacle(transformer: Any, inputs: Inputs) -> str | None:
    if inputs["timestep"].ndim > 1:
        return "each frame has a time of its own"
    # The pipelines of Cosmos 1 step twice, first with the noise of both guidance copies.
    first = transformer.config.extra_pos_embed_type is not None
    return "the scheduler is not given the guided noise alone" if first else None


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


def _easy_animate_layout(transformer: Any, inputs: Inputs) -> Layout:
    other = "encoder_hidden_states_t5"
    found = patched("encoder_hidden_states")(transformer, inputs)
    more = text_of(inputs, other if inputs.get(other) is not None else None)
    return Layout(found.grid, found.text + more)


def _ltx_layout(transformer: Any, inputs: Inputs) -> Layout:
    grid = tuple(inputs.get(name) or 0 for name in ("num_frames", "height", "width"))
    return Layout(grid) if math.prod(grid) == inputs["hidden_states"].shape[1] else Layout()


def _sd3_text(pipe: Any) -> int:
    t5_tokens = inspect.signature(type(pipe).__call__).parameters["max_sequence_length"].default
    return pipe.tokenizer_max_length + t5_tokens


def _lumina_rotary(inputs: Inputs) -> Any:
    """The table's last entry, which tells the two tables of a run apart (`scaling_watershed`).

    The pipeline makes them on the CPU, so that nothing waits for the GPU here.
    """
    return tuple(inputs["image_rotary_emb"][-1, -1].tolist())


# --- the records ----------------------------------------------------------------------------------

BOTH_LISTS = {"transformer_blocks.*.attn": JOINT, "single_transformer_blocks.*.attn": JOINT}
FLUX_RESIDUALS: dict[str | int | None, Rows] = {
    "controlnet_block_samples": IMAGE,
    "controlnet_single_block_samples": IMAGE,
}

FAMILIES = (
    Family(
        "SD3Transformer2DModel",
        ("StableDiffusion3", "StableDiffusion3ControlNet", "StableDiffusion3Inpaint"),
        blocks=("transformer_blocks",),
        attention={"transformer_blocks.*.attn": JOINT, "transformer_blocks.*.attn2": IMAGE},
        enter={"": {"block_controlnet_hidden_states": IMAGE}, "pos_embed": {None: IMAGE}},
        leave="proj_out",
        image_first=True,
        layout=patched("encoder_hidden_states"),
        output=IMAGES,
        text={"encoder_hidden_states": 1},
        processor=SD3AttnProcessor,
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
    ),
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
            "": {"hidden_states": IMAGE, **FLUX_RESIDUALS},
            "pos_embed": {0: JOINT_TABLE, 1: JOINT_TABLE},
        },
        leave="proj_out",
        layout=by_ids("img_ids", "encoder_hidden_states"),
        packed=2,
        text={"encoder_hidden_states": 1, "txt_ids": 0},
        references=True,
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
            "pos_embed": {0: TABLE},
            "transformer_blocks.*": {"modulate_index": IMAGE},
        },
        leave="proj_out",
        layout=_qwen_layout,
        packed=2,
        text={"encoder_hidden_states": 1, "encoder_hidden_states_mask": 1},
        references=True,
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
        "Krea2Transformer2DModel",
        ("Krea2",),
        attention={"transformer_blocks.*.attn": JOINT},
        enter={"": {"hidden_states": IMAGE}, "rotary_emb": {0: JOINT_TABLE, 1: JOINT_TABLE}},
        leave="final_layer.linear",
        layout=by_ids("position_ids", "encoder_hidden_states"),
        packed=2,
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
        "CogVideoXTransformer3DModel",
        ("CogVideoX", "CogVideoXImageToVideo"),
        attention={"transformer_blocks.*.attn1": JOINT},
        enter={"": {"image_rotary_emb": TABLE}, "patch_embed": {None: JOINT}},
        leave="proj_out",
        layout=patched("encoder_hidden_states", frames_at=1),
        output="b (f h w) (c t p q) -> b (f t) c (h p) (w q)",
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
    Family("AceStepTransformer1DModel", ("AceStep",)),
    Family("AllegroTransformer3DModel", ("Allegro",), note="positions inside a tuple of tables"),
    Family("AnyFlowTransformer3DModel", ("AnyFlow",), note="tokens are third in its rotary table"),
    Family("ErnieImageTransformer2DModel", ("ErnieImage",), note="tokens come before samples"),
    Family("HeliosTransformer3DModel", ("Helios",), note="a plan for each chunk"),
    Family("HunyuanDiT2DModel", ("HunyuanDiT",), note="cross-attention rotates too"),
    Family("HunyuanVideo15Transformer3DModel", ("HunyuanVideo15",), note="a square mask per layer"),
    Family("Ideogram4Transformer2DModel", ("Ideogram4",), note="two transformers, text put out"),
    Family("Kandinsky5Transformer3DModel", ("Kandinsky5T2V",), note="blocks give a grid back"),
    Family("LTX2VideoTransformer3DModel", ("LTX2",), note="video and sound attend to each other"),
    Family("LatteTransformer3DModel", ("Latte",), note="attends along space and time by turns"),
    Family("LongCatAudioDiTTransformer", ("LongCatAudioDiT",)),
    Family("MochiTransformer3DModel", ("Mochi",), note="attends sample by sample"),
    Family("MotifVideoTransformer3DModel", ("MotifVideo",), note="its decoder has tokens twice"),
    Family("NucleusMoEImageTransformer2DModel", ("NucleusMoEImage",), note="experts choose tokens"),
    Family("OmniGenTransformer2DModel", ("OmniGen",), note="counts positions of tokens that walk"),
    Family("PRXTransformer2DModel", ("PRX",), note="text has no queries"),
    Family(
        "QwenImage21Transformer2DModel",
        ("QwenImage21",),
        note="the step that fills the model's own cache is computed",
    ),
    Family("SanaTransformer2DModel", ("Sana", "SanaSprint"), note="linear attention mixes tokens"),
    Family("SanaVideoTransformer3DModel", ("SanaVideo",), note="linear attention mixes tokens"),
    Family(
        "SkyReelsV2Transformer3DModel",
        ("SkyReelsV2DiffusionForcing",),
        skips=False,
        note="steps a copy of its scheduler for each frame: dense, with a warning",
    ),
    Family("StableAudio3DiTModel", ("StableAudio3",)),
    Family("StableAudioDiTModel", ("StableAudio",)),
)
