"""The oracle: SD3 and Lumina-Next with region-adaptive sampling, written down as naively as can be.

It shares no code with `ras` or with diffusers' attention: plain functions over a transformer's
state dict, one sample at a time, explicit softmax(Q K^T) V, and one dictionary of keys and values.

A model here is called with a list of `rows`, one index tensor per sample of the transformer's
batch: the image tokens to compute. None means all of them. What the model keeps between calls:
`cache[layer, sample] = K, V`, full-length, and `noise[branch] = [tokens of each sample]`.
"""

import math

import torch
import torch.nn.functional as F


def softmax_attention(q, k, v, scale):
    """One sample: q is (heads, queries, d), k and v are (heads, keys, d)."""
    return torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1) @ v


def heads(x, d):
    """(tokens, heads * d) to (heads, tokens, d)."""
    return x.reshape(x.shape[0], -1, d).transpose(0, 1)


def unheads(x):
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def layer_norm(x, eps=1e-6):
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def rms_norm(x, weight, eps):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def sinusoid(t, size=256):
    """The embedding of one timestep: cosines first, then sines."""
    half = size // 2
    angles = t.float() * torch.exp(-math.log(10000) * torch.arange(half) / half)
    return torch.cat([angles.cos(), angles.sin()])


class Naive:
    """What the two models share: weights by name, the caches, and the walk over the samples."""

    def __init__(self, transformer):
        self.config = transformer.config
        self.weights = {k: v.detach() for k, v in transformer.state_dict().items()}
        self.cache, self.noise = {}, {}

    def linear(self, name, x):
        y = x @ self.weights[name + ".weight"].T
        bias = self.weights.get(name + ".bias")
        return y if bias is None else y + bias

    def mlp(self, first, activation, second, x):
        return self.linear(second, activation(self.linear(first, x)))

    def remember(self, layer, sample, rows, k, v):
        """Write the active rows' K and V over the old ones; give back all rows' K and V."""
        if rows is None:
            self.cache[layer, sample] = k, v
        else:
            old_k, old_v = self.cache[layer, sample]
            new_k, new_v = old_k.clone(), old_v.clone()
            for at, row in enumerate(rows.tolist()):
                new_k[:, row] = k[:, at]
                new_v[:, row] = v[:, at]
            self.cache[layer, sample] = new_k, new_v
        return self.cache[layer, sample]

    def merge(self, noise, tokens, rows):
        """A sample's noise tokens, new where they were computed and old elsewhere."""
        if rows is None:
            return tokens
        merged = noise.clone()
        for at, row in enumerate(rows.tolist()):
            merged[row] = tokens[at]
        return merged

    def __call__(self, latents, rows=None, skip_layers=(), **inputs):
        """Noise for a batch of latents, new at the active rows and the cached one elsewhere.

        A call that skips layers is a branch of its own: it computes all rows and leaves K and V
        alone, and only its active rows' noise replaces what that branch gave before.
        """
        batch, branch = latents.shape[0], tuple(skip_layers)
        rows = [None] * batch if rows is None else rows
        old = self.noise.get(branch)
        new = []
        for i in range(batch):
            if branch:
                tokens = self.sample(i, latents, None, skip_layers=branch, **inputs)
                tokens = tokens if rows[i] is None else tokens[rows[i]]
            else:
                tokens = self.sample(i, latents, rows[i], **inputs)
            new.append(self.merge(old and old[i], tokens, rows[i]))
        self.noise[branch] = new
        return torch.stack([self.image(noise, latents.shape[-2:]) for noise in new])

    def image(self, tokens, size):
        """Noise tokens to an image; each token holds its patch as (y, x, channel)."""
        p = self.config.patch_size
        height, width = size[0] // p, size[1] // p
        image = tokens.reshape(height, width, p, p, -1)
        return image.permute(4, 0, 2, 1, 3).reshape(-1, height * p, width * p)


