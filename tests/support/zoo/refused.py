"""Pipelines that a library of transformer steps has to refuse, and why."""

import diffusers

from support.pipelines import autoencoder, quiet
from support.zoo.parts import (
    CHANNELS,
    Entry,
    Shrink,
    calling,
    ddim,
    guided,
    model,
    pipeline,
    square,
    text,
)


def stable_diffusion():
    unet = model(
        "UNet2DConditionModel",
        **CHANNELS,
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=2,
        attention_head_dim=4,
    )
    parts = dict(unet=unet, vae=autoencoder(channels=4), scheduler=ddim())
    pipe = pipeline("StableDiffusionPipeline", **parts, requires_safety_checker=False)
    return calling(pipe, **guided(), **square(64), guidance_scale=3.0)


def amused():
    transformer = model(
        "UVit2DModel",
        hidden_size=32,
        cond_embed_dim=32,
        micro_cond_encode_dim=2,
        micro_cond_embed_dim=10,
        encoder_hidden_size=32,
        vocab_size=32,
        codebook_size=24,
        in_channels=32,
        block_out_channels=32,
        num_res_blocks=1,
        block_num_heads=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=32,
        sample_size=8,
    )
    vqvae = model(
        "VQModel",
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        num_vq_embeddings=32,
        norm_num_groups=2,
        layers_per_block=1,
    )
    scheduler = diffusers.AmusedScheduler(mask_token_id=31)
    pipe = pipeline("AmusedPipeline", transformer=transformer, vqvae=vqvae, scheduler=scheduler)
    prompt = {k: v[0] for k, v in guided(1).items()}
    states = dict(encoder_hidden_states=text(), negative_encoder_hidden_states=text(seed=2))
    return calling(pipe, **prompt, **states, **square(64))


def proteina():
    """A transformer with two schedulers, neither of which is called `scheduler`; not to be run."""
    transformer = model(
        "RFD4ProteinaTransformer",
        nlayers=1,
        token_dim=32,
        nheads=2,
        dim_cond=16,
        pair_repr_dim=16,
        latent_dim=4,
        tri_mult_c=16,
    )
    steps = diffusers.RFD4ProteinaScheduler("power", "tan", 1.0, 1.0)
    schedulers = dict.fromkeys(("bb_ca_scheduler", "local_latents_scheduler"), steps)
    parts = dict(transformer=transformer, vae=Shrink(4, 8, latent_dim=4), **schedulers)
    return quiet(diffusers.RFD4ProteinaPipeline(**parts)), None


REFUSED = {
    "stable-diffusion": Entry(stable_diffusion, transformers=("unet",), note="UNet"),
    "amused": Entry(amused, note="discrete"),
    "proteina": Entry(proteina, note="no scheduler"),
}
