"""Pipelines of FLUX.1, of FLUX.2 and of Chroma."""

from functools import partial

import diffusers
import torch

from support.pipelines import autoencoder, euler, normal, quiet
from support.zoo.parts import (
    BLOCKS,
    ROPE,
    SIDE,
    Entry,
    calling,
    guided,
    model,
    oblong,
    painted,
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


def flux(name="FluxPipeline", negative=False, channels=16, parts=None, **inputs):
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
    pipe = pipeline(name, transformer=transformer, **(parts or {}))
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


def flux_with_vae(name, *, parts=None, **inputs):
    return flux(name, parts=dict(vae=autoencoder(channels=4), **(parts or {})), **inputs)


def kontext():
    inputs = dict(image=picture(64, 96), _auto_resize=False, max_area=SIDE**2)
    return flux_with_vae("FluxKontextPipeline", **inputs)


def kontext_inpaint():
    """The picture comes after the latents once more, as a reference."""
    inputs = dict(**painted(), _auto_resize=False, max_area=SIDE**2 * 3 // 2)
    return flux_with_vae("FluxKontextInpaintPipeline", **inputs)


def flux_fill():
    """Tokens of the latents, of the masked picture and of the mask, side by side."""
    image = picture(SIDE, SIDE)
    inputs = dict(image=image, mask_image=image[:, :1].round())
    return flux_with_vae("FluxFillPipeline", channels=16 + 16 + 256, **inputs)


def flux_control():
    return flux_with_vae("FluxControlPipeline", channels=32, control_image=picture(SIDE, SIDE))


def flux_control_inpaint():
    inputs = dict(**painted(), control_image=picture(**oblong()))
    return flux_with_vae("FluxControlInpaintPipeline", channels=32, **inputs)


def flux_controlnet():
    """One block of each kind, to the tokens of which those of the picture are added."""
    config = {**FLUX, "num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
    controlnet = model("FluxControlNetModel", seed=1, **config, pooled_projection_dim=32)
    inputs = dict(control_image=picture(**oblong()), **oblong())
    return flux_with_vae("FluxControlNetPipeline", parts=dict(controlnet=controlnet), **inputs)


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
        **{**FLUX, "axes_dims_rope": (FLUX["attention_head_dim"] // 4,) * 4},
        timestep_guidance_channels=32,
        guidance_embeds=guidance,
    )
    prompt = guided() if negative else dict(prompt_embeds=text())
    pipe = pipeline(name, transformer=transformer, vae=flux2_vae())
    return calling(pipe, **{**prompt, **square(), **inputs})


def chroma(name="ChromaPipeline", parts=None, **inputs):
    transformer = model(
        "ChromaTransformer2DModel",
        **FLUX,
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    transformer.register_to_config(guidance_embeds=False)  # as files of Chroma say
    pipe = pipeline(name, transformer=transformer, **(parts or {}))
    return calling(pipe, **{**chroma_prompt(8), **square(), "guidance_scale": 3.0, **inputs})


def chroma_prompt(*lengths):
    return guided(masks="attention_mask", dtype=torch.float32, lengths=lengths)


def chroma_inpaint():
    vae = dict(vae=autoencoder(channels=4))
    return chroma("ChromaInpaintPipeline", vae, **painted())


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


KLEIN = "Flux2KleinPipeline"
reference = dict(**oblong(), image=[pil(64, 96)])
chromas = partial(Entry, calls=2, two=chroma_prompt(8, 6), note="masks are not repeated")

FLUXES = {
    "flux": Entry(flux),
    "flux-true-cfg": Entry(partial(flux, negative=True), calls=2),
    "flux-modular": Entry(flux_modular),
    "flux-kontext": Entry(kontext),
    "flux-kontext-inpaint": Entry(kontext_inpaint),
    "flux-fill": Entry(flux_fill),
    "flux-control": Entry(flux_control),
    "flux-control-inpaint": Entry(flux_control_inpaint),
    "flux-controlnet": Entry(flux_controlnet),
    "flux-img2img": Entry(flux_img2img, total=lambda n: n // 2, steps=lambda n: n // 2),
    "flux-inpaint": Entry(lambda: flux_with_vae("FluxInpaintPipeline", **painted())),
    "flux2": Entry(flux2),
    "flux2-reference": Entry(lambda: flux2(**reference)),
    "flux2-klein": Entry(partial(flux2, KLEIN, False, True), calls=2),
    "flux2-klein-reference": Entry(lambda: flux2(KLEIN, False, True, **reference), calls=2),
    "flux2-klein-kv": Entry(partial(flux2, "Flux2KleinKVPipeline", False, image=[pil()])),
    "flux3": Entry(flux3, calls=2),
    "chroma": chromas(chroma),
    "chroma-padded": chromas(lambda: chroma(**chroma_prompt(6), **oblong())),
    "chroma-inpaint": chromas(chroma_inpaint),
}