class NaiveSD3(Naive):
    @staticmethod
    def inputs(call):
        """The oracle's arguments from those of a call of diffusers' transformer."""
        return dict(
            timestep=call["timestep"],
            text=call["encoder_hidden_states"],
            pooled=call["pooled_projections"],
            residuals=call.get("block_controlnet_hidden_states"),
            skip_layers=call.get("skip_layers") or (),
        )

    def sample(self, i, latents, rows, timestep, text, pooled, residuals=None, skip_layers=()):
        """Noise tokens of sample i at the active rows."""
        p = self.config.patch_size
        x = self.embed(latents[i], p)
        residuals = [r[i] for r in residuals] if residuals is not None else None
        if rows is not None:
            x = x[rows]
            residuals = [r[rows] for r in residuals] if residuals is not None else None
        temb = self.mlp(
            "time_text_embed.timestep_embedder.linear_1",
            F.silu,
            "time_text_embed.timestep_embedder.linear_2",
            sinusoid(timestep[i]),
        ) + self.mlp(
            "time_text_embed.text_embedder.linear_1",
            F.silu,
            "time_text_embed.text_embedder.linear_2",
            pooled[i],
        )
        temb = F.silu(temb)
        context = self.linear("context_embedder", text[i])
        count = self.config.num_layers
        for n in range(count):
            last = n == count - 1
            if n not in skip_layers:
                keep = not skip_layers  # a skip-layer call leaves the caches alone
                x, context = self.block(n, i, x, context, temb, rows, last, keep)
            if residuals is not None and not last:
                x = x + residuals[int(n * len(residuals) / count)]
        scale, shift = self.linear("norm_out.linear", temb).chunk(2)
        return self.linear("proj_out", layer_norm(x) * (1 + scale) + shift)

    def embed(self, latents, p):
        """The image tokens with their positions, cropped from the middle of the table."""
        channels, height, width = latents.shape
        height, width = height // p, width // p
        patches = latents.reshape(channels, height, p, width, p).permute(1, 3, 0, 2, 4)
        weight = self.weights["pos_embed.proj.weight"].flatten(1)
        x = patches.reshape(height * width, -1) @ weight.T + self.weights["pos_embed.proj.bias"]
        side = self.config.pos_embed_max_size
        table = self.weights["pos_embed.pos_embed"].reshape(side, side, -1)
        top, left = (side - height) // 2, (side - width) // 2
        return x + table[top : top + height, left : left + width].reshape(height * width, -1)

    def block(self, n, i, x, context, temb, rows, last, keep):
        name = f"transformer_blocks.{n}."
        dual = n in self.config.dual_attention_layers
        mod = self.linear(name + "norm1.linear", temb).chunk(9 if dual else 6)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = mod[:6]
        normed = layer_norm(x)
        inner = normed * (1 + scale) + shift
        if last:
            scale, shift = self.linear(name + "norm1_context.linear", temb).chunk(2)
        else:
            text_mod = self.linear(name + "norm1_context.linear", temb).chunk(6)
            shift, scale = text_mod[:2]
        text = layer_norm(context) * (1 + scale) + shift

        out, text_out = self.attention(name + "attn", i, inner, text, rows, keep)
        x_out = x + gate * self.linear(name + "attn.to_out.0", out)
        if dual:
            shift2, scale2, gate2 = mod[6:]
            inner2 = normed * (1 + scale2) + shift2
            out2, _ = self.attention(name + "attn2", i, inner2, None, rows, keep)
            x_out = x_out + gate2 * self.linear(name + "attn2.to_out.0", out2)
        x_out = x_out + mlp_gate * self.feed_forward(
            name + "ff", layer_norm(x_out) * (1 + mlp_scale) + mlp_shift
        )
        if last:
            return x_out, None
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = text_mod
        context = context + gate * self.linear(name + "attn.to_add_out", text_out)
        context = context + mlp_gate * self.feed_forward(
            name + "ff_context", layer_norm(context) * (1 + mlp_scale) + mlp_shift
        )
        return x_out, context

    def feed_forward(self, name, x):
        gelu = lambda y: F.gelu(y, approximate="tanh")  # noqa: E731
        return self.mlp(name + ".net.0.proj", gelu, name + ".net.2", x)

    def attention(self, name, i, x, text, rows, keep):
        """The image's rows first, then the text's; `text` is None for the second attention."""
        d = self.config.attention_head_dim

        def project(x, to, norm):
            y = heads(self.linear(f"{name}.{to}", x), d)
            if norm is not None and self.config.qk_norm is not None:
                y = rms_norm(y, self.weights[f"{name}.{norm}.weight"], 1e-6)
            return y

        q = project(x, "to_q", "norm_q")
        k, v = project(x, "to_k", "norm_k"), project(x, "to_v", None)
        if keep:
            k, v = self.remember(name, i, rows, k, v)
        if text is not None:
            q = torch.cat([q, project(text, "add_q_proj", "norm_added_q")], 1)
            k = torch.cat([k, project(text, "add_k_proj", "norm_added_k")], 1)
            v = torch.cat([v, project(text, "add_v_proj", None)], 1)
        out = unheads(softmax_attention(q, k, v, d**-0.5))
        return out[: len(x)], out[len(x) :]


