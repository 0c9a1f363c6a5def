"""Pipelines of images whose transformers are given packed tokens."""

from functools import partial
from unittest import mock

import diffusers
import torch

from support.pipelines import autoencoder, euler, normal, quiet
from support.zoo.parts import (
    BLOCKS,
    CHANNELS,
    ROPE,
    SIDE,
    Entry,
    Part,
    Shrink,
    calling,
    guided,
    mask,
    model,
    picture,
    pil,
    pipeline,
    square,
    text,
)

FLUX = dict(
    **BLOCKS,
    patch_size=1,
    in_channels=16,
    num_single_layers=2,
    joint_attention_dim=32,
    axes_dims_rope=ROPE,
)


def flux(name="FluxPipeline", negative=False, channels=16, vae=None, **inputs):
    transformer = model(
        "FluxTransformer2DModel",
        **{**FLUX, "in_channels": channels},
        out_channels=16,
        pooled_projection_dim=32,
        guidance_embeds=True,
    )
    prompt = dict(prompt_embeds=text(), pooled_prompt_embeds=normal(1, 32, seed=3))
    if negative:
        prompt |= dict(
            negative_prompt_embeds=text(seed=2),
            negative_pooled_prompt_embeds=normal(1, 32, seed=4),
            true_cfg_scale=3.0,
        )
    pipe = pipeline(name, transformer=transformer, vae=vae)
    return calling(pipe, **{**prompt, **square(), **inputs})


def flux_modular():
    """The same from blocks, of which those that encode and decode are left out."""
    blocks = diffusers.FluxAutoBlocks()
    for name in ("text_encoder", "vae_encoder", "decode"):
        blocks.sub_blocks.pop(name)
    pipe = quiet(blocks.init_pipeline())
    whole, _ = flux()
    pipe.update_components(transformer=whole.transformer, scheduler=whole.scheduler)
    prompt = dict(prompt_embeds=text(), pooled_prompt_embeds=normal(1, 32, seed=3))
    return calling(pipe, lambda latents: latents, **prompt, **square(), output="latents")


