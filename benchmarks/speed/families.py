"""Models that are timed, their shapes, and what arXiv 2502.10389 says of the speed of two."""

from __future__ import annotations

from typing import NamedTuple

LAYERS = 24  # of both that the paper times
IMAGE_TOKENS = 4096  # of 1024 x 1024 px
START = 4  # the first step that may be sparse


class Family(NamedTuple):
    """A model, and how the paper runs it, or would: the others run as SD3 does.

    Attributes:
        title: Its name.
        heads: Of attention; Lumina-Next has a quarter as many of keys and values.
        head_dim: Their size.
        text_tokens: As the pipeline pads them; Qwen-Image's does not, so that is a prompt's.
        walking_text: How many of these go through the blocks with the image's.
        steps: Of a run.
        resets: Dense steps among the sparse ones.
        dtype: That it mostly runs in; the paper's figures are for that.
        paper: Speed-ups by ratio, on an A100 with 80 GB; none of a model that it does not time.
    """

    title: str
    heads: int
    head_dim: int
    text_tokens: int
    walking_text: int
    steps: int
    resets: tuple[int, ...]
    dtype: str
    paper: dict[float, float]

    def ceiling(self, ratio: float) -> float:
        """The speed-up at 1024 x 1024 px if time went with the tokens computed."""
        dense = START + len(self.resets)
        active = IMAGE_TOKENS - int((1 - ratio) * IMAGE_TOKENS)
        share = (active + self.walking_text) / (IMAGE_TOKENS + self.walking_text)
        return self.steps / (dense + (self.steps - dense) * share)


FAMILIES = {
    "sd3": Family(
        title="SD3-medium",
        heads=24,
        head_dim=64,
        text_tokens=333,
        walking_text=333,
        steps=28,
        resets=(12, 20),
        dtype="float16",
        paper={0.5: 1.62, 0.125: 2.44},
    ),
    "lumina": Family(
        title="Lumina-Next-T2I",
        heads=32,
        head_dim=72,
        text_tokens=256,
        walking_text=0,  # it is read by cross-attention
        steps=30,
        resets=(12, 22),
        dtype="bfloat16",
        paper={0.5: 1.56, 0.125: 2.70},
    ),
    "flux": Family(
        title="FLUX.1-dev",
        heads=24,
        head_dim=128,
        text_tokens=512,
        walking_text=512,
        steps=28,
        resets=(12, 20),
        dtype="bfloat16",
        paper={},
    ),
    "qwen": Family(
        title="Qwen-Image",
        heads=24,
        head_dim=128,
        text_tokens=128,
        walking_text=128,
        steps=28,
        resets=(12, 20),
        dtype="bfloat16",
        paper={},
    ),
    "wan": Family(
        title="Wan2.1-T2V-1.3B",
        heads=12,
        head_dim=128,
        text_tokens=512,
        walking_text=0,  # it is read by cross-attention
        steps=28,
        resets=(12, 20),
        dtype="bfloat16",
        paper={},
    ),
}
PUBLISHED = {name: family for name, family in FAMILIES.items() if family.paper}
