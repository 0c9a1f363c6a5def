"""Pipelines of images in the zoo."""

import importlib
from functools import partial
from types import SimpleNamespace
from unittest import mock

import diffusers
import torch

from support import pipelines as tested
from support.zoo_parts import (
    BLOCKS,
    ROPE,
    Entry,
    autoencoder,
    calling,
    euler,
    guided,
    model,
    normal,
    Safe,
    Shrink,
    pil,
    picture,
    pipeline,
    square,
    text,
)

# --- Flux and its kin: packed tokens --------------------------------------------------------------

FLUX = dict(
    **BLOCKS, patch_size=1, in_channels=16, num_single_layers=2, joint_attention_dim=32,
    axes_dims_rope=ROPE,
)


def flux(name="FluxPipeline", negative=False, channels=None, vae=None, guidance=True, **inputs):
    transformer = model(
        "FluxTransformer2DModel",
        **{**FLUX, "in_channels": channels or 16, "out_channels": 16},
        pooled_projection_dim=32,
        guidance_embeds=guidance,
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


def flux_with_vae(name, channels=None, **inputs):
    return flux(name, channels=channels, vae=autoencoder(channels=4), **inputs)


def kontext():
    inputs = dict(image=picture(64, 96), _auto_resize=False, max_area=128 * 128)
    return flux_with_vae("FluxKontextPipeline", **inputs)


def flux_fill():
    inputs = dict(image=picture(128, 128), mask_image=picture(128, 128)[:, :1].round())
    return flux_with_vae("FluxFillPipeline", channels=16 + 16 + 256, **inputs)


def flux_control():
    return flux_with_vae("FluxControlPipeline", channels=32, control_image=picture(128, 128))


def flux_img2img():
    image = picture(128, 128)
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
    vae = flux2_vae()
    pipe = pipeline(name, transformer=transformer, vae=vae)
    return calling(pipe, **prompt, **square(), **inputs)


def chroma():
    transformer = model(
        "ChromaTransformer2DModel", **FLUX, approximator_num_channels=8,
        approximator_hidden_dim=16, approximator_layers=1,
    )
    prompt = guided(masks="attention_mask", dtype=torch.float32)
    pipe = pipeline("ChromaPipeline", transformer=transformer)
    return calling(pipe, **prompt, **square(), guidance_scale=3.0)



# --- Qwen and other packed ones -------------------------------------------------------------------

QWEN = dict(
    **BLOCKS, patch_size=2, in_channels=16, out_channels=4, joint_attention_dim=32,
    axes_dims_rope=ROPE,
)


def qwen(name="QwenImagePipeline", vae=None, **inputs):
    transformer = model("QwenImageTransformer2DModel", **QWEN)
    prompt = guided(masks="embeds_mask") | dict(true_cfg_scale=3.0)
    return calling(pipeline(name, transformer=transformer, vae=vae), **prompt, **{**square(), **inputs})


def qwen_edit(name="QwenImageEditPipeline"):
    """An edit whose picture of a mega-pixel becomes 8 x 8 tokens, as its autoencoder shrinks."""
    return qwen(name, vae=Shrink(4, 64), image=pil(), **square(1024))


def qwen21():
    transformer = model(
        "QwenImage21Transformer2DModel", **BLOCKS, in_channels=4, out_channels=4,
        context_in_dim=32, axes_dims_rope=ROPE,
    )
    processor = mock.MagicMock()
    parts = dict(transformer=transformer, vae=Shrink(4, 16), processor=processor)
    pipe = pipeline("QwenImage21Pipeline", **parts)
    prompt = guided(masks="embeds_mask") | dict(true_cfg_scale=3.0)
    return calling(pipe, **prompt, **square())


def krea2():
    transformer = model(
        "Krea2Transformer2DModel", **BLOCKS, in_channels=16, num_key_value_heads=1,
        intermediate_size=64, timestep_embed_dim=32, text_hidden_dim=32, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=64,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=ROPE,
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


def hidream():
    transformer = model(
        "HiDreamImageTransformer2DModel", **BLOCKS, patch_size=2, in_channels=4,
        num_single_layers=1, caption_channels=[32, 32], text_emb_dim=32, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=ROPE, max_resolution=(16, 16),
        llama_layers=[0, 1],
    )
    pipe = pipeline("HiDreamImagePipeline", transformer=transformer)
    pipe.default_sample_size = 16
    prompt = guided(names=("prompt_embeds_t5", "negative_prompt_embeds_t5"))
    prompt |= dict(
        prompt_embeds_llama3=normal(2, 1, 8, 32, seed=3),
        negative_prompt_embeds_llama3=normal(2, 1, 8, 32, seed=4),
        pooled_prompt_embeds=normal(1, 32, seed=5),
        negative_pooled_prompt_embeds=normal(1, 32, seed=6),
    )
    return calling(pipe, **prompt, **square(), guidance_scale=3.0)


def ideogram4():
    config = dict(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        intermediate_size=64, adaln_dim=16, llm_features_dim=32, mrope_section=(4, 2, 2),
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
        "NucleusMoEImageTransformer2DModel", **BLOCKS, patch_size=2, in_channels=16,
        out_channels=4, joint_attention_dim=32, axes_dims_rope=ROPE, num_experts=4, mlp_ratio=6.0,
        moe_intermediate_dim=32, capacity_factors=2.0,
        dense_moe_strategy="leave_first_block_dense",
    )
    pipe = pipeline("NucleusMoEImagePipeline", transformer=transformer)
    return calling(pipe, **guided(masks="embeds_mask"), **square(), guidance_scale=3.0)

# --- with patches made inside ---------------------------------------------------------------------

def z_image(**inputs):
    transformer = model(
        "ZImageTransformer2DModel", in_channels=4, dim=32, n_layers=2, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2, cap_feat_dim=32, axes_dims=list(ROPE), axes_lens=[128, 64, 64],
    )
    pipe = pipeline("ZImagePipeline", transformer=transformer)
    prompt = {k: [v[0]] for k, v in guided(11).items()}
    return calling(pipe, **prompt, **square(), guidance_scale=3.0, **inputs)


def cogview4():
    transformer = model(
        "CogView4Transformer2DModel", **BLOCKS, patch_size=2, in_channels=4, out_channels=4,
        text_embed_dim=32, time_embed_dim=16, condition_dim=8, rope_axes_dim=(8, 8),
        pos_embed_max_size=16, sample_size=16,
    )
    pipe = pipeline("CogView4Pipeline", transformer=transformer)
    return calling(pipe, **guided(16), **square(), guidance_scale=3.0)


def cogview3():
    transformer = model(
        "CogView3PlusTransformer2DModel", **BLOCKS, patch_size=2, in_channels=4, out_channels=4,
        text_embed_dim=32, time_embed_dim=16, condition_dim=8, pos_embed_max_size=16,
        sample_size=16,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler()
    pipe = pipeline("CogView3PlusPipeline", transformer=transformer, scheduler=scheduler)
    return calling(pipe, **guided(16), **square(), guidance_scale=3.0)


def pixart(name="PixArtSigmaPipeline", scheduler=None, **inputs):
    transformer = model(
        "PixArtTransformer2DModel", **BLOCKS, in_channels=4, out_channels=8, sample_size=16,
        cross_attention_dim=32, caption_channels=32, num_embeds_ada_norm=1000,
        use_additional_conditions=False,
    )
    scheduler = scheduler or diffusers.DDIMScheduler(clip_sample=False)
    pipe = pipeline(name, transformer=transformer, scheduler=scheduler)
    prompt = guided(masks="attention_mask") | dict(negative_prompt=None)
    return calling(pipe, **prompt, **square(), use_resolution_binning=False, **inputs)


SANA = dict(
    **BLOCKS, in_channels=4, out_channels=4, sample_size=16, num_cross_attention_heads=2,
    cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=32,
)


def sana():
    pipe = pipeline("SanaPipeline", transformer=model("SanaTransformer2DModel", **SANA))
    prompt = guided(masks="attention_mask") | dict(negative_prompt=None)
    return calling(pipe, **prompt, **square(512), use_resolution_binning=False)


def sana_sprint():
    transformer = model("SanaTransformer2DModel", **SANA, guidance_embeds=True)
    pipe = pipeline(
        "SanaSprintPipeline", transformer=transformer, scheduler=diffusers.SCMScheduler()
    )
    prompt = dict(prompt_embeds=text(), prompt_attention_mask=torch.ones(1, 8, dtype=torch.long))
    return calling(
        pipe, **prompt, **square(512), use_resolution_binning=False, intermediate_timesteps=None
    )


def aura_flow():
    transformer = model(
        "AuraFlowTransformer2DModel", sample_size=16, patch_size=2, in_channels=4,
        num_mmdit_layers=1, num_single_dit_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32, out_channels=4,
        pos_embed_max_size=64,
    )
    pipe = pipeline("AuraFlowPipeline", transformer=transformer)
    return calling(pipe, **guided(masks="attention_mask"), **square(), guidance_scale=3.0)


def lumina2(**inputs):
    transformer = model(
        "Lumina2Transformer2DModel", sample_size=16, patch_size=2, in_channels=4, hidden_size=32,
        num_layers=2, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
        multiple_of=16, axes_dim_rope=ROPE, axes_lens=(64, 64, 64), cap_feat_dim=32,
    )
    pipe = pipeline("Lumina2Pipeline", transformer=transformer)
    prompt = guided(masks="attention_mask")
    return calling(pipe, **prompt, **square(), guidance_scale=3.0, **inputs)


def lumina():
    pipe = tested.lumina()
    return calling(pipe, **tested.lumina_inputs(pipe), guidance_scale=3.0)


def sd3():
    pipe = tested.sd3()
    return calling(pipe, **tested.sd3_inputs(pipe), guidance_scale=3.0)


def hunyuan_dit(prediction="v_prediction"):
    transformer = model(
        "HunyuanDiT2DModel", **BLOCKS, sample_size=16, patch_size=2, in_channels=4,
        hidden_size=32, cross_attention_dim=32, cross_attention_dim_t5=32,
        pooled_projection_dim=16, text_len=8, text_len_t5=8,
        use_style_cond_and_image_meta_size=False,
    )
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction, clip_sample=False)
    pipe = pipeline("HunyuanDiTPipeline", transformer=transformer, scheduler=scheduler)
    ones = torch.ones(1, 8, dtype=torch.long)
    prompt = {}
    for i, start in enumerate(("", "negative_")):
        for j, end in enumerate(("", "_2")):
            prompt[f"{start}prompt_embeds{end}"] = text(seed=2 * i + j)
            prompt[f"{start}prompt_attention_mask{end}"] = ones
    return calling(pipe, **prompt, **square(), use_resolution_binning=False)


def omnigen():
    transformer = model(
        "OmniGenTransformer2DModel", in_channels=4, patch_size=2, hidden_size=32,
        num_attention_heads=2, num_key_value_heads=2, intermediate_size=64, num_layers=2,
        pad_token_id=0, vocab_size=64, pos_embed_max_size=16, time_step_dim=32,
        max_position_embeddings=1000, rope_scaling=dict(long_factor=[1]*8, short_factor=[1]*8),
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
        "CosmosTransformer3DModel", **BLOCKS, in_channels=4, out_channels=4, mlp_ratio=2,
        text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2),
        concat_padding_mask=False, extra_pos_embed_type=None,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    parts = dict(transformer=transformer, safety_checker=Safe(), scheduler=scheduler)
    pipe = pipeline("Cosmos2TextToImagePipeline", **parts)
    return calling(pipe, **guided(), **square(), guidance_scale=3.0)


def glm_image(image=None):
    transformer = model(
        "GlmImageTransformer2DModel", **BLOCKS, patch_size=2, in_channels=4, out_channels=4,
        text_embed_dim=32, time_embed_dim=16, condition_dim=8,
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
        "ErnieImageTransformer2DModel", hidden_size=32, num_attention_heads=2, num_layers=2,
        ffn_hidden_size=64, in_channels=16, out_channels=16, text_in_dim=32,
        rope_axes_dim=ROPE,
    )
    pipe = pipeline("ErnieImagePipeline", transformer=transformer)
    prompt = {k: [v[0]] for k, v in guided(11).items()}
    return calling(pipe, **prompt, **square(), guidance_scale=3.0)


def dit():
    transformer = model(
        "DiTTransformer2DModel", **BLOCKS, sample_size=16, in_channels=4, out_channels=8,
        num_embeds_ada_norm=1000,
    )
    vae = autoencoder(channels=4)
    pipe = pipeline("DiTPipeline", transformer=transformer, vae=vae, scheduler=diffusers.DDIMScheduler(clip_sample=False))
    return calling(pipe, lambda out: torch.from_numpy(out[0]), class_labels=[3], output_type="np")


def prx():
    transformer = model(
        "PRXTransformer2DModel", in_channels=4, patch_size=2, context_in_dim=32, hidden_size=32,
        mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[8, 8],
    )
    pipe = pipeline("PRXPipeline", transformer=transformer)
    return calling(pipe, **guided(masks="attention_mask"), **square(), use_resolution_binning=False)


def hunyuan_image():
    transformer = model(
        "HunyuanImageTransformer2DModel", **BLOCKS, in_channels=4, out_channels=4,
        num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=32,
        text_embed_2_dim=32, rope_axes_dim=(8, 8),
    )
    pipe = pipeline(
        "HunyuanImagePipeline",
        transformer=transformer,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    )
    second = guided(masks="embeds_mask", names=("prompt_embeds_2", "negative_prompt_embeds_2"))
    second = {k if k.endswith("2") else f"{k}_2": v for k, v in second.items()}
    return calling(pipe, **guided(masks="embeds_mask"), **second, **square(256))


IMAGES = {
    "flux": Entry(flux),
    "flux-true-cfg": Entry(partial(flux, negative=True), calls=2),
    "flux-kontext": Entry(kontext),
    "flux-fill": Entry(flux_fill),
    "flux-control": Entry(flux_control),
    "flux-img2img": Entry(flux_img2img, total=lambda n: n // 2, steps=lambda n: n // 2),
    "flux2": Entry(flux2),
    "flux2-klein": Entry(partial(flux2, "Flux2KleinPipeline", False, True), calls=2),
    "flux2-klein-kv": Entry(partial(flux2, "Flux2KleinKVPipeline", False, image=[pil()])),
    "chroma": Entry(chroma, calls=2),
    "qwen": Entry(qwen, calls=2),
    "qwen-edit": Entry(qwen_edit, calls=2),
    "qwen-edit-plus": Entry(partial(qwen_edit, "QwenImageEditPlusPipeline"), calls=2),
    "qwen21": Entry(qwen21, calls=2),
    "krea2": Entry(krea2, calls=2),
    "ovis": Entry(ovis, calls=2),
    "longcat": Entry(longcat, calls=2),
    "bria": Entry(bria),
    "hidream": Entry(hidream),
    "ideogram4": Entry(ideogram4, calls=2, transformers=("transformer", "unconditional_transformer")),
    "nucleus": Entry(nucleus, calls=2),
    "z-image": Entry(z_image),
    "z-image-truncated": Entry(partial(z_image, cfg_truncation=0.5)),
    "cogview4": Entry(cogview4, calls=2),
    "cogview3": Entry(cogview3),
    "pixart-alpha": Entry(partial(pixart, "PixArtAlphaPipeline")),
    "pixart-sigma": Entry(pixart),
    "pixart-dpm": Entry(lambda: pixart(scheduler=diffusers.DPMSolverMultistepScheduler())),
    "sana": Entry(sana),
    "sana-sprint": Entry(sana_sprint),
    "aura-flow": Entry(aura_flow),
    "lumina2": Entry(lumina2, calls=2),
    "lumina2-truncated": Entry(partial(lumina2, cfg_trunc_ratio=0.5), total=lambda n: n + n // 2),
    "lumina": Entry(lumina),
    "sd3": Entry(sd3),
    "hunyuan-dit": Entry(hunyuan_dit),
    "hunyuan-dit-epsilon": Entry(partial(hunyuan_dit, "epsilon")),
    "omnigen": Entry(omnigen),
    "cosmos2": Entry(cosmos2, calls=2),
    "glm": Entry(glm_image, calls=2),
    "glm-edit": Entry(lambda: glm_image(pil()), calls=2, before=1),
    "ernie": Entry(ernie),
    "dit": Entry(dit),
    "prx": Entry(prx),
    "hunyuan-image": Entry(hunyuan_image, calls=2),
}