def flux3():
    """In blocks, as there is no other pipeline of it; the blocks around are left out."""
    config = {**BLOCKS, "num_layers": 1, "num_single_layers": 2}
    transformer = model(
        "Flux3Transformer2DModel",
        **config,
        in_channels=16,
        cond_in_channels=16,
        joint_attention_dim=32,
        timestep_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    blocks = diffusers.Flux3AutoBlocks()
    for name in ("prompt_upsampler", "text_encoder", "vae_encoder", "decode"):
        blocks.sub_blocks.pop(name)
    pipe = quiet(blocks.init_pipeline())
    guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
    pipe.update_components(transformer=transformer, scheduler=euler(), guider=guider)
    return calling(pipe, lambda latents: latents, **guided(), **square(), output="latents")


def flux_with_vae(name, **inputs):
    return flux(name, vae=autoencoder(channels=4), **inputs)


def kontext():
    inputs = dict(image=picture(64, 96), _auto_resize=False, max_area=SIDE**2)
    return flux_with_vae("FluxKontextPipeline", **inputs)


def flux_fill():
    """Tokens of the latents, of the masked picture and of the mask, side by side."""
    image = picture(SIDE, SIDE)
    inputs = dict(image=image, mask_image=image[:, :1].round())
    return flux_with_vae("FluxFillPipeline", channels=16 + 16 + 256, **inputs)


def flux_control():
    return flux_with_vae("FluxControlPipeline", channels=32, control_image=picture(SIDE, SIDE))


def flux_img2img():
    image = picture(SIDE, SIDE)
    return flux_with_vae("FluxImg2ImgPipeline", image=image, strength=0.5)


def flux2_vae():
    return model(
        "AutoencoderKLFlux2",
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        latent_channels=4,
        norm_num_groups=1,
        layers_per_block=1,
    )


def flux2(name="Flux2Pipeline", guidance=True, negative=False, **inputs):
    transformer = model(
        "Flux2Transformer2DModel",
        **{**FLUX, "axes_dims_rope": (4, 4, 4, 4)},
        timestep_guidance_channels=32,
        guidance_embeds=guidance,
    )
    prompt = guided() if negative else dict(prompt_embeds=text())
    pipe = pipeline(name, transformer=transformer, vae=flux2_vae())
    return calling(pipe, **prompt, **square(), **inputs)


def chroma():
    transformer = model(
        "ChromaTransformer2DModel",
        **FLUX,
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    prompt = guided(masks="attention_mask", dtype=torch.float32)
    pipe = pipeline("ChromaPipeline", transformer=transformer)
    return calling(pipe, **prompt, **square(), guidance_scale=3.0)


QWEN = dict(
    **BLOCKS,
    patch_size=2,
    in_channels=16,
    out_channels=4,
    joint_attention_dim=32,
    axes_dims_rope=ROPE,
)


def qwen(name="QwenImagePipeline", vae=None, **inputs):
    transformer = model("QwenImageTransformer2DModel", **QWEN)
    pipe = pipeline(name, transformer=transformer, vae=vae)
    inputs = {**guided(masks="embeds_mask"), **square(), **inputs}
    return calling(pipe, **inputs, true_cfg_scale=3.0)


def qwen_edit(name="QwenImageEditPipeline"):
    """Pictures are brought to a mega-pixel, so the autoencoder makes 8 x 8 tokens of that."""
    return qwen(name, vae=Shrink(4, 64), image=pil(), **square(1024))


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
    return calling(pipe, **guided(masks="embeds_mask"), **square(), true_cfg_scale=3.0)


def krea2():
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
    prompt = guided(masks="embeds_mask", shape=(2,), dtype=torch.bool)
    return calling(pipe, **prompt, **square(), guidance_scale=3.0)


def ovis():
    config = {**FLUX, "out_channels": 16}
    pipe = pipeline("OvisImagePipeline", transformer=model("OvisImageTransformer2DModel", **config))
    return calling(pipe, **guided(), **square(), guidance_scale=3.0, negative_prompt=None)


def longcat():
    transformer = model("LongCatImageTransformer2DModel", **{**FLUX, "in_channels": 64})
    pipe = pipeline("LongCatImagePipeline", transformer=transformer)
    pipe._encode_prompt = lambda prompts: text(seed=len(prompts[0]))
    prompts = dict(prompt="cat", negative_prompt="", enable_prompt_rewrite=False)
    return calling(pipe, **prompts, **square())


def bria():
    transformer = model("BriaTransformer2DModel", **FLUX)
    pipe = pipeline("BriaPipeline", transformer=transformer, vae=autoencoder(channels=4))
    return calling(pipe, **guided(), **square(), guidance_scale=3.0)


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
    return calling(pipe, prompt="", **square(), max_sequence_length=8, **guidance)


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
    return calling(pipe, **guided(masks="embeds_mask"), **square(), guidance_scale=3.0)


UNCONDITIONAL = "unconditional_transformer"

PACKED = {
    "flux": Entry(flux),
    "flux-true-cfg": Entry(partial(flux, negative=True), calls=2),
    "flux-modular": Entry(flux_modular),
    "flux-kontext": Entry(kontext),
    "flux-fill": Entry(flux_fill),
    "flux-control": Entry(flux_control),
    "flux-img2img": Entry(flux_img2img, total=lambda n: n // 2, steps=lambda n: n // 2),
    "flux2": Entry(flux2),
    "flux2-klein": Entry(partial(flux2, "Flux2KleinPipeline", False, True), calls=2),
    "flux2-klein-kv": Entry(partial(flux2, "Flux2KleinKVPipeline", False, image=[pil()])),
    "flux3": Entry(flux3, calls=2),
    "chroma": Entry(chroma, calls=2),
    "qwen": Entry(qwen, calls=2),
    "qwen-edit": Entry(qwen_edit, calls=2),
    "qwen-edit-plus": Entry(partial(qwen_edit, "QwenImageEditPlusPipeline"), calls=2),
    "qwen21": Entry(qwen21, calls=2),
    "krea2": Entry(krea2, calls=2),
    "ovis": Entry(ovis, calls=2),
    "longcat": Entry(longcat, calls=2),
    "bria": Entry(bria),
    "bria-fibo": Entry(bria_fibo),
    "ideogram4": Entry(ideogram4, calls=2, transformers=("transformer", UNCONDITIONAL)),
    "nucleus": Entry(nucleus, calls=2),
}
