"""The oracle: what a step that computes some of the tokens should give, of any transformer.

The model of diffusers runs as it is, over all tokens. In its attention the keys and values of those
that are not active are replaced by what was kept of them, so that the rows of the active ones are
what a partial step has to give. The results of all other rows are thrown away: their noise is what
was kept of it. No mathematics here is that of `ras`.
"""

import math
from unittest import mock

import torch
import torch.nn.functional as F

NOBODY = torch.zeros(1, 0, dtype=torch.int64)  # the active rows of a skipped step


def position(sigma):
    """Where a noise level is on the axis of README.md, "The policy"; its ends are cut off."""
    sigma = min(max(float(sigma), 0.05), 0.9999)
    return 0.2 * math.log(sigma) - math.log(1 - sigma)


def gain(ahead, behind, extrapolation):
    """g of README.md, "The policy", or 0 where there is nothing to go by."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (ahead, behind))
    h = 1 + math.log2(1 + extrapolation)
    g = ((a + b) ** h - a**h - b**h) / (2 * b**h)
    return torch.where((a > 0) & (b > 0), g, 0.0)


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


class Oracle:
    """A transformer that keeps noise, keys and values of its tokens from call to call.

    `model` must be untouched while it is called; the settings are those of `RASConfig`.
    `text_first` tells where text is in joint attention.
    """

    def __init__(
        self, model, extrapolation=0.0, kv_correction=True, reuse_text=False, text_first=False
    ):
        self.forward, self.patch = model.forward, model.config.patch_size
        self.extrapolation, self.kv_correction = extrapolation, kv_correction
        self.reuse_text, self.text_first = reuse_text, text_first
        self.kept, self.times = {}, {}

    def __call__(self, rows, sigma, *args, **inputs):
        """Return the noise of a call.

        Args:
            rows: `(samples, k)`, the active tokens, the same for all guidance copies of a sample;
                None for all.
            sigma: The noise level.
            args, inputs: What the transformer is called with. A call that skips layers keeps noise
                of its own, computes all tokens and leaves keys and values alone.
        """
        latents = args[0] if args else inputs["hidden_states"]
        batch, tokens = len(latents), latents.shape[1]
        if latents.ndim == 4:
            tokens = latents[0, 0].numel() // self.patch**2
        active = torch.full((batch, tokens), rows is None)
        if rows is not None:
            active.scatter_(1, rows.long().repeat(batch // len(rows), 1), True)
        text_active = rows is None or not self.reuse_text
        branch = tuple(inputs.get("skip_layers") or ())
        gains = self.note(branch, position(sigma), active)
        layers = iter(range(10**6))

        def attend(query, key, value, *args, **kwargs):
            text = key.shape[2] - tokens
            if not branch and text >= 0 and query.shape[2] == key.shape[2]:
                layer, around = next(layers), (text, 0) if self.text_first else (0, text)
                fresh = F.pad(active, around, value=text_active)[:, None, :, None]
                g = F.pad(gains * self.kv_correction, around)[:, None, :, None]
                key = self.keep((layer, "key"), key, fresh, g)
                value = self.keep((layer, "value"), value, fresh, g)
            return attention(query, key, value, *args, **kwargs)

        attention = (
            F.scaled_dot_product_attention
        )  # diffusers' dispatch_attention_fn ends there too
        with mock.patch.object(F, "scaled_dot_product_attention", attend):
            noise = self.forward(*args, **{**inputs, "return_dict": False})[0]
        return self.keep(branch, noise, self.spread(active, noise), self.spread(gains, noise))

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

    def spread(self, numbers, noise):
        """Lay out one number per token as the noise is: rows of tokens, or patches of an image."""
        if noise.ndim == 3:
            return numbers[..., None]
        height, width = (side // self.patch for side in noise.shape[2:])
        image = numbers.reshape(-1, 1, height, width)
        return image.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
