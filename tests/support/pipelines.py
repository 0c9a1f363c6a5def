"""Real diffusers pipelines with seeded random weights: the models that the tests run.

Every weight matters (modulations, gates and biases are non-zero), and each layer keeps the size of
its activations, so that a wrong row anywhere shows in the result. Latents are given directly and
`output_type="latent"` is the default, so that most pipelines need no autoencoder at all.
"""

import functools
from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

PIXELS = 8  # pixels along each side of a latent pixel, in every pipeline here


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@torch.no_grad()
def randomise(model, seed=0):
    """Seeded weights: matrices that keep the variance, norms near one, biases small."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        weight.normal_(generator=generator)
        if weight.ndim > 1:
            weight.mul_(weight[0].numel() ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            weight.mul_(0.1).add_(1)
        elif name.endswith("bias"):
            weight.mul_(0.1)
    return model.eval()


# --- transformers ---------------------------------------------------------------------------------

SMALL = dict(
    num_layers=3,
    num_attention_heads=2,
    attention_head_dim=32,
    joint_attention_dim=32,
    pooled_projection_dim=16,
    sample_size=32,
    pos_embed_max_size=32,
)
SD3_MEDIUM = dict(num_attention_heads=24, attention_head_dim=64, pos_embed_max_size=192)
SD35_MEDIUM = dict(
    num_attention_heads=24,
    attention_head_dim=64,
    pos_embed_max_size=384,
    qk_norm="rms_norm",
    dual_attention_layers=(0,),
)
SD35_LARGE = dict(
    num_attention_heads=38, attention_head_dim=64, pos_embed_max_size=192, qk_norm="rms_norm"
)
LUMINA_NEXT = dict(hidden_size=2304, num_attention_heads=32, num_kv_heads=8)
SD3_TEXT = 333  # 77 CLIP tokens and 256 T5 tokens
LUMINA_TEXT = 256


def sd3_transformer(seed=0, **config):
    """An SD3 transformer; sizes that are not given are those of all published models."""
    config = {
        "num_layers": 2,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "in_channels": 16,
        "out_channels": None,
        "patch_size": 2,
        **config,
    }
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return randomise(SD3Transformer2DModel(caption_projection_dim=width, **config), seed)


def lumina_transformer(seed=0, **config):
    """A Lumina-Next transformer; sizes that are not given are those of Lumina-Next-T2I."""
    config = {
        "num_layers": 2,
        "cross_attention_dim": 2048,
        **config,
    }
    return randomise(LuminaNextDiT2DModel(**config), seed)


SMALL_LUMINA = dict(
    num_layers=3,
    hidden_size=96,
    num_attention_heads=4,
    num_kv_heads=2,
    cross_attention_dim=32,
    multiple_of=32,
    sample_size=32,
)


# --- pipelines ------------------------------------------------------------------------------------


def euler(**config):
    return FlowMatchEulerDiscreteScheduler(shift=3.0, **config)


def autoencoder(seed=0, channels=16):
    """Eight times smaller each way, 16 channels: the shape of SD3's, and next to no work."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        latent_channels=channels,
        norm_num_groups=2,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return randomise(vae, seed)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


NO_TEXT_ENCODERS = dict.fromkeys(
    [f"{part}{i}" for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")]
)


def sd3(cls=StableDiffusion3Pipeline, scheduler=None, vae=None, seed=0, parts=None, **config):
    """An SD3 pipeline of class `cls`, small unless the sizes are given."""
    transformer = sd3_transformer(
        seed, **(config if "num_attention_heads" in config else {**SMALL, **config})
    )
    parts = {**NO_TEXT_ENCODERS, "vae": vae, "scheduler": scheduler or euler(), **(parts or {})}
    return quiet(cls(transformer=transformer, **parts))


def sd3_controlnet(seed=0, **config):
    """A small SD3 with a ControlNet of one block whose residuals are as large as the tokens."""
    config = {**SMALL, **config}
    width = config["num_attention_heads"] * config["attention_head_dim"]
    controlnet = SD3ControlNetModel(
        **{**config, "num_layers": 1},
        caption_projection_dim=width,
        extra_conditioning_channels=0,
    )
    return sd3(
        StableDiffusion3ControlNetPipeline,
        vae=autoencoder(),
        seed=seed,
        parts={"controlnet": randomise(controlnet, seed + 1)},
        **config,
    )


def lumina(scheduler=None, seed=0, **config):
    """A Lumina-Next pipeline, small unless the sizes are given."""
    transformer = lumina_transformer(
        seed, **(config if "hidden_size" in config else {**SMALL_LUMINA, **config})
    )
    parts = dict(vae=None, text_encoder=None, tokenizer=None, scheduler=scheduler or euler())
    return quiet(LuminaPipeline(transformer=transformer, **parts))


class Tokenizer:
    """Letters as numbers: enough of a tokenizer for the pipelines to encode a prompt."""

    model_max_length = 8

    def __call__(self, prompts, max_length=None, **_):
        rows = [[ord(c) % 64 for c in p.ljust(8)[:8]] for p in prompts]
        return type("Tokens", (), {"input_ids": torch.tensor(rows)})


def text_encoders(seed=0):
    """Two tiny CLIP text encoders and their tokenizers, matching the small SD3's dimensions."""
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=62,
        eos_token_id=63,
        pad_token_id=0,
    )
    encoders = [randomise(CLIPTextModelWithProjection(config), seed + i) for i in (1, 2)]
    return dict(
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=Tokenizer(),
        tokenizer_2=Tokenizer(),
    )


