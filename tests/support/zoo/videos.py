"""Pipelines of videos."""

from functools import partial

import diffusers
import torch

from support.pipelines import normal
from support.zoo.parts import (
    BLOCKS,
    CHANNELS,
    ROPE,
    Entry,
    Part,
    Safe,
    Shrink,
    calling,
    ddim,
    flow,
    guided,
    mask,
    model,
    oblong,
    pil,
    pipeline,
    square,
    text,
)

FRAMES = dict(num_frames=9, **oblong(64))  # 3 frames of 8 x 12 latent pixels, mostly

WAN = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    num_layers=2,
    patch_size=(1, 2, 2),
    text_dim=32,
    freq_dim=32,
    ffn_dim=64,
    rope_max_seq_len=64,
)


def wan(name="WanPipeline", channels=4, two=False, parts=None, **inputs):
    """A Wan; `two` have a transformer for high noise and one for low."""
    config = dict(WAN, in_channels=channels, out_channels=4)
    parts = {"transformer": model("WanTransformer3DModel", **config), **(parts or {})}
    if two:
        parts["transformer_2"] = model("WanTransformer3DModel", seed=1, **config)
        parts["boundary_ratio"] = 0.8
    pipe = pipeline(name, **parts)
    return calling(pipe, **{**guided(), **FRAMES, "guidance_scale": 3.0, **inputs})


def wan_image(channels, **parts):
    parts["vae"] = Shrink(4, 8)
    return wan("WanImageToVideoPipeline", channels, parts=parts, image=pil())


def wan_vace(**inputs):
    """A block in two has another beside it, which sees pictures to go by."""
    config = dict(WAN, **CHANNELS, vace_layers=[0], vace_in_channels=4 + 4 + 64)
    transformer = model("WanVACETransformer3DModel", **config)
    vae = Shrink(4, 8, temperal_downsample=[False, True, True])
    pipe = pipeline("WanVACEPipeline", transformer=transformer, vae=vae)
    return calling(pipe, **guided(), **FRAMES, guidance_scale=3.0, **inputs)


def sky_reels(name, **inputs):
    transformer = model("SkyReelsV2Transformer3DModel", **WAN, **CHANNELS)
    scheduler = flow("UniPCMultistepScheduler")
    pipe = pipeline(name, transformer=transformer, scheduler=scheduler)
    return calling(pipe, **guided(), **FRAMES, guidance_scale=3.0, prompt=None, **inputs)


def helios():
    """Two chunks of 9 frames each, one after the other."""
    config = {k: v for k, v in WAN.items() if k != "rope_max_seq_len"}
    transformer = model("HeliosTransformer3DModel", **config, **CHANNELS, rope_dim=ROPE)
    scheduler = diffusers.HeliosScheduler(stages=1, stage_range=[0, 1])
    parts = dict(transformer=transformer, scheduler=scheduler, vae=Shrink(4, 8))
    inputs = dict(num_frames=18, num_latent_frames_per_chunk=3, history_sizes=[4, 2, 1])
    pipe = pipeline("HeliosPipeline", **parts)
    return calling(pipe, **guided(), **square(64), **inputs, guidance_scale=3.0)


def hunyuan_video(*lengths):
    """Of prompts of these lengths, or of one that is as long as may be."""
    transformer = model(
        "HunyuanVideoTransformer3DModel",
        **BLOCKS,
        **CHANNELS,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=32,
        pooled_projection_dim=16,
        rope_axes_dim=ROPE,
    )
    pipe = pipeline("HunyuanVideoPipeline", transformer=transformer)
    lengths = lengths or (8,)
    prompt = dict(
        prompt_embeds=text(batch=len(lengths)),
        pooled_prompt_embeds=normal(len(lengths), 16, seed=2),
        prompt_attention_mask=mask(lengths),
    )
    return calling(pipe, **prompt, **FRAMES)


