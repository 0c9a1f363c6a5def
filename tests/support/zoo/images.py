"""Pipelines of images whose transformers make the patches themselves."""

import importlib
from functools import partial
from types import SimpleNamespace
from unittest import mock

import diffusers
import torch

from support import pipelines as tested
from support.pipelines import autoencoder, euler, normal
from support.zoo.parts import (
    BLOCKS,
    CHANNELS,
    ROPE,
    Entry,
    Safe,
    Shrink,
    calling,
    ddim,
    flow,
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


def hidream():
    transformer = model(
        "HiDreamImageTransformer2DModel",
        **BLOCKS,
        patch_size=2,
        in_channels=4,
        num_single_layers=1,
        caption_channels=[32, 32],
        text_emb_dim=32,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=ROPE,
        max_resolution=(16, 16),
        llama_layers=[0, 1],
    )
    pipe = pipeline("HiDreamImagePipeline", transformer=transformer)
    pipe.default_sample_size = 16
    prompt = guided(name="embeds_t5")
    prompt |= dict(
        prompt_embeds_llama3=normal(2, 1, 8, 32, seed=3),
        negative_prompt_embeds_llama3=normal(2, 1, 8, 32, seed=4),
        pooled_prompt_embeds=normal(1, 32, seed=5),
        negative_pooled_prompt_embeds=normal(1, 32, seed=6),
    )
    return calling(pipe, **prompt, **square(), guidance_scale=3.0)


Z_IMAGE = dict(dim=32, n_refiner_layers=1, n_heads=2, n_kv_heads=2)


def z_image(name="ZImagePipeline", parts=None, **inputs):
    transformer = model(
        "ZImageTransformer2DModel",
        **Z_IMAGE,
        in_channels=4,
        n_layers=2,
        cap_feat_dim=32,
        axes_dims=list(ROPE),
        axes_lens=[128, 64, 64],
    )
    pipe = pipeline(name, transformer=transformer, **(parts or {}))
    prompt = {k: [v[0]] for k, v in guided(11).items()}
    return calling(pipe, **{**prompt, **square(), "guidance_scale": 3.0, **inputs})


def z_image_padded():
    """Two prompts of unlike lengths, and 80 tokens of an image, to which 16 are added."""
    prompts = {k: [v[0], text(37, seed=5)[0]] for k, v in guided(11).items()}
    return z_image(**prompts, height=128, width=160)


def z_image_with_vae(name, *, parts=None, **inputs):
    return z_image(name, dict(vae=autoencoder(channels=4), **(parts or {})), **inputs)


def z_image_controlnet():
    controlnet = model(
        "ZImageControlNetModel",
        **Z_IMAGE,
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=4,
        add_control_noise_refiner="control_noise_refiner",
    )
    inputs = dict(control_image=picture(**oblong()), **oblong())
    return z_image_with_vae("ZImageControlNetPipeline", parts=dict(controlnet=controlnet), **inputs)


def z_image_img2img():
    inputs = dict(image=picture(**oblong()), strength=1.0, **oblong())
    return z_image_with_vae("ZImageImg2ImgPipeline", **inputs)


def cogview4():
    transformer = model(
        "CogView4Transformer2DModel",
        **BLOCKS,
        **CHANNELS,
        patch_size=2,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=8,
        rope_axes_dim=(8, 8),
        pos_embed_max_size=16,
        sample_size=16,
    )
    pipe = pipeline("CogView4Pipeline", transformer=transformer)
    return calling(pipe, **guided(16), **oblong(), guidance_scale=3.0)


def cogview3():
    transformer = model(
        "CogView3PlusTransformer2DModel",
        **BLOCKS,
        **CHANNELS,
        patch_size=2,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=16,
        sample_size=16,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler()
    pipe = pipeline("CogView3PlusPipeline", transformer=transformer, scheduler=scheduler)
    return calling(pipe, **guided(16), **square(), guidance_scale=3.0)


def pixart(name="PixArtSigmaPipeline", scheduler=None, **inputs):
    transformer = model(
        "PixArtTransformer2DModel",
        **BLOCKS,
        in_channels=4,
        out_channels=8,
        sample_size=16,
        cross_attention_dim=32,
        caption_channels=32,
        num_embeds_ada_norm=1000,
        use_additional_conditions=False,
    )
    pipe = pipeline(name, transformer=transformer, scheduler=scheduler or ddim())
    prompt = guided(masks="attention_mask") | dict(negative_prompt=None)
    inputs = {**prompt, **square(), **inputs}
    return calling(pipe, **inputs, use_resolution_binning=False)


SANA = dict(
    **BLOCKS,
    **CHANNELS,
    sample_size=16,
    num_cross_attention_heads=2,
    cross_attention_head_dim=16,
    cross_attention_dim=32,
    caption_channels=32,
)


def sana(scheduler=None):
    transformer = model("SanaTransformer2DModel", **SANA)
    pipe = pipeline("SanaPipeline", transformer=transformer, scheduler=scheduler or euler())
    prompt = guided(masks="attention_mask") | dict(negative_prompt=None)
    return calling(pipe, **prompt, **square(512), use_resolution_binning=False)


def sana_sprint():
    transformer = model("SanaTransformer2DModel", **SANA, guidance_embeds=True)
    scheduler = diffusers.SCMScheduler()
    pipe = pipeline("SanaSprintPipeline", transformer=transformer, scheduler=scheduler)
    prompt = dict(prompt_embeds=text(), prompt_attention_mask=mask())
    options = dict(use_resolution_binning=False, intermediate_timesteps=None)
    return calling(pipe, **prompt, **square(512), **options)


def aura_flow():
    transformer = model(
        "AuraFlowTransformer2DModel",
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    pipe = pipeline("AuraFlowPipeline", transformer=transformer)
    return calling(pipe, **guided(masks="attention_mask"), **oblong(), guidance_scale=3.0)


def lumina2(**inputs):
    transformer = model(
        "Lumina2Transformer2DModel",
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=ROPE,
        axes_lens=(64, 64, 64),
        cap_feat_dim=32,
    )
    pipe = pipeline("Lumina2Pipeline", transformer=transformer)
    return calling(pipe, **{**lumina2_prompt(8), **square(), "guidance_scale": 3.0, **inputs})


def lumina2_prompt(*lengths):
    return guided(masks="attention_mask", lengths=lengths)


def lumina():
    pipe = tested.lumina()
    return calling(pipe, **tested.lumina_inputs(pipe), guidance_scale=3.0)


def two_small(inputs, small, **more):
    """Return what a small model is called with for two samples."""
    config = SimpleNamespace(**{"in_channels": 16, **small})
    return inputs(SimpleNamespace(transformer=SimpleNamespace(config=config)), batch=2, **more)


two_lumina = two_small(tested.lumina_inputs, dict(cross_attention_dim=32, in_channels=4))
two_sd3_inputs = partial(two_small, tested.sd3_inputs, tested.SMALL)
two_sd3 = partial(Entry, two=two_sd3_inputs())


def sd3(scheduler=None, **inputs):
    pipe = tested.sd3(scheduler=scheduler)
    return calling(pipe, **tested.sd3_inputs(pipe), guidance_scale=3.0, **inputs)


def sd3_inpaint():
    pipe = tested.sd3(diffusers.StableDiffusion3InpaintPipeline, vae=autoencoder())
    inputs = tested.sd3_inputs(pipe, latents=False) | painted()
    return calling(pipe, **inputs, guidance_scale=3.0)


def sd3_controlnet():
    pipe = tested.sd3_controlnet()
    inputs = tested.sd3_inputs(pipe, width=24)
    return calling(pipe, **inputs, control_image=picture(**oblong()), guidance_scale=3.0)


def hunyuan_dit(prediction="v_prediction"):
    transformer = model(
        "HunyuanDiT2DModel",
        **BLOCKS,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=32,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        text_len=8,
        text_len_t5=8,
        use_style_cond_and_image_meta_size=False,
    )
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, clip_sample=False)
    pipe = pipeline("HunyuanDiTPipeline", transformer=transformer, scheduler=scheduler)
    return calling(pipe, **hunyuan_dit_prompt(8), **square(), use_resolution_binning=False)


def hunyuan_dit_prompt(*lengths):
    prompt = guided(masks="attention_mask", lengths=lengths)
    return prompt | guided(name="embeds_2", masks="attention_mask_2", seed=3, lengths=lengths)


def omnigen():
    """Its processor, which needs torchvision, gives way to the inputs that it would make."""
    transformer = model(
        "OmniGenTransformer2DModel",
        in_channels=4,
        patch_size=2,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        num_layers=2,
        pad_token_id=0,
        vocab_size=64,
        pos_embed_max_size=16,
        time_step_dim=32,
        max_position_embeddings=1000,
        rope_scaling=dict(long_factor=[1] * 8, short_factor=[1] * 8),
    )
    parts = dict(transformer=transformer, scheduler=euler(invert_sigmas=True))
    module = importlib.import_module("diffusers.pipelines.omnigen.pipeline_omnigen")
    with mock.patch.object(module, "OmniGenMultiModalProcessor", create=True):
        pipe = pipeline("OmniGenPipeline", **parts)
    length = 6 + 1 + 64  # text, timestep and image
    pipe.multimodal_processor = lambda *_, **__: dict(
        input_ids=torch.arange(12).reshape(2, 6),
        attention_mask=torch.ones(2, length, length, dtype=torch.long),
        position_ids=torch.arange(length).repeat(2, 1),
        input_pixel_values=[],
        input_image_sizes={},
    )
    pipe.multimodal_processor.max_image_size = 1024
    pipe.encode_input_images = lambda *_, **__: []
    return calling(pipe, prompt="", **square())


def cosmos2():
    transformer = model(
        "CosmosTransformer3DModel",
        **BLOCKS,
        **CHANNELS,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        concat_padding_mask=False,
        extra_pos_embed_type=None,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    parts = dict(transformer=transformer, safety_checker=Safe(), scheduler=scheduler)
    pipe = pipeline("Cosmos2TextToImagePipeline", **parts)
    return calling(pipe, **guided(), **oblong(), guidance_scale=3.0)


def glm_image(image=None):
    transformer = model(
        "GlmImageTransformer2DModel",
        **BLOCKS,
        **CHANNELS,
        patch_size=2,
        text_embed_dim=32,
        time_embed_dim=16,
        condition_dim=8,
        prior_vq_quantizer_codebook_size=32,
    )
    pipe = pipeline("GlmImagePipeline", transformer=transformer, vae=Shrink(4, 8))
    inputs = dict(prior_token_ids=torch.arange(64)[None] % 32)
    if image:
        inputs |= dict(
            image=[image],
            prior_token_image_ids=[torch.arange(16)],
            source_image_grid_thw=[torch.tensor([[1, 4, 4]])],
        )
    return calling(pipe, **guided(), **square(), guidance_scale=3.0, **inputs)


def ernie():
    transformer = model(
        "ErnieImageTransformer2DModel",
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=64,
        in_channels=16,
        out_channels=16,
        text_in_dim=32,
        rope_axes_dim=ROPE,
    )
    pipe = pipeline("ErnieImagePipeline", transformer=transformer)
    prompt = {k: [v[0]] for k, v in guided(11).items()}
    return calling(pipe, **prompt, **oblong(), guidance_scale=3.0)


def dit():
    """The one that always decodes: what it gives is the picture."""
    transformer = model(
        "DiTTransformer2DModel",
        **BLOCKS,
        sample_size=16,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    parts = dict(transformer=transformer, vae=autoencoder(channels=4), scheduler=ddim())
    pipe = pipeline("DiTPipeline", **parts)
    return calling(pipe, lambda out: torch.from_numpy(out[0]), class_labels=[3], output_type="np")


def prx():
    transformer = model(
        "PRXTransformer2DModel",
        in_channels=4,
        patch_size=2,
        context_in_dim=32,
        hidden_size=32,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[8, 8],
    )
    pipe = pipeline("PRXPipeline", transformer=transformer)
    return calling(pipe, **guided(masks="attention_mask"), **square(), use_resolution_binning=False)


def hunyuan_image():
    transformer = model(
        "HunyuanImageTransformer2DModel",
        **BLOCKS,
        **CHANNELS,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=32,
        text_embed_2_dim=32,
        rope_axes_dim=(8, 8),
    )
    pipe = pipeline(
        "HunyuanImagePipeline",
        transformer=transformer,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    )
    prompt = guided(masks="embeds_mask")
    prompt |= guided(name="embeds_2", masks="embeds_mask_2", seed=3)
    return calling(pipe, **prompt, **oblong(256))


two_lumina2 = partial(Entry, two=lumina2_prompt(8, 6), note="given prompts are repeated wrongly")

two_hunyuan_dit = partial(Entry, two=hunyuan_dit_prompt(8, 8))

IMAGES = {
    "hidream": Entry(hidream),
    "z-image": Entry(z_image),
    "z-image-truncated": Entry(partial(z_image, cfg_truncation=0.5)),
    "z-image-padded": Entry(z_image_padded, two={}),
    "z-image-controlnet": Entry(z_image_controlnet),
    "z-image-inpaint": Entry(lambda: z_image_with_vae("ZImageInpaintPipeline", **painted())),
    "z-image-img2img": Entry(z_image_img2img),
    "cogview4": Entry(cogview4, calls=2),
    "cogview3": Entry(cogview3, two=guided(16, lengths=(16, 16))),
    "pixart-alpha": Entry(partial(pixart, "PixArtAlphaPipeline")),
    "pixart-sigma": Entry(pixart),
    "pixart-dpm": Entry(lambda: pixart(scheduler=diffusers.DPMSolverMultistepScheduler())),
    "pixart-oblong": Entry(partial(pixart, **oblong())),
    "pixart-ddpm": Entry(lambda: pixart(scheduler=diffusers.DDPMScheduler(clip_sample=False))),
    "sana": Entry(sana),
    "sana-dpm": Entry(lambda: sana(flow("DPMSolverMultistepScheduler"))),
    "sana-sprint": Entry(sana_sprint),
    "aura-flow": Entry(aura_flow),
    "lumina2": two_lumina2(lumina2, calls=2),
    "lumina2-truncated": two_lumina2(
        partial(lumina2, cfg_trunc_ratio=0.5), total=lambda n: n + n // 2
    ),
    "lumina2-padded": two_lumina2(
        lambda: lumina2(**lumina2_prompt(8, 5), **oblong()), calls=2, two={}
    ),
    "lumina": Entry(lumina, two=two_lumina),
    "sd3": two_sd3(sd3),
    "sd3-inpaint": Entry(sd3_inpaint, two=two_sd3_inputs(width=24, latents=False)),
    "sd3-controlnet": Entry(sd3_controlnet, two=two_sd3_inputs(width=24)),
    "sd3-heun": two_sd3(
        lambda: sd3(diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)),
        total=lambda n: 2 * n - 1,
        steps=lambda n: 2 * n - 1,
    ),
    "sd3-skipping-layers": two_sd3(
        partial(sd3, skip_guidance_layers=[1], skip_layer_guidance_stop=0.5),
        total=lambda n: n + (n - 1) // 2,
        note="a second call in the steps after the first, up to the middle",
    ),
    "hunyuan-dit": two_hunyuan_dit(hunyuan_dit),
    "hunyuan-dit-epsilon": two_hunyuan_dit(partial(hunyuan_dit, "epsilon")),
    "omnigen": Entry(omnigen, two=None, note="what its processor says is given, for one alone"),
    "cosmos2": Entry(cosmos2, calls=2),
    "glm": Entry(glm_image, calls=2),
    "glm-edit": Entry(lambda: glm_image(pil()), calls=2, before=1),
    "ernie": Entry(ernie),
    "dit": Entry(dit, two=dict(class_labels=[3, 4])),
    "prx": Entry(prx, two=None, note="its pipeline guides one sample alone"),
    "hunyuan-image": Entry(hunyuan_image, calls=2),
}
