"""Pipelines of videos and of sound in the zoo, and those that are to be refused."""

from functools import partial
from types import SimpleNamespace

import diffusers
import torch

from support.zoo_parts import (
    BLOCKS,
    ROPE,
    Entry,
    Safe,
    Shrink,
    autoencoder,
    calling,
    euler,
    guided,
    model,
    normal,
    pil,
    pipeline,
    square,
    text,
)

CHANNELS = dict(in_channels=4, out_channels=4)
FRAMES = dict(num_frames=9, **square(64))  # 3 frames of 8 x 8 latent pixels, mostly

# --- Wan and its kin ------------------------------------------------------------------------------

WAN = dict(
    num_attention_heads=2, attention_head_dim=16, num_layers=2, patch_size=(1, 2, 2),
    text_dim=32, freq_dim=32, ffn_dim=64, rope_max_seq_len=64,
)


def wan(name="WanPipeline", two=False, channels=4, vae=None, **more):
    config = dict(WAN, in_channels=channels, out_channels=4)
    parts = dict(transformer=model("WanTransformer3DModel", **config), vae=vae)
    if two:
        parts["transformer_2"] = model("WanTransformer3DModel", seed=1, **config)
        parts["boundary_ratio"] = 0.8
    if more.pop("per_token", False):
        parts["expand_timesteps"] = True
    pipe = pipeline(name, **parts)
    return calling(pipe, **guided(), **FRAMES, guidance_scale=3.0, **more)


def wan_image(**more):
    vae = Shrink(4, 8, scale_factor_temporal=4, scale_factor_spatial=8)
    pipe, call = wan("WanImageToVideoPipeline", vae=vae, image=pil(), **more)
    return pipe, call