def hunyuan_video15():
    transformer = model(
        "HunyuanVideo15Transformer3DModel",
        **BLOCKS,
        in_channels=9,
        out_channels=4,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=32,
        text_embed_2_dim=32,
        image_embed_dim=32,
        rope_axes_dim=ROPE,
        target_size=16,
        task_type="t2v",
    )
    pipe = pipeline(
        "HunyuanVideo15Pipeline",
        transformer=transformer,
        vae=Shrink(4, 8),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    )
    return calling(pipe, **hunyuan_video15_prompt(8), **FRAMES)


def hunyuan_video15_prompt(*lengths):
    prompt = guided(masks="embeds_mask", lengths=lengths)
    return prompt | guided(name="embeds_2", masks="embeds_mask_2", seed=3, lengths=lengths)


def ltx(name="LTXPipeline", **inputs):
    transformer = model(
        "LTXVideoTransformer3DModel",
        **BLOCKS,
        **CHANNELS,
        cross_attention_dim=32,
        caption_channels=32,
    )
    statistics = dict(latents_mean=torch.zeros(4), latents_std=torch.ones(4))
    vae = Shrink(4, 32, scale_factor_temporal=8, **statistics)
    pipe = pipeline(name, transformer=transformer, vae=vae)
    inputs = {**guided(masks="attention_mask"), **square(256), **inputs}
    return calling(pipe, **inputs, num_frames=17, guidance_scale=3.0)


def ltx_padded():
    prompts = guided(masks="attention_mask", lengths=(8, 5))
    return ltx(**prompts, **oblong(256))


class Connectors(Part):
    """What gives LTX2's transformer its text: here the text as it is."""

    def forward(self, embeds, mask, padding_side):
        return embeds, embeds, mask


def ltx2(**guidance):
    """Gives the latents of the video and those of its sound."""
    transformer = model(
        "LTX2VideoTransformer3DModel",
        **CHANNELS,
        **BLOCKS,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        caption_channels=32,
    )
    statistics = dict(latents_mean=torch.zeros(4), latents_std=torch.ones(4))
    vae = Shrink(4, 32, scale_factor_temporal=8, scaling_factor=1.0, **statistics)
    mels = dict(mel_bins=8, mel_compression_ratio=4, sample_rate=16000, mel_hop_length=160)
    audio = Shrink(2, 4, **mels, **statistics)
    parts = dict(transformer=transformer, vae=vae, audio_vae=audio, connectors=Connectors())
    pipe = pipeline("LTX2Pipeline", **parts)
    inputs = {**guided(masks="attention_mask"), **oblong(256), **guidance}
    return calling(pipe, lambda out: out.to_tuple(), **inputs, num_frames=17)


COGVIDEOX = dict(
    **BLOCKS,
    out_channels=4,
    time_embed_dim=8,
    text_embed_dim=32,
    sample_width=8,
    sample_height=8,
    sample_frames=9,
    max_text_seq_length=8,
)


def cogvideox(name="CogVideoXPipeline", channels=4, vae=None, **inputs):
    """A CogVideoX; as with those of diffusers, one for pictures has rotary embeddings."""
    rotary = dict(use_rotary_positional_embeddings=inputs.pop("rotary", False))
    transformer = model("CogVideoXTransformer3DModel", **COGVIDEOX, **rotary, in_channels=channels)
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    pipe = pipeline(name, transformer=transformer, scheduler=scheduler, vae=vae)
    return calling(pipe, **guided(), **FRAMES, guidance_scale=3.0, **inputs)


def cogvideox_image():
    """The picture's channels are beside those of the first frame."""
    vae = Shrink(4, 8, scaling_factor=1.0, invert_scale_latents=False)
    return cogvideox("CogVideoXImageToVideoPipeline", 8, vae, rotary=True, image=pil())


def latte():
    transformer = model(
        "LatteTransformer3DModel",
        **BLOCKS,
        in_channels=4,
        out_channels=8,
        sample_size=8,
        patch_size=2,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        cross_attention_dim=32,
        caption_channels=32,
        video_length=2,
    )
    pipe = pipeline("LattePipeline", transformer=transformer, scheduler=ddim())
    return calling(pipe, **guided(), **square(64), video_length=2, negative_prompt=None)


