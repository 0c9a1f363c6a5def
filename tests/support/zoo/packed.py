"""Pipelines of images whose transformers are given packed tokens."""

from functools import partial
from unittest import mock

import torch

from support.pipelines import autoencoder
from support.zoo.flux import FLUX
from support.zoo.parts import (
    BLOCKS,
    CHANNELS,
    ROPE,
    Entry,
    Part,
    Shrink,
    calling,
    guided,
    mask,
    model,
    oblong,
    painted,
    picture,
    pil,
    pipeline,
    square,
    text,
)

QWEN = dict(
    **BLOCKS,
    patch_size=2,
    in_channels=16,
    out_channels=4,
    joint_attention_dim=32,
    axes_dims_rope=ROPE,
)


def qwen(name="QwenImagePipeline", parts=None, zero=False, **inputs):
    """A Qwen-Image; with `zero` it takes the tokens of pictures for clean ones."""
    transformer = model("QwenImageTransformer2DModel", **QWEN, zero_cond_t=zero)
    pipe = pipeline(name, transformer=transformer, **(parts or {}))
    inputs = {**guided(masks="embeds_mask"), **square(), **inputs}
    return calling(pipe, **inputs, true_cfg_scale=3.0)


def qwen_padded():
    """Two prompts and two negative ones, a short and a long one each."""
    return qwen(**guided(masks="embeds_mask", lengths=(8, 5)), **oblong())


def qwen_edit(name="QwenImageEditPipeline", **inputs):
    """Pictures are brought to a mega-pixel, so the autoencoder makes 8 x 8 tokens of that."""
    return qwen(name, dict(vae=Shrink(4, 64)), **{"image": pil(), **square(1024), **inputs})


def qwen_edit_2511():
    """Two pictures, before which the tokens that change are not as high as wide."""
    size = dict(height=768, width=1280)
    return qwen_edit("QwenImageEditPlusPipeline", zero=True, image=[pil(), pil(64, 96)], **size)


def qwen_edit_inpaint():
    """The size of what changes is that of the picture: 6 x 10 tokens."""
    pixels = pil(96, 160)
    inputs = dict(image=pixels, mask_image=pixels.convert("L"), strength=1.0)
    return qwen_edit("QwenImageEditInpaintPipeline", **inputs, height=768, width=1280)


def qwen_inpaint():
    return qwen("QwenImageInpaintPipeline", dict(vae=Shrink(4, 8)), **painted())


def qwen_controlnet():
    controlnet = model("QwenImageControlNetModel", seed=1, **{**QWEN, "num_layers": 1})
    parts = dict(vae=Shrink(4, 8), controlnet=controlnet)
    inputs = dict(control_image=picture(**oblong()), **oblong())
    return qwen("QwenImageControlNetPipeline", parts, **inputs)


def qwen21():
    transformer = model(
        "QwenImage21Transformer2DModel",
        **BLOCKS,
        **CHANNELS,
        context_in_dim=32,
        axes_dims_rope=ROPE,
    )
    parts = dict(transformer=transformer, vae=Shrink(4, 16), processor=mock.MagicMock())
    pipe = pipeline("QwenImage21Pipeline", **parts)
    return calling(pipe, **guided(masks="embeds_mask"), **oblong(), true_cfg_scale=3.0)


def krea2(**size):
    """A Krea 2, two heads of whose queries share keys and values."""
    transformer = model(
        "Krea2Transformer2DModel",
        **BLOCKS,
        in_channels=16,
        num_key_value_heads=1,
        intermediate_size=64,
        timestep_embed_dim=32,
        text_hidden_dim=32,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=64,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=ROPE,
    )
    pipe = pipeline("Krea2Pipeline", transformer=transformer)
    inputs = {**krea2_prompt(8), **square(), **size}
    return calling(pipe, **inputs, guidance_scale=3.0)


def krea2_prompt(*lengths):
    return guided(masks="embeds_mask", shape=(2,), dtype=torch.bool, lengths=lengths)


def ovis():
    config = {**FLUX, "out_channels": 16}
    pipe = pipeline("OvisImagePipeline", transformer=model("OvisImageTransformer2DModel", **config))
    return calling(pipe, **guided(), **oblong(), guidance_scale=3.0, negative_prompt=None)