def sky_reels(**inputs):
    transformer = model("SkyReelsV2Transformer3DModel", **WAN, **CHANNELS)
    pipe = pipeline(
        "SkyReelsV2DiffusionForcingPipeline",
        transformer=transformer,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    return calling(pipe, prompt=None, **guided(), **FRAMES, guidance_scale=3.0, **inputs)


def sky_reels_plain():
    transformer = model("SkyReelsV2Transformer3DModel", **WAN, **CHANNELS)
    pipe = pipeline(
        "SkyReelsV2Pipeline",
        transformer=transformer,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    return calling(pipe, **guided(), **FRAMES, guidance_scale=3.0)


def helios():
    transformer = model(
        "HeliosTransformer3DModel", **{**WAN, "rope_max_seq_len": None} , **CHANNELS, rope_dim=(4, 6, 6),
    )
    pipe = pipeline(
        "HeliosPipeline",
        transformer=transformer,
        vae=Shrink(4, 8, scale_factor_temporal=4, scale_factor_spatial=8),
        scheduler=diffusers.HeliosScheduler(stages=1, stage_range=[0, 1], stage_gamma=1 / 3),
    )
    return calling(
        pipe, **guided(), **square(64), num_frames=33, guidance_scale=3.0,
        num_latent_frames_per_chunk=3, history_sizes=[4, 2, 1],
    )


# --- HunyuanVideo, LTX, CogVideoX and others ------------------------------------------------------


def hunyuan_video():
    transformer = model(
        "HunyuanVideoTransformer3DModel", **BLOCKS, **CHANNELS, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=32, pooled_projection_dim=16, rope_axes_dim=ROPE,
    )
    pipe = pipeline("HunyuanVideoPipeline", transformer=transformer)
    prompt = dict(
        prompt_embeds=text(),
        pooled_prompt_embeds=normal(1, 16, seed=2),
        prompt_attention_mask=torch.ones(1, 8, dtype=torch.long),
    )
    return calling(pipe, **prompt, **FRAMES)


def hunyuan_video15():
    transformer = model(
        "HunyuanVideo15Transformer3DModel", **BLOCKS, in_channels=9, out_channels=4,
        num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=32, text_embed_2_dim=32,
        image_embed_dim=32, rope_axes_dim=ROPE, target_size=16, task_type="t2v",
    )
    pipe = pipeline(
        "HunyuanVideo15Pipeline",
        transformer=transformer,
        vae=Shrink(4, 8),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    )
    second = guided(masks="embeds_mask", names=("prompt_embeds_2", "negative_prompt_embeds_2"))
    second = {k if k.endswith("2") else f"{k}_2": v for k, v in second.items()}
    return calling(pipe, **guided(masks="embeds_mask"), **second, **FRAMES)


def ltx():
    transformer = model(
        "LTXVideoTransformer3DModel", **BLOCKS, **CHANNELS, cross_attention_dim=32,
        caption_channels=32,
    )
    pipe = pipeline("LTXPipeline", transformer=transformer)
    prompt = guided(masks="attention_mask")
    return calling(pipe, **prompt, **square(256), num_frames=17, guidance_scale=3.0)


class Connectors(torch.nn.Module):
    """What gives LTX2's transformer its text: here the text as it is."""

    def forward(self, embeds, mask, padding_side):
        return embeds, embeds, mask


def ltx2(**guidance):
    transformer = model(
        "LTX2VideoTransformer3DModel", **CHANNELS, **BLOCKS, cross_attention_dim=32,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_attention_head_dim=8, audio_cross_attention_dim=16, caption_channels=32,
    )
    statistics = dict(latents_mean=torch.zeros(4), latents_std=torch.ones(4))
    vae = Shrink(4, 32, scaling_factor=1.0, **statistics)
    audio = Shrink(2, 4, mel_bins=8, sample_rate=16000, mel_hop_length=160)
    pipe = pipeline(
        "LTX2Pipeline",
        transformer=transformer,
        vae=vae,
        audio_vae=audio,
        connectors=Connectors(),
    )
    prompt = guided(masks="attention_mask")
    return calling(pipe, tuple, **prompt, **square(256), num_frames=17, **guidance)


def cogvideox(name="CogVideoXPipeline"):
    transformer = model(
        "CogVideoXTransformer3DModel", **BLOCKS, **CHANNELS, time_embed_dim=8, text_embed_dim=32,
        sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=8,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    pipe = pipeline(name, transformer=transformer, scheduler=scheduler)
    return calling(pipe, **guided(), **FRAMES, guidance_scale=3.0)


def latte():
    transformer = model(
        "LatteTransformer3DModel", **BLOCKS, in_channels=4, out_channels=8, sample_size=8,
        patch_size=2, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False,
        norm_eps=1e-6, cross_attention_dim=32, caption_channels=32, video_length=2,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = pipeline("LattePipeline", transformer=transformer, scheduler=scheduler)
    return calling(pipe, **guided(), **square(64), video_length=2, negative_prompt=None)


def allegro():
    transformer = model(
        "AllegroTransformer3DModel", **BLOCKS, **CHANNELS, cross_attention_dim=32,
        caption_channels=32, sample_width=8, sample_height=8, sample_frames=3,
    )
    pipe = pipeline("AllegroPipeline", transformer=transformer)
    prompt = guided(masks="attention_mask") | dict(negative_prompt=None)
    return calling(pipe, **prompt, **square(64), num_frames=12)


def mochi():
    transformer = model(
        "MochiTransformer3DModel", **BLOCKS, patch_size=2, pooled_projection_dim=32,
        in_channels=12, text_embed_dim=32, time_embed_dim=4, activation_fn="swiglu",
        max_sequence_length=8,
    )
    pipe = pipeline("MochiPipeline", transformer=transformer)
    prompt = guided(masks="attention_mask", dtype=torch.bool)
    return calling(pipe, **prompt, **square(64), num_frames=13, guidance_scale=3.0)


def kandinsky5():
    transformer = model(
        "Kandinsky5Transformer3DModel", in_visual_dim=4, out_visual_dim=4, in_text_dim=32,
        in_text_dim2=16, time_dim=32, model_dim=32, ff_dim=64, num_text_blocks=1,
        num_visual_blocks=2, axes_dims=ROPE,
    )
    pipe = pipeline("Kandinsky5T2VPipeline", transformer=transformer)
    prompt = guided(names=("prompt_embeds_qwen", "negative_prompt_embeds_qwen"))
    for i, start in enumerate(("", "negative_")):
        prompt[f"{start}prompt_embeds_clip"] = normal(1, 16, seed=3 + i)
        prompt[f"{start}prompt_cu_seqlens"] = torch.tensor([0, 8])
    return calling(pipe, **prompt, **FRAMES, guidance_scale=3.0)


def cosmos():
    transformer = model(
        "CosmosTransformer3DModel", **BLOCKS, **CHANNELS, mlp_ratio=2, text_embed_dim=32,
        adaln_lora_dim=4, max_size=(4, 32, 32), concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    )
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras",
        prediction_type="epsilon", rho=7.0, final_sigmas_type="sigma_min",
    )
    parts = dict(transformer=transformer, scheduler=scheduler, safety_checker=Safe())
    pipe = pipeline("CosmosTextToWorldPipeline", **parts)
    return calling(pipe, **guided(), **FRAMES, guidance_scale=3.0)


def sana_video():
    transformer = model(
        "SanaVideoTransformer3DModel", **BLOCKS, **CHANNELS, num_cross_attention_heads=2,
        cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=32,
        rope_max_seq_len=32, sample_size=8,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = pipeline("SanaVideoPipeline", transformer=transformer, scheduler=scheduler)
    prompt = guided(masks="attention_mask") | dict(negative_prompt=None)
    return calling(pipe, **prompt, **square(64), frames=9, use_resolution_binning=False)


def easy_animate():
    transformer = model(
        "EasyAnimateTransformer3DModel", **BLOCKS, **CHANNELS, patch_size=2, sample_width=8,
        sample_height=8, mmdit_layers=2, time_embed_dim=8, text_embed_dim=32,
    )
    pipe = pipeline("EasyAnimatePipeline", transformer=transformer)
    prompt = guided(masks="attention_mask")
    return calling(pipe, **prompt, **FRAMES, guidance_scale=3.0)


def motif():
    transformer = model(
        "MotifVideoTransformer3DModel", **BLOCKS, in_channels=9, out_channels=4,
        num_single_layers=1, mlp_ratio=2.0, text_embed_dim=32, rope_axes_dim=ROPE,
    )
    pipe = pipeline(
        "MotifVideoPipeline",
        transformer=transformer,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    )
    return calling(pipe, **guided(masks="attention_mask"), **FRAMES)


def any_flow():
    transformer = model("AnyFlowTransformer3DModel", **WAN, **CHANNELS)
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=3.0)
    pipe = pipeline("AnyFlowPipeline", transformer=transformer, scheduler=scheduler)
    return calling(pipe, **guided(), **FRAMES, guidance_scale=3.0)


# --- sound ----------------------------------------------------------------------------------------


def stable_audio():
    transformer = model(
        "StableAudioDiTModel", **BLOCKS, **CHANNELS, sample_size=32, num_key_value_attention_heads=1,
        cross_attention_dim=32, time_proj_dim=16, global_states_input_dim=64,
        cross_attention_input_dim=32,
    )
    pipe = pipeline(
        "StableAudioPipeline",
        transformer=transformer,
        vae=SimpleAudio(),
        projection_model=model(
            "StableAudioProjectionModel", text_encoder_dim=32, conditioning_dim=32, min_value=0, max_value=32
        ),
        scheduler=diffusers.CosineDPMSolverMultistepScheduler(solver_order=2),
    )
    prompt = dict(guided(), attention_mask=torch.ones(1, 8, dtype=torch.long), negative_attention_mask=torch.ones(1, 8, dtype=torch.long))
    return calling(pipe, **prompt, guidance_scale=3.0)


class SimpleAudio:
    hop_length = 4
    downsampling_ratio = 4
    config = SimpleNamespace(sampling_rate=16, audio_channels=2, latent_dim=4, downsampling_ratio=4, sample_rate=16)


def stable_audio3():
    transformer = model(
        "StableAudio3DiTModel", io_channels=4, embed_dim=32, depth=2, num_heads=2, cond_token_dim=32,
        global_cond_dim=32, local_add_cond_dim=5, timestep_features_dim=16, num_memory_tokens=4,
    )
    pipe = pipeline(
        "StableAudio3Pipeline", transformer=transformer, vae=SimpleAudio(),
    )
    pipe.encode_duration = lambda *_: normal(1, 32, seed=5)
    return calling(pipe, prompt_embeds=text(), encoder_attention_mask=torch.ones(1, 8, dtype=torch.long), duration=10.0)


def longcat_audio():
    transformer = model(
        "LongCatAudioDiTTransformer", dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=32,
        latent_dim=4,
    )
    pipe = pipeline(
        "LongCatAudioDiTPipeline", transformer=transformer, vae=SimpleAudio(), scheduler=euler(invert_sigmas=True),
    )
    pipe.encode_prompt = lambda prompts, device: (text(seed=len(prompts[0])), torch.tensor([8]))
    return calling(pipe, prompt="cat", audio_duration_s=10)


def ace_step():
    transformer = model(
        "AceStepTransformer1DModel", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, in_channels=24,
        audio_acoustic_hidden_dim=8, patch_size=2, sliding_window=8,
    )
    pipe = pipeline("AceStepPipeline", transformer=transformer)
    return calling(pipe, prompt="cat", audio_duration=2.0)


OTHERS = {
    "wan": Entry(wan, calls=2, modality="video"),
    "wan22": Entry(partial(wan, two=True), calls=2, transformers=("transformer", "transformer_2"), modality="video"),
    "wan-per-token": Entry(partial(wan, per_token=True), calls=2, modality="video"),
    "wan-image": Entry(partial(wan_image, channels=12), calls=2, modality="video"),
    "wan-image-per-token": Entry(partial(wan_image, per_token=True), calls=2, modality="video"),
    "sky-reels": Entry(sky_reels_plain, calls=2, modality="video"),
    "sky-reels-forcing": Entry(sky_reels, calls=2, steps=lambda n: 0, modality="video"),
    "helios": Entry(helios, total=lambda n: 4 * n, steps=lambda n: 2 * n, modality="video"),
    "hunyuan-video": Entry(hunyuan_video, modality="video"),
    "hunyuan-video15": Entry(hunyuan_video15, calls=2, modality="video"),
    "ltx": Entry(ltx, modality="video"),
    "ltx2": Entry(partial(ltx2, stg_scale=0.0, audio_stg_scale=0.0, modality_scale=1.0, audio_modality_scale=1.0), modality="video"),
    "ltx2-three-calls": Entry(partial(ltx2, spatio_temporal_guidance_blocks=[1]), calls=3, modality="video"),
    "cogvideox": Entry(cogvideox, modality="video"),
    "latte": Entry(latte, modality="video"),
    "allegro": Entry(allegro, modality="video"),
    "mochi": Entry(mochi, modality="video"),
    "kandinsky5": Entry(kandinsky5, calls=2, modality="video"),
    "cosmos": Entry(cosmos, calls=2, steps=lambda n: 2 * n, modality="video"),
    "sana-video": Entry(sana_video, modality="video"),
    "easy-animate": Entry(easy_animate, modality="video"),
    "motif": Entry(motif, calls=2, modality="video"),
    "any-flow": Entry(any_flow, modality="video"),
    "stable-audio": Entry(stable_audio, modality="audio"),
    "stable-audio3": Entry(stable_audio3, modality="audio"),
    "longcat-audio": Entry(longcat_audio, calls=2, modality="audio"),
    "ace-step": Entry(ace_step, modality="audio"),
}