# --- what a pipeline is called with ---------------------------------------------------------------


def size(height, width):
    return dict(height=height * PIXELS, width=width * PIXELS)


def sd3_inputs(pipe, batch=1, height=16, width=16, text=12, seed=100, latents=True, **call):
    """The arguments of an SD3 pipeline call; `height` and `width` are those of the latents."""
    config = pipe.transformer.config
    embeds = normal(2, batch, text, config.joint_attention_dim, seed=seed)
    pooled = normal(2, batch, config.pooled_projection_dim, seed=seed + 1)
    if latents:
        call["latents"] = normal(batch, config.in_channels, height, width, seed=seed + 2)
    return dict(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        pooled_prompt_embeds=pooled[0],
        negative_pooled_prompt_embeds=pooled[1],
        output_type="latent",
        **size(height, width),
        **call,
    )


def lumina_inputs(pipe, batch=1, height=16, width=16, text=8, seed=100, **call):
    """The arguments of a Lumina pipeline call; each prompt is a little shorter than the last."""
    config = pipe.transformer.config
    embeds = normal(2, batch, text, config.cross_attention_dim, seed=seed)
    lengths = text - torch.arange(2 * batch).reshape(2, batch, 1)
    masks = (torch.arange(text) < lengths).long()
    return dict(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        prompt_attention_mask=masks[0],
        negative_prompt_attention_mask=masks[1],
        latents=normal(batch, config.in_channels, height, width, seed=seed + 1),
        output_type="latent",
        **size(height, width),
        **call,
    )


def of_sample(inputs, index):
    """The call's arguments for one sample of its batch."""
    return {k: v[index : index + 1] if torch.is_tensor(v) else v for k, v in inputs.items()}


def ip_adapter(transformer, seed=0):
    """The state dict of an IP-Adapter for this transformer, for `pipe.load_ip_adapter`."""
    width = transformer.inner_dim
    state = {"ip_adapter": {}, "image_proj": {}}
    for i in range(len(transformer.transformer_blocks)):
        processor = SD3IPAdapterJointAttnProcessor2_0(
            hidden_size=width,
            ip_hidden_states_dim=width,
            head_dim=transformer.config.attention_head_dim,
            timesteps_emb_dim=width,
        )
        weights = randomise(processor, seed + i).state_dict()
        state["ip_adapter"] |= {f"{i}.{key}": value for key, value in weights.items()}
    projection = IPAdapterTimeImageProjection(
        embed_dim=8, output_dim=width, hidden_dim=64, heads=1, num_queries=2, timestep_in_dim=width
    )
    state["image_proj"] = randomise(projection, seed + 100).state_dict()
    return state


# --- what happened in a run -----------------------------------------------------------------------


class Recorder:
    """Watches a pipeline's transformer calls, scheduler steps and `ras`'s selections.

    Make it before `ras.enable`, so that it sits outside of the transformer and beneath the
    scheduler's wrap. `choose(index, scores, k)`, if given, replaces the chosen rows.
    """

    def __init__(self, monkeypatch, pipe, *other_schedulers, choose=None):
        self.choose, self.pipe = choose, pipe
        self.clear()
        self.watch_calls(monkeypatch, type(pipe.transformer))
        for cls in {type(s) for s in (pipe.scheduler, *other_schedulers)}:
            self.watch_steps(monkeypatch, cls)
        self.watch_selections(monkeypatch)

    def clear(self):
        self.calls, self.noises, self.latents, self.selections = [], [], [], []

    @property
    def rows(self):
        return [selection.active for selection in self.selections]

    def watch_calls(self, monkeypatch, cls):
        call = cls.__call__

        def recorded(module, **inputs):
            inputs["hidden_states"] = inputs["hidden_states"].clone()
            output = call(module, **inputs)
            self.calls.append({**inputs, "noise": output[0].clone(), "after": len(self.noises)})
            return output

        monkeypatch.setattr(cls, "__call__", recorded)

    def watch_steps(self, monkeypatch, cls):
        step = cls.step

        @functools.wraps(step)
        def recorded(scheduler, noise, t, latents, **options):
            self.noises.append(noise.clone())
            output = step(scheduler, noise, t, latents, **options)
            self.latents.append(output[0].clone())
            return output

        monkeypatch.setattr(cls, "step", recorded)

    def watch_selections(self, monkeypatch):
        import ras_kernels

        select = ras_kernels.select_regions

        def recorded(scores, ages, num_active, **options):
            scores, before = scores.clone(), ages.clone()
            active, after = select(scores, ages, num_active, **options)
            if self.choose is not None:
                active = self.choose(len(self.selections), scores, num_active)
            self.selections.append(
                SimpleNamespace(
                    scores=scores, ages=before, active=active.clone(), next=after.clone()
                )
            )
            return active, after

        monkeypatch.setattr(ras_kernels, "select_regions", recorded)


def random_rows(index, scores, k):
    """Rows that depend on the sample and on the step but not on the scores."""
    generator = torch.Generator().manual_seed(index)
    order = torch.rand(scores.shape, generator=generator).argsort(1)
    return order[:, :k].sort(1).values


def sparse_steps(steps, start=4, end=None, resets=(12, 20)):
    """The sparse steps of a run, straight from the definition."""
    end = steps - 1 if end is None else end
    resets = {int(r * steps) if isinstance(r, float) else r for r in resets}
    return [s for s in range(steps) if s > 0 and start <= s <= end and s not in resets]