class NaiveLumina(Naive):
    def __init__(self, transformer, base_length=None, factor=1.0, watershed=1.0):
        super().__init__(transformer)
        self.base_length = base_length  # of proportional attention; None without it
        self.factor, self.watershed = factor, watershed  # how positions are scaled, and until when
        self.d = self.config.hidden_size // self.config.num_attention_heads

    @staticmethod
    def inputs(call):
        return dict(
            timestep=call["timestep"],
            text=call["encoder_hidden_states"],
            mask=call["encoder_mask"],
        )

    def sample(self, i, latents, rows, timestep, text, mask):
        p = self.config.patch_size
        channels, height, width = latents[i].shape
        height, width = height // p, width // p
        patches = latents[i].reshape(channels, height, p, width, p).permute(1, 3, 0, 2, 4)
        x = self.linear("patch_embedder.proj", patches.reshape(height * width, -1))
        early = timestep[i] < self.watershed
        linear, ntk = (self.factor, 1.0) if early else (1.0, self.factor)
        angles = self.angles(height, width, linear, ntk)
        if rows is not None:
            x, angles = x[rows], angles[rows]
        words = text[i][mask[i].bool()]
        pooled = F.layer_norm(
            words.mean(0),
            words.shape[-1:],
            self.weights["time_caption_embed.caption_embedder.0.weight"],
            self.weights["time_caption_embed.caption_embedder.0.bias"],
        )
        temb = self.mlp(
            "time_caption_embed.timestep_embedder.linear_1",
            F.silu,
            "time_caption_embed.timestep_embedder.linear_2",
            sinusoid(timestep[i]),
        ) + self.linear("time_caption_embed.caption_embedder.1", pooled)
        temb = F.silu(temb)
        for n in range(self.config.num_layers):
            x = self.block(f"layers.{n}.", i, x, words, temb, rows, angles, height * width)
        x = layer_norm(x) * (1 + self.linear("norm_out.linear_1", temb))
        return self.linear("norm_out.linear_2", x)

    def angles(self, height, width, linear, ntk):
        """Each token's rotation angles: half of a head's pairs turn with y, half with x."""
        pairs = self.d // 4
        speed = (10000.0 * ntk) ** -(torch.arange(pairs) * 2 / (self.d // 2)) / linear
        y = torch.arange(height)[:, None, None] * speed
        x = torch.arange(width)[None, :, None] * speed
        both = torch.stack(torch.broadcast_tensors(y, x), -1)  # (y, x, pair, axis)
        return both.reshape(height * width, -1)

    def rotate(self, x, angles):
        """(heads, tokens, d): turn each pair of neighbouring numbers by its token's angle."""
        a, b = x[..., 0::2], x[..., 1::2]
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    def block(self, name, i, x, words, temb, rows, angles, length):
        eps = self.config.norm_eps
        weight = lambda norm: self.weights[f"{name}{norm}.weight"]  # noqa: E731
        scale, gate, mlp_scale, mlp_gate = self.linear(name + "norm1.linear", temb).chunk(4)
        inner = rms_norm(x, weight("norm1.norm"), eps) * (1 + scale)

        q, k, v = self.project(name + "attn1", inner, inner)
        q, k = self.rotate(q, angles), self.rotate(k, angles)
        k, v = self.remember(name + "attn1", i, rows, k, v)
        softmax_scale = self.d**-0.5
        if self.base_length is not None:
            softmax_scale *= math.sqrt(math.log(length, self.base_length))
        own = self.grouped(q, k, v, softmax_scale)

        words = rms_norm(words, weight("norm1_context"), eps)
        q, k, v = self.project(name + "attn2", inner, words)
        cross = self.grouped(self.rotate(q, angles), k, v, self.d**-0.5)
        cross = cross * self.weights[name + "gate"].tanh()[:, None, None]

        out = self.linear(name + "attn2.to_out.0", unheads(own + cross))
        x = x + gate.tanh() * rms_norm(out, weight("norm2"), eps)
        inner = rms_norm(x, weight("ffn_norm1"), eps) * (1 + mlp_scale)
        out = F.silu(self.linear(name + "feed_forward.linear_1", inner))
        out = out * self.linear(name + "feed_forward.linear_3", inner)
        out = self.linear(name + "feed_forward.linear_2", out)
        return x + mlp_gate.tanh() * rms_norm(out, weight("ffn_norm2"), eps)

    def project(self, name, x, other):
        """Queries of x, keys and values of the other; q and k normalised across all heads."""

        def norm(y, which):
            weight, bias = (self.weights[f"{name}.{which}.{part}"] for part in ("weight", "bias"))
            return layer_norm(y, 1e-5) * weight + bias

        q = norm(self.linear(name + ".to_q", x), "norm_q")
        k = norm(self.linear(name + ".to_k", other), "norm_k")
        return heads(q, self.d), heads(k, self.d), heads(self.linear(name + ".to_v", other), self.d)

    def grouped(self, q, k, v, scale):
        """Each head of k and v serves as many neighbouring heads of q."""
        share = q.shape[0] // k.shape[0]
        heads_out = [
            softmax_attention(q[h : h + 1], k[h // share][None], v[h // share][None], scale)
            for h in range(q.shape[0])
        ]
        return torch.cat(heads_out)


# --- whole runs -----------------------------------------------------------------------------------


def sd3_guided(model, inputs, scale):
    """Noise of one step with classifier-free guidance, as a function of latents, t and rows."""
    text = torch.cat([inputs["negative_prompt_embeds"], inputs["prompt_embeds"]])
    pooled = torch.cat([inputs["negative_pooled_prompt_embeds"], inputs["pooled_prompt_embeds"]])

    def noise(latents, t, rows):
        both = torch.cat([latents, latents])
        rows = None if rows is None else list(rows) * 2
        out = model(both, rows, timestep=t.expand(len(both)), text=text, pooled=pooled)
        without, given = out.chunk(2)
        return without + scale * (given - without)

    return noise


def lumina_guided(model, inputs, scale):
    """The same for Lumina-Next: three channels guided, time runs the other way."""
    text = torch.cat([inputs["prompt_embeds"], inputs["negative_prompt_embeds"]])
    mask = torch.cat([inputs["prompt_attention_mask"], inputs["negative_prompt_attention_mask"]])
    channels = model.config.in_channels

    def noise(latents, t, rows):
        both = torch.cat([latents, latents])
        rows = None if rows is None else list(rows) * 2
        time = (1 - t / 1000).expand(len(both))
        given, without = model(both, rows, timestep=time, text=text, mask=mask).chunk(2)
        eps = without[:, :3] + scale * (given[:, :3] - without[:, :3])
        return -torch.cat([eps, given[:, 3:channels]], 1)

    return noise


def euler_run(noise, latents, timesteps, sigmas, rows):
    """Every step's noise and the last latents; `rows[s]` is None where step s is dense."""
    noises = []
    for s, t in enumerate(timesteps):
        noises.append(noise(latents, t, rows[s]))
        latents = latents + (sigmas[s + 1] - sigmas[s]) * noises[-1]
    return noises, latents


def replay(oracle, record, sparse, planned=None, order=1):
    """Each recorded transformer call's noise and the oracle's: same inputs, same rows.

    `record` holds the calls and the selections; a selection is made for each `planned` step and
    used in each `sparse` one, the other steps are dense. With a solver of order 2, two calls of
    the scheduler are one step.
    """
    planned = list(sparse if planned is None else planned)
    assert len(record.rows) == len(planned), "one selection for each sparse step"
    rows_of = dict(zip(planned, record.rows))
    for call in record.calls:
        step = call["after"] // order
        latents, inputs = call["hidden_states"], oracle.inputs(call)
        rows = None
        if step in sparse:
            rows = list(rows_of[step]) * (len(latents) // len(rows_of[step]))
        yield call["noise"], oracle(latents, rows, **inputs)


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()