def longcat():
    transformer = model("LongCatImageTransformer2DModel", **{**FLUX, "in_channels": 64})
    pipe = pipeline("LongCatImagePipeline", transformer=transformer)
    pipe._encode_prompt = lambda prompts: text(seed=len(prompts[0]))
    prompts = dict(prompt="cat", negative_prompt="", enable_prompt_rewrite=False)
    return calling(pipe, **prompts, **oblong())


def bria():
    transformer = model("BriaTransformer2DModel", **FLUX)
    pipe = pipeline("BriaPipeline", transformer=transformer, vae=autoencoder(channels=4))
    return calling(pipe, **guided(), **oblong(), guidance_scale=3.0)


def bria_fibo():
    """Each layer has a text of its own."""
    transformer = model("BriaFiboTransformer2DModel", **FLUX, text_encoder_dim=32)
    pipe = pipeline("BriaFiboPipeline", transformer=transformer, text_encoder=Part())

    def encode(prompt, num_images_per_prompt, max_sequence_length, **_):
        layers = text(seed=len(prompt[0])).repeat(num_images_per_prompt, 1, 1)
        return layers, [layers] * 4, mask().repeat(num_images_per_prompt, 1)

    pipe.get_prompt_embeds = encode
    return calling(pipe, prompt="cat", negative_prompt="", **square(), guidance_scale=3.0)


def ideogram4():
    config = dict(
        **BLOCKS,
        in_channels=16,
        intermediate_size=64,
        adaln_dim=16,
        llm_features_dim=32,
        mrope_section=(4, 2, 2),
    )
    pipe = pipeline(
        "Ideogram4Pipeline",
        transformer=model("Ideogram4Transformer2DModel", seed=0, **config),
        unconditional_transformer=model("Ideogram4Transformer2DModel", seed=1, **config),
    )

    def encode(grid_h, grid_w, max_sequence_length, device, **_):
        layout = pipe._prepare_ids([6], grid_h, grid_w, max_sequence_length, device)
        features = text(max_sequence_length + grid_h * grid_w)
        features[:, max_sequence_length:] = 0
        return features, *layout

    pipe.encode_prompt = encode
    guidance = dict(guidance_scale=3.0, guidance_schedule=None)
    return calling(pipe, prompt="", **oblong(), max_sequence_length=8, **guidance)


def nucleus():
    transformer = model(
        "NucleusMoEImageTransformer2DModel",
        **BLOCKS,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        joint_attention_dim=32,
        axes_dims_rope=ROPE,
        num_experts=4,
        mlp_ratio=6.0,
        moe_intermediate_dim=32,
        capacity_factors=2.0,
        dense_moe_strategy="leave_first_block_dense",
    )
    pipe = pipeline("NucleusMoEImagePipeline", transformer=transformer)
    return calling(pipe, **guided(masks="embeds_mask"), **oblong(), guidance_scale=3.0)


UNCONDITIONAL = "unconditional_transformer"

PACKED = {
    "qwen": Entry(qwen, calls=2),
    "qwen-edit": Entry(qwen_edit, calls=2),
    "qwen-padded": Entry(qwen_padded, calls=2, two={}),
    "qwen-inpaint": Entry(qwen_inpaint, calls=2),
    "qwen-controlnet": Entry(qwen_controlnet, calls=2),
    "qwen-edit-inpaint": Entry(qwen_edit_inpaint, calls=2),
    "qwen-edit-plus": Entry(partial(qwen_edit, "QwenImageEditPlusPipeline"), calls=2),
    "qwen-edit-2511": Entry(qwen_edit_2511, calls=2),
    "qwen21": Entry(qwen21, calls=2),
    "krea2": Entry(krea2, calls=2),
    "krea2-padded": Entry(lambda: krea2(**krea2_prompt(8, 5), **oblong()), calls=2, two={}),
    "ovis": Entry(ovis, calls=2),
    "longcat": Entry(longcat, calls=2),
    "bria": Entry(bria, two=guided(lengths=(8, 8)), note="given prompts are repeated wrongly"),
    "bria-fibo": Entry(bria_fibo),
    "ideogram4": Entry(ideogram4, calls=2, transformers=("transformer", UNCONDITIONAL)),
    "nucleus": Entry(nucleus, calls=2),
}