def allegro():
    transformer = model(
        "AllegroTransformer3DModel",
        **{**BLOCKS, "attention_head_dim": 24},
        **CHANNELS,
        cross_attention_dim=48,
        caption_channels=32,
        sample_width=8,
        sample_height=8,
        sample_frames=3,
    )
    pipe = pipeline("AllegroPipeline", transformer=transformer, scheduler=ddim())
    prompt = guided(masks="attention_mask") | dict(negative_prompt=None)
    return calling(pipe, **prompt, **square(64), num_frames=12)


def mochi():
    transformer = model(
        "MochiTransformer3DModel",
        **BLOCKS,
        patch_size=2,
        pooled_projection_dim=32,
        in_channels=12,
        text_embed_dim=32,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=8,
    )
    pipe = pipeline("MochiPipeline", transformer=transformer)
    prompt = guided(masks="attention_mask", dtype=torch.bool)
    return calling(pipe, **prompt, **square(64), num_frames=13, guidance_scale=3.0)


def kandinsky5():
    transformer = model(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=32,
        in_text_dim2=16,
        time_dim=32,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=ROPE,
    )
    pipe = pipeline("Kandinsky5T2VPipeline", transformer=transformer)
    prompt = guided(name="embeds_qwen")
    for i, start in enumerate(("", "negative_")):
        prompt[f"{start}prompt_embeds_clip"] = normal(1, 16, seed=3 + i)
        prompt[f"{start}prompt_cu_seqlens"] = torch.tensor([0, 8])
    return calling(pipe, **prompt, **FRAMES, guidance_scale=3.0)


def cosmos():
    transformer = model(
        "CosmosTransformer3DModel",
        **BLOCKS,
        **CHANNELS,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    )
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002,
        sigma_max=80,
        sigma_data=0.5,
        sigma_schedule="karras",
        prediction_type="epsilon",
        rho=7.0,
        final_sigmas_type="sigma_min",
    )
    parts = dict(transformer=transformer, scheduler=scheduler, safety_checker=Safe())
    pipe = pipeline("CosmosTextToWorldPipeline", **parts)
    return calling(pipe, **guided(), **FRAMES, guidance_scale=3.0)


def sana_video():
    transformer = model(
        "SanaVideoTransformer3DModel",
        **BLOCKS,
        **CHANNELS,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        rope_max_seq_len=32,
        sample_size=8,
    )
    scheduler = flow("DPMSolverMultistepScheduler")
    pipe = pipeline("SanaVideoPipeline", transformer=transformer, scheduler=scheduler)
    prompt = guided(masks="attention_mask") | dict(negative_prompt=None)
    return calling(pipe, **prompt, **square(64), frames=9, use_resolution_binning=False)


def easy_animate():
    transformer = model(
        "EasyAnimateTransformer3DModel",
        **BLOCKS,
        **CHANNELS,
        patch_size=2,
        sample_width=8,
        sample_height=8,
        mmdit_layers=2,
        time_embed_dim=8,
        text_embed_dim=32,
    )
    pipe = pipeline("EasyAnimatePipeline", transformer=transformer, vae=Shrink(4, 8))
    prompt = guided(masks="attention_mask")
    return calling(pipe, **prompt, **FRAMES, guidance_scale=3.0)


def motif():
    transformer = model(
        "MotifVideoTransformer3DModel",
        **BLOCKS,
        in_channels=9,
        out_channels=4,
        num_single_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=32,
        rope_axes_dim=ROPE,
    )
    pipe = pipeline(
        "MotifVideoPipeline",
        vae=Shrink(4, 8),
        transformer=transformer,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    )
    return calling(pipe, **guided(masks="attention_mask"), **FRAMES)


