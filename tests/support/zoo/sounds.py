"""Pipelines of sound."""

from functools import partial

import diffusers
import torch

from support.pipelines import euler, normal
from support.zoo.parts import (
    BLOCKS,
    CHANNELS,
    WIDTH,
    Entry,
    Part,
    Recording,
    calling,
    guided,
    mask,
    model,
    pipeline,
    text,
)


def stable_audio():
    transformer = model(
        "StableAudioDiTModel",
        **BLOCKS,
        **CHANNELS,
        sample_size=32,
        num_key_value_attention_heads=1,
        cross_attention_dim=32,
        time_proj_dim=16,
        global_states_input_dim=64,
        cross_attention_input_dim=32,
    )
    projection = dict(text_encoder_dim=32, conditioning_dim=32, min_value=0, max_value=32)
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
    )
    pipe = pipeline(
        "StableAudioPipeline",
        transformer=transformer,
        vae=Recording(),
        projection_model=model("StableAudioProjectionModel", **projection),
        scheduler=scheduler,
    )
    masks = dict(attention_mask=mask(), negative_attention_mask=mask())
    return calling(pipe, **guided(), **masks, guidance_scale=3.0)


def stable_audio3():
    transformer = model(
        "StableAudio3DiTModel",
        io_channels=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        cond_token_dim=32,
        global_cond_dim=32,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        num_memory_tokens=4,
    )
    pipe = pipeline("StableAudio3Pipeline", transformer=transformer, vae=Recording())
    pipe.encode_duration = lambda *_: normal(1, 32, seed=5)
    prompt = dict(prompt_embeds=text(), encoder_attention_mask=mask())
    return calling(pipe, **prompt, duration=10.0)


def longcat_audio():
    transformer = model(
        "LongCatAudioDiTTransformer",
        dit_dim=32,
        dit_depth=2,
        dit_heads=2,
        dit_text_dim=32,
        latent_dim=4,
    )
    parts = dict(transformer=transformer, vae=Recording(), scheduler=euler(invert_sigmas=True))
    pipe = pipeline("LongCatAudioDiTPipeline", **parts)
    pipe.encode_prompt = lambda prompts, device: (text(seed=len(prompts[0])), torch.tensor([8]))
    return calling(pipe, prompt="cat", audio_duration_s=10)


class Conditions(Part):
    """What gives ACE-Step's transformer its text: here the text as it is."""

    null_condition_emb = torch.zeros(1, 1, WIDTH)
    silence_latent = torch.zeros(1, 64, 8)

    def forward(self, text_hidden_states, text_attention_mask, **_):
        return text_hidden_states, text_attention_mask


def ace_step(**inputs):
    transformer = model(
        "AceStepTransformer1DModel",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        in_channels=24,
        audio_acoustic_hidden_dim=8,
        patch_size=2,
        sliding_window=8,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1)
    parts = dict(transformer=transformer, scheduler=scheduler, condition_encoder=Conditions())
    pipe = pipeline("AceStepPipeline", **parts)
    pipe.encode_prompt = lambda **_: (text(), mask(), text(seed=2), mask())
    return calling(pipe, prompt="cat", audio_duration=2.0, guidance_scale=3.0, **inputs)


sound = partial(
    Entry, modality="audio", two=None, note="what its encoders say is given, for one alone"
)

SOUNDS = {
    "stable-audio": sound(stable_audio, two=dict(num_waveforms_per_prompt=2)),
    "stable-audio3": sound(stable_audio3),
    "longcat-audio": sound(longcat_audio, calls=2),
    "ace-step": sound(ace_step),
    "ace-step-interval": sound(
        partial(ace_step, cfg_interval_end=0.5),
        note="halves the batch midway; for one sample alone",
    ),
}
