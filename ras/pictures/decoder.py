"""Latents of any step, decoded as a pipeline decodes those that its run has come to.

Pipelines unpack, scale and shift latents before they are decoded, each in its own way: by numbers
of their VAE, for each channel or each pixel of a patch. What a pipeline has handed its VAE, beside
the latents that its scheduler returned last, tells these numbers, and that there are no others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

CLOSE = 0.05  # of what is handed over, beside the straight line through it: rounding to bfloat16

Decode = Callable[[Tensor], Image.Image | None]


@contextmanager
def watched_decoder(vae: Any, tell: Callable[[Tensor, Decode], None]) -> Iterator[None]:
    """Tell of the latents that a VAE decodes, and of how to decode others, in a `with` block."""
    decode, before = getattr(vae, "decode", None), vars(vae or _Nothing).get("decode")
    if decode is None:
        yield
        return

    @functools.wraps(decode)
    def watched(*args: Any, **options: Any) -> Any:
        output = decode(*args, **options)
        if args and isinstance(args[0], Tensor):
            tell(args[0], lambda latents: _image(decode(latents, *args[1:], **options)[0]))
        return output

    vae.decode = watched
    try:
        yield
    finally:
        del vae.decode
        if before is not None:
            vae.decode = before


class _Nothing:
    """What has no VAE."""


def preparation(
    last: Tensor, prepared: Tensor, grid: tuple[int, ...]
) -> Callable[[Tensor], Tensor] | None:
    """How latents become what a VAE decodes; None if it is not by a line for each channel.

    Args:
        last: Latents as the scheduler returned them last, `(1, C, *size)`, or packed as tokens,
            `(1, N, C * p)`.
        prepared: What they became, `(S, C, *size)`, of which the first sample counts.
        grid: Of the tokens; `()` where nobody knows it.

    Returns:
        A function of latents like `last`. It gives the middle frame of a video alone.
    """
    prepared = prepared[:1]
    tokens, target = _tokens(last, grid), _tokens(prepared, grid)
    if tokens is None or target is None or tokens.shape != target.shape:
        return None
    mean, aim = tokens.mean(1, keepdim=True), target.mean(1, keepdim=True)
    spread, rise = tokens - mean, target - aim
    slope = (spread * rise).sum(1, keepdim=True)
    slope = slope / spread.square().sum(1, keepdim=True).clamp_min(1e-12)
    if bool((rise - slope * spread).norm() > CLOSE * rise.norm()):
        return None

    def prepare(latents: Tensor) -> Tensor:
        found = _tokens(latents, grid)
        assert found is not None
        return _middle(_like(prepared, aim + slope * (found - mean), grid)).to(prepared.dtype)

    return prepare


def _middle(latents: Tensor) -> Tensor:
    """That frame of a video, or all of an image."""
    if latents.ndim < 5:
        return latents
    frame = latents.shape[2] // 2
    return latents[:, :, frame : frame + 1]


def _patch(size: tuple[int, ...], grid: tuple[int, ...]) -> dict[str, int]:
    """Pixels of a token along frames, height and width; {} where they do not come out even."""
    size, grid = ((1,) * (3 - len(each)) + each for each in (size, grid or size))
    if len(grid) != 3 or any(pixels % regions for pixels, regions in zip(size, grid)):
        return {}
    return dict(zip("pqr", (pixels // regions for pixels, regions in zip(size, grid))))


def _tokens(latents: Tensor, grid: tuple[int, ...]) -> Tensor | None:
    """`(1, N, C * p)` float32, the channels of a token before its pixels."""
    latents = latents.float()
    if latents.ndim == 3:
        return latents
    patch = _patch(latents.shape[2:], grid) if latents.ndim in (4, 5) else {}
    if not patch:
        return None
    latents = latents if latents.ndim == 5 else latents[:, :, None]
    return rearrange(latents, "b c (f p) (h q) (w r) -> b (f h w) (c p q r)", **patch)


def _like(latents: Tensor, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Tokens in the shape of latents."""
    sizes = _patch(latents.shape[2:], grid)
    frames, height = (1, *latents.shape[2:])[-3], latents.shape[-2]
    sizes |= dict(f=frames // sizes["p"], h=height // sizes["q"])
    found = rearrange(tokens, "b (f h w) (c p q r) -> b c (f p) (h q) (w r)", **sizes)
    return found.reshape(latents.shape)


def _image(decoded: Tensor) -> Image.Image | None:
    """The image of pixels from -1 to 1, `(1, 3, height, width)` or of frames; None of others."""
    if decoded.ndim == 5:
        decoded = decoded[:, :, decoded.shape[2] // 2]
    if decoded.ndim != 4 or decoded.shape[1] != 3:
        return None
    pixels = (decoded[0].float() / 2 + 0.5).clamp(0, 1) * 255
    return Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