def any_flow():
    transformer = model("AnyFlowTransformer3DModel", **WAN, **CHANNELS)
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=3.0)
    pipe = pipeline("AnyFlowPipeline", transformer=transformer, scheduler=scheduler)
    return calling(pipe, **guided(), **FRAMES, guidance_scale=3.0)


video = partial(Entry, modality="video", two=dict(num_videos_per_prompt=2))

two_masked = partial(video, two=guided(masks="attention_mask", lengths=(8, 6)))
two_prompts = partial(video, two=guided(lengths=(8, 8)))
one = partial(video, two=None, note="its pipeline makes one video alone")

TWO = ("transformer", "transformer_2")
ONE_CALL = dict.fromkeys(("stg_scale", "audio_stg_scale"), 0.0)
ONE_CALL |= dict.fromkeys(("modality_scale", "audio_modality_scale"), 1.0)

VIDEOS = {
    "wan": video(wan, calls=2),
    "wan-unipc": video(lambda: wan(parts=dict(scheduler=flow("UniPCMultistepScheduler"))), calls=2),
    "wan-unguided": video(partial(wan, guidance_scale=1.0)),
    "wan22": video(partial(wan, two=True), calls=2, transformers=TWO),
    "wan-per-token": video(partial(wan, parts=dict(expand_timesteps=True)), calls=2),
    "wan-image": video(partial(wan_image, 12), calls=2),
    "wan-image-per-token": video(partial(wan_image, 4, expand_timesteps=True), calls=2),
    "wan-vace": one(wan_vace, calls=2),
    "wan-vace-reference": one(lambda: wan_vace(reference_images=[pil()]), calls=2),
    "sky-reels": video(partial(sky_reels, "SkyReelsV2Pipeline"), calls=2),
    "sky-reels-forcing": video(
        partial(sky_reels, "SkyReelsV2DiffusionForcingPipeline"),
        calls=2,
        steps=lambda n: 0,
        note="steps a copy of the scheduler for each frame",
    ),
    "sky-reels-causal": video(
        partial(sky_reels, "SkyReelsV2DiffusionForcingPipeline", ar_step=2, causal_block_size=1),
        total=lambda n: 2 * (n + 4),
        steps=lambda n: 0,
        note="frames start one after the other, so that not each one is stepped in each call",
    ),
    "helios": two_prompts(
        helios, total=lambda n: 4 * n, steps=lambda n: 2 * n, note="two runs, one after the other"
    ),
    "hunyuan-video": video(hunyuan_video),
    "hunyuan-video-padded": video(partial(hunyuan_video, 8, 5), two={}),
    "hunyuan-video15": video(hunyuan_video15, calls=2, two=hunyuan_video15_prompt(8, 6)),
    "ltx": two_masked(ltx),
    "ltx-padded": video(ltx_padded, two={}),
    "ltx-image": two_masked(lambda: ltx("LTXImageToVideoPipeline", image=pil())),
    "ltx2": two_masked(
        partial(ltx2, **ONE_CALL), note="steps a copy of the scheduler for the sound"
    ),
    "ltx2-three-calls": two_masked(partial(ltx2, spatio_temporal_guidance_blocks=[1]), calls=3),
    "cogvideox": two_prompts(cogvideox),
    "cogvideox-rotary": two_prompts(partial(cogvideox, rotary=True)),
    "cogvideox-image": video(
        cogvideox_image, two=guided(lengths=(8, 8)) | dict(image=[pil(), pil(64, 96)])
    ),
    "latte": two_prompts(latte),
    "allegro": two_masked(allegro),
    "mochi": video(mochi, two=guided(masks="attention_mask", dtype=torch.bool, lengths=(8, 6))),
    "kandinsky5": video(kandinsky5, calls=2),
    "cosmos": video(
        cosmos, calls=2, steps=lambda n: 2 * n, note="steps twice, setting the index back between"
    ),
    "sana-video": video(sana_video),
    "easy-animate": two_masked(easy_animate),
    "motif": video(motif, calls=2),
    "any-flow": two_prompts(any_flow),
}
