"""The oracle: what a step that computes some of the tokens should give, of any transformer.

The model of diffusers runs as it is, over all tokens. In its attention the keys and values of those
that are not active are replaced by what was kept of them, so that the rows of the active ones are
what a partial step has to give. The results of all other rows are thrown away: their noise is what
was kept of it. No mathematics here is that of `ras`, and what is known of a model is `FAMILIES`.
"""

import inspect
import math
from contextlib import nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F

NOBODY = torch.zeros(1, 0, dtype=torch.int64)  # the active rows of a skipped step


def position(sigma):
    """Where a noise level is on the axis of docs/policy.md; its ends are cut off."""
    sigma = min(max(float(sigma), 0.05), 0.9999)
    return 0.2 * math.log(sigma) - math.log(1 - sigma)


def gain(ahead, behind, extrapolation):
    """g of docs/policy.md, or 0 where there is nothing to go by."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (ahead, behind))
    h = 1 + math.log2(1 + extrapolation)
    g = ((a + b) ** h - a**h - b**h) / (2 * b**h)
    return torch.where((a > 0) & (b > 0), g, 0.0)


def carried_on(seen, now, first=1.0, extrapolation=0.625):
    """The guided noise of a step that computes nothing, and s of each sample there.

    Args:
        seen: `(step, position, guided noise)` of each step of all tokens before, the samples first.
        now: The position.
        first: s before anything is known.
        extrapolation: What is taken to go on.
    """
    share = torch.full((len(seen[0][2]),), first, dtype=torch.float64)

    def expected(at, position):
        (_, t0, v0), (_, t1, v1) = seen[at - 1 : at + 1]
        return (v1 - v0).double() * gain(abs(position - t1), abs(t1 - t0), extrapolation)

    for at in range(2, len(seen)):
        step, position, noise = seen[at]
        if step == seen[at - 1][0] + 1:
            continue
        for sample, e in enumerate(expected(at - 1, position)):
            came = (noise - seen[at - 1][2])[sample].double()
            if (e**2).sum() > 0:
                q = (came * e).sum() / (e**2).sum()
                share[sample] = min(max(1 + q, 0), 1) if q < 0 else min(max(q, 1), 2)
    last = seen[-1][2].double()
    if len(seen) > 1:
        last = last + share.reshape(-1, *[1] * (last.ndim - 1)) * expected(len(seen) - 1, now)
    return last.to(seen[-1][2]), share


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of an image are: its noise, in the order of rows, and what comes after.

    Attributes:
        text_first: Whether text comes before the image where both are in one sequence.
        alone: Whether keys and values are kept, too, where the image attends to itself alone.
        channel: The dimension of channels in latents and noise that have one per pixel.
        multiple: What the number of tokens is padded to a multiple of.
    """

    text_first: bool = False
    alone: bool = True
    channel: int = 1
    multiple: int = 1

    def grid(self, sample, inputs, patch):
        """Return the sizes that the noise of a sample has in tokens, frames before rows."""
        if sample.ndim == 2:
            return (packed_noise(sample, inputs),)
        *frames, height, width = (n for d, n in enumerate(sample.shape, 1) if d != self.channel)
        return (*frames, height // patch, width // patch)

    def after(self, sample, noise):
        """Return how many tokens of the image follow those that are noise, and never walk."""
        return len(sample) - noise if sample.ndim == 2 else -noise % self.multiple


def packed_noise(sample, inputs):
    """Count the tokens of the picture under way; those of references follow."""
    if "img_shapes" in inputs:
        shape = inputs["img_shapes"][0]  # of a sample's pictures, or of its only one
        return math.prod(shape if isinstance(shape[0], int) else shape[0])
    ids = inputs.get("img_ids", torch.zeros(len(sample), 1))
    which = ids.reshape(-1, *ids.shape[-2:])[0, :, 0]
    return (which == which[0]).sum().item()


FAMILIES = {
    "AuraFlowTransformer2DModel": Tokens(text_first=True),
    "BriaFiboTransformer2DModel": Tokens(text_first=True),
    "BriaTransformer2DModel": Tokens(text_first=True),
    "ChromaTransformer2DModel": Tokens(text_first=True),
    "CogVideoXTransformer3DModel": Tokens(text_first=True, channel=2),
    "CogView3PlusTransformer2DModel": Tokens(text_first=True),
    "CogView4Transformer2DModel": Tokens(text_first=True),
    "CosmosTransformer3DModel": Tokens(),
    "Flux2Transformer2DModel": Tokens(text_first=True),
    "Flux3Transformer2DModel": Tokens(text_first=True),
    "FluxTransformer2DModel": Tokens(text_first=True),
    "GlmImageTransformer2DModel": Tokens(text_first=True),
    "HiDreamImageTransformer2DModel": Tokens(),
    "HunyuanImageTransformer2DModel": Tokens(),
    "HunyuanVideoTransformer3DModel": Tokens(),
    "Krea2Transformer2DModel": Tokens(text_first=True),
    "LTXVideoTransformer3DModel": Tokens(),
    "LongCatImageTransformer2DModel": Tokens(text_first=True),
    "Lumina2Transformer2DModel": Tokens(text_first=True, alone=False),  # its refiner is computed
    "LuminaNextDiT2DModel": Tokens(),
    "OvisImageTransformer2DModel": Tokens(text_first=True),
    "PixArtTransformer2DModel": Tokens(),
    "QwenImageTransformer2DModel": Tokens(text_first=True),
    "SD3Transformer2DModel": Tokens(),
    "SkyReelsV2Transformer3DModel": Tokens(),
    "WanTransformer3DModel": Tokens(),
    "WanVACETransformer3DModel": Tokens(),
    "ZImageTransformer2DModel": Tokens(multiple=32),
}


class Oracle:
    """A transformer that keeps noise, keys and values of its tokens from call to call.

    `model` must be untouched while it is called; the settings are those of `RASConfig`. `tokens` is
    what `FAMILIES` has of the model, and `under` makes of the tokens that walk, `(samples, k)`,
    those of what follows that walk with them, `(samples, r)`.

    A layer's keys and values are kept if it attends from as many tokens as it attends to and the
    image is among them, which is told by their number: let there be fewer of text than of image.
    """

    def __init__(
        self,
        model,
        extrapolation=0.0,
        kv_correction=True,
        reuse_text=False,
        tokens=None,
        under=lambda rows: None,
    ):
        self.forward = model.forward
        self.tokens = tokens or FAMILIES[type(model).__name__]
        size = model.config.get("patch_size", 2)
        self.patch = size if isinstance(size, int) else size[-1]
        self.extrapolation, self.kv_correction = extrapolation, kv_correction
        self.reuse_text, self.under = reuse_text, under
        self.kept, self.times, self.levels = {}, {}, {}

    def __call__(self, rows, sigma, *args, branch=0, **inputs):
        """Return the noise of a call.

        Args:
            rows: `(samples, k)`, the active tokens, the same for all guidance copies of a sample;
                None for all.
            sigma: The noise level.
            args, inputs: What the transformer is called with. A call that skips layers keeps noise
                of its own, computes all tokens and leaves keys and values alone.
            branch: Which of a step's calls it is; each keeps what is its own.
        """
        skipped = tuple(inputs.get("skip_layers") or ())
        branch = branch, skipped
        batch, grid, after = self.place(args, inputs)
        active = torch.full((batch, math.prod(grid)), rows is None)
        if rows is not None:
            active.scatter_(1, rows.long().repeat(batch // len(rows), 1), True)
        gains = self.note(branch, position(sigma), active)
        under = None if rows is None else self.under(rows)
        walks = torch.full((batch, after), rows is None)
        if under is not None:
            walks.scatter_(1, under.long().repeat(batch // len(under), 1), True)
        behind = self.behind(branch, sigma, walks)
        walking = walks, rows is None or not self.reuse_text  # what follows, and the text
        attend = self.attention(branch, active, gains, after, walking, behind)
        # diffusers' dispatch_attention_fn ends there, too
        with nullcontext() if skipped else patch.object(F, "scaled_dot_product_attention", attend):
            noise = self.forward(*args, **{**inputs, "return_dict": False})[0]
        new = noise if torch.is_tensor(noise) else torch.stack(noise)
        fresh, gains = (self.spread(numbers, grid, new) for numbers in (active, gains))
        new = self.keep(("noise", *branch), new, fresh, gains)
        return new if torch.is_tensor(noise) else list(new)

    def place(self, args, inputs):
        """Return the batch of a call, its grid, and how many tokens of the image follow."""
        inputs = inspect.signature(self.forward).bind(*args, **inputs).arguments
        latents = next(iter(inputs.values()))
        grid = self.tokens.grid(latents[0], inputs, self.patch)
        return len(latents), grid, self.tokens.after(latents[0], math.prod(grid))

    def behind(self, branch, sigma, walks):
        """Note which of what follows the noise walks; return the share of the others' last change.

        It goes on in a straight line over the noise level, up to three times as far.
        """
        since, gap = self.levels.get(branch, (None, None))
        if since is None or since.shape != walks.shape:
            since, gap = torch.full(walks.shape, float(sigma)), torch.zeros(walks.shape)
        gap = torch.where(walks, sigma - since, gap)
        since = torch.where(walks, float(sigma), since)
        self.levels[branch] = since, gap
        share = torch.where(gap != 0, ((sigma - since) / gap).clamp(0, 3), 0.0)
        return share if self.extrapolation else torch.zeros_like(share)

    def attention(self, branch, active, gains, after, walking, behind):
        """Return what stands in for PyTorch's attention in a call.

        Args:
            branch: See above.
            active, gains: Of the tokens that are noise.
            after: How many of the image follow these.
            walking: Whether those walk, and whether text does.
            behind: The gain of those.
        """
        attention, image = F.scaled_dot_product_attention, active.shape[1] + after
        layers = iter(range(10**6))

        def attend(query, key, value, *args, **kwargs):
            text = key.shape[2] - image
            counts = query.shape[2] == key.shape[2] and text >= (0 if self.tokens.alone else 1)
            if counts:
                layer = next(layers)
                fresh = self.along(active, after, text, walking)
                others = behind * self.kv_correction, 0
                g = self.along(gains * self.kv_correction, after, text, others)
                key = self.keep((layer, "key", *branch), key, fresh, g)
                value = self.keep((layer, "value", *branch), value, fresh, g)
            return attention(query, key, value, *args, **kwargs)

        return attend

    def along(self, numbers, after, text, others=(0, 0)):
        """Lay out numbers as keys are: of noise, `others` of what follows it and of the text."""
        counts = after, text
        parts = [
            numbers,
            *(numbers.new_full((len(numbers), n), 1) * x for n, x in zip(counts, others)),
        ]
        parts = [parts[2], *parts[:2]] if self.tokens.text_first else parts
        return torch.cat(parts, 1)[:, None, :, None]

    def note(self, branch, now, active):
        """Note when tokens are active; return the share of its last change that goes on of each."""
        since, behind = self.times.get(branch, (None, None))
        if since is None or since.shape != active.shape:
            since = torch.full(active.shape, now, dtype=torch.float64)
            behind = torch.zeros_like(since)
        behind = torch.where(active, (now - since).abs(), behind)
        since = torch.where(active, now, since)
        self.times[branch] = since, behind
        return gain((now - since).abs(), behind, self.extrapolation)

    def keep(self, name, new, fresh, gains):
        """Replace what is kept where `fresh`; return it, carried on everywhere else."""
        last, change = self.kept.get(name, (None, None))
        if last is None or last.shape != new.shape:
            assert fresh.all(), "there is nothing to reuse"
            last, change = new, torch.zeros_like(new)
        change = torch.where(fresh, new - last, change)
        last = torch.where(fresh, new, last)
        self.kept[name] = last, change
        return last + gains.to(last) * change

    def spread(self, numbers, grid, noise):
        """Lay out one number per token as the noise is: rows of tokens, or patches of pixels.

        Rows that follow in the noise are of references, and of no account: they are like the first.
        """
        if noise.ndim == 3:
            behind = numbers[:, :1].expand(-1, noise.shape[1] - numbers.shape[1])
            return torch.cat([numbers, behind], 1)[..., None]
        pixels = numbers.reshape(-1, *grid).unsqueeze(self.tokens.channel)
        for d in range(1, noise.ndim):
            if d != self.tokens.channel:
                pixels = pixels.repeat_interleave(noise.shape[d] // pixels.shape[d], d)
        return pixels
