"""What `benchmarks.kernels` times: each op's job at each shape, ours and in plain PyTorch.

Shapes: B batch, N image tokens, T text tokens, K active ones, H query heads, G heads of keys and
values, D head size, C = H * D channels. The caches have N + T rows; of SD3's text, all rows are
computed in each step, and Lumina-Next's is read by attention of its own, so that T = 0.

A job on the device "meta" has no data, but tells its bytes and operations. Bytes are those that
have to be read or written once, indices included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ras_kernels
from ras_kernels import reference

DTYPE = torch.float16
PATCH = 2
ALONE = "one linear, nothing written"
ROUNDING = 1e-2  # how far, relative to the norm, 16-bit results of like jobs may differ


class Shape(NamedTuple):
    """A model at a resolution, of whose image tokens a share is active."""

    model: str
    side: int  # of the image, px
    ratio: float
    heads: int
    groups: int
    size: int
    channels: int  # of the latent
    text: int
    batch: int = 2  # with guidance and without

    @property
    def label(self) -> str:
        return f"{self.model}, {self.side}², {self.ratio:g}"

    @property
    def tokens(self) -> int:
        return (self.side // (8 * PATCH)) ** 2

    @property
    def active(self) -> int:
        return round(self.ratio * self.tokens)

    @property
    def width(self) -> int:
        return self.heads * self.size


SD3 = partial(Shape, "SD3-medium", heads=24, groups=24, size=64, channels=16, text=333)
LUMINA = partial(Shape, "Lumina-Next", heads=32, groups=8, size=72, channels=4, text=0)
TINY = partial(Shape, "tiny", heads=2, size=8, channels=2)
SHAPES = [
    *(model(1024, ratio) for model in (SD3, LUMINA) for ratio in (0.5, 0.25, 0.125)),
    SD3(512, 0.25),
    SD3(2048, 0.25),
]
TINY_SHAPES = [TINY(64, 0.5, groups=2, text=3), TINY(64, 0.25, groups=1, text=0)]


class Way(NamedTuple):
    """A way to do a job.

    Attributes:
        run: Does it, and returns what `Job.ours` does.
        within: A context to run it in, which is not part of it.
        part: Whether it is only part of the job, for comparison, with other results.
    """

    run: Callable[[], Tensor | Sequence[Tensor]]
    within: Callable[[], AbstractContextManager] = nullcontext
    part: bool = False


class Job(NamedTuple):
    """One op at one shape.

    Attributes:
        moved: Tensors as large as all that has to be read and written.
        flops: Of its products.
        ours: The op of `ras_kernels`.
        plain: Ways to do the same in PyTorch, by name.
        written: What is written in place, so that it can be put back between two ways.
        tolerance: How far results may differ; 0 for copies.
    """

    moved: Sequence[Tensor]
    ours: Way
    plain: dict[str, Way]
    flops: int = 0
    written: Sequence[Tensor] = ()
    tolerance: float = ROUNDING

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.moved)


def normal(device: str, *shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def active_index(s: Shape, device: str) -> Tensor:
    """(B, K) int32, ascending, as `ras_kernels.select_regions` gives it."""
    order = torch.rand(s.batch, s.tokens, device=device).argsort(1)
    return order[:, : s.active].sort(1).values.to(torch.int32)


def flat_index(index: Tensor, rows: int) -> Tensor:
    """(B * K,) int64 of the same rows in (B * rows, ...), for PyTorch's functions of one index."""
    starts = rows * torch.arange(len(index), device=index.device)[:, None]
    return (index + starts).flatten()


def gather_tokens(s: Shape, device: str) -> Job:
    """The active rows of the hidden states, (B, N, C)."""
    tokens, index = normal(device, s.batch, s.tokens, s.width), active_index(s, device)
    at, wide = flat_index(index, s.tokens), index.long()[:, :, None].expand(-1, -1, s.width)
    rows = tokens[:, : s.active]
    return Job(
        [rows, rows, index],
        Way(lambda: ras_kernels.gather_tokens(tokens, index)),
        {
            "index_select": Way(
                lambda: tokens.flatten(0, 1).index_select(0, at).view(s.batch, -1, s.width)
            ),
            "gather": Way(lambda: tokens.gather(1, wide)),
            "indexing": Way(lambda: reference.gather_tokens(tokens, index)),
        },
        tolerance=0,
    )


def scatter_tokens_(s: Shape, device: str) -> Job:
    """New keys into the image's rows of a cache, (B, N + T, G, D)."""
    cache, index = (
        normal(device, s.batch, s.tokens + s.text, s.groups, s.size),
        active_index(s, device),
    )
    rows, image = normal(device, s.batch, s.active, s.groups, s.size), cache[:, : s.tokens]
    at = flat_index(index, s.tokens + s.text)

    def index_copy() -> Tensor:
        cache.flatten(0, 1).index_copy_(0, at, rows.flatten(0, 1))
        return image

    def indexing() -> Tensor:
        reference.scatter_tokens_(image, index, rows)
        return image

    return Job(
        [rows, rows, index],
        Way(lambda: ras_kernels.scatter_tokens_(image, index, rows)),
        {"index_copy_": Way(index_copy), "indexing": Way(indexing)},
        written=[cache],
        tolerance=0,
    )


def update_tokens_(s: Shape, device: str) -> Job:
    """New keys into a cache, and how much they changed into another."""
    tokens, changes = (normal(device, s.batch, s.tokens, s.groups, s.size) for _ in range(2))
    rows, index = normal(device, s.batch, s.active, s.groups, s.size), active_index(s, device)
    at = flat_index(index, s.tokens)

    def ours() -> Sequence[Tensor]:
        ras_kernels.update_tokens_(tokens, changes, index, rows)
        return tokens, changes

    def index_copy() -> Sequence[Tensor]:
        new, all_tokens = rows.flatten(0, 1), tokens.flatten(0, 1)
        changes.flatten(0, 1).index_copy_(0, at, new - all_tokens.index_select(0, at))
        all_tokens.index_copy_(0, at, new)
        return tokens, changes

    return Job(
        [rows, rows, rows, rows, index],
        Way(ours),
        {"index_select, sub, index_copy_": Way(index_copy)},
        written=[tokens, changes],
    )


def carry_tokens(s: Shape, device: str) -> Job:
    """A cache's image rows, carried on by their last changes, with its text rows as they are."""
    tokens = normal(device, s.batch, s.tokens + s.text, s.groups, s.size)
    changes = normal(device, s.batch, s.tokens, s.groups, s.size)
    gain = normal(device, s.batch, s.tokens, dtype=torch.float32)

    def addcmul() -> Tensor:
        share = gain[:, :, None, None].to(DTYPE)
        carried = torch.addcmul(tokens[:, : s.tokens], changes, share)
        return torch.cat([carried, tokens[:, s.tokens :]], 1)

    return Job(
        [tokens, tokens, changes, gain],
        Way(lambda: ras_kernels.carry_tokens(tokens, changes, gain)),
        {"addcmul, cat": Way(addcmul)},
    )


def linear_scatter_(s: Shape, device: str) -> Job:
    """Keys and values of the active rows into the caches."""
    key, value = (normal(device, s.batch, s.tokens + s.text, s.groups * s.size) for _ in range(2))
    index, tokens = active_index(s, device), normal(device, s.batch, s.active, s.width)
    weights = normal(device, 2 * s.groups * s.size, s.width) / math.sqrt(s.width)
    bias = normal(device, 2 * s.groups * s.size)
    (key_weight, value_weight), (key_bias, value_bias) = weights.chunk(2), bias.chunk(2)
    at = flat_index(index, s.tokens + s.text)

    def put(cache: Tensor, rows: Tensor) -> None:
        cache.flatten(0, 1).index_copy_(0, at, rows.flatten(0, 1))

    def ours() -> Sequence[Tensor]:
        return ras_kernels.linear_scatter_(
            key[:, : s.tokens],
            value[:, : s.tokens],
            index,
            tokens,
            key_weight=key_weight,
            value_weight=value_weight,
            key_bias=key_bias,
            value_bias=value_bias,
        )

    def each() -> Sequence[Tensor]:
        put(key, F.linear(tokens, key_weight, key_bias))
        put(value, F.linear(tokens, value_weight, value_bias))
        return key[:, : s.tokens], value[:, : s.tokens]

    def together() -> Sequence[Tensor]:
        keys, values = F.linear(tokens, weights, bias).chunk(2, 2)
        put(key, keys)
        put(value, values)
        return key[:, : s.tokens], value[:, : s.tokens]

    rows = key[:, : s.active]
    return Job(
        [tokens, weights, bias, rows, rows, index],
        Way(ours),
        {
            "two linear, index_copy_": Way(each),
            "one linear, index_copy_": Way(together),
            ALONE: Way(lambda: F.linear(tokens, weights, bias), part=True),
        },
        flops=4 * s.batch * s.active * s.width * s.groups * s.size,
        written=[key, value],
    )


def _normed(s: Shape, device: str, heads: int) -> tuple[dict, Callable[[Tensor], Tensor]]:
    """The options for `ras_kernels.norm_rotary`, and a function that does the same in PyTorch.

    Lumina-Next normalises over all heads and turns; SD3.5, of SD3's shape, over each head alone.
    """
    if s.text:
        weight = normal(device, s.size)
        options = {"norm": "rms_norm", "weight": weight}
        return options, lambda x: F.rms_norm(x, (s.size,), weight, 1e-6)
    width = heads * s.size
    weight, bias = normal(device, width), normal(device, width)
    angles = normal(device, 1, s.active, s.size // 2, dtype=torch.float32)
    rotary = torch.polar(torch.ones_like(angles), angles)
    options = {"norm": "layer_norm_across_heads", "weight": weight, "bias": bias, "rotary": rotary}

    def plain(x: Tensor) -> Tensor:
        normed = F.layer_norm(x.flatten(2), (width,), weight, bias, 1e-6)
        pairs = torch.view_as_complex(normed.float().view(*x.shape[:3], -1, 2))
        return torch.view_as_real(pairs * rotary[:, :, None]).flatten(3).to(x.dtype)

    return options, plain


def _vectors(options: dict) -> list[Tensor]:
    return [value for value in options.values() if isinstance(value, Tensor)]


def norm_rotary(s: Shape, device: str) -> Job:
    """The active rows' queries, (B, K, H, D)."""
    tokens = normal(device, s.batch, s.active, s.heads, s.size)
    options, plain = _normed(s, device, s.heads)
    return Job(
        [tokens, tokens, *_vectors(options)],
        Way(lambda: ras_kernels.norm_rotary(tokens, **options)),
        {"norm, complex product" if s.text == 0 else "rms_norm": Way(lambda: plain(tokens))},
    )


def norm_rotary_scatter_(s: Shape, device: str) -> Job:
    """The active rows' keys, into the cache, (B, N + T, G, D)."""
    tokens = normal(device, s.batch, s.active, s.groups, s.size)
    cache, index = (
        normal(device, s.batch, s.tokens + s.text, s.groups, s.size),
        active_index(s, device),
    )
    options, plain = _normed(s, device, s.groups)
    at, image = flat_index(index, s.tokens + s.text), cache[:, : s.tokens]

    def index_copy() -> Tensor:
        cache.flatten(0, 1).index_copy_(0, at, plain(tokens).flatten(0, 1))
        return image

    return Job(
        [tokens, tokens, index, *_vectors(options)],
        Way(lambda: ras_kernels.norm_rotary_scatter_(image, index, tokens, **options)),
        {"norm, index_copy_": Way(index_copy)},
        written=[cache],
    )


BACKENDS = {
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA, efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA, math": SDPBackend.MATH,
}


def sparse_attention(s: Shape, device: str) -> Job:
    """The active rows' queries and the text's, over all keys."""
    query = normal(device, s.batch, s.active + s.text, s.heads, s.size)
    key, value = (normal(device, s.batch, s.tokens + s.text, s.groups, s.size) for _ in range(2))

    def attend(keys: Tensor, values: Tensor) -> Tensor:
        grouped = {"enable_gqa": True} if s.groups < s.heads else {}
        turned = (t.transpose(1, 2) for t in (query, keys, values))
        return F.scaled_dot_product_attention(*turned, **grouped).transpose(1, 2)

    plain = {
        name: Way(lambda: attend(key, value), partial(sdpa_kernel, backend))
        for name, backend in BACKENDS.items()
    }
    if s.text:  # whose keys and values are kept apart from the image's, and joined in each layer
        parts = [(t[:, : s.tokens], t[:, s.tokens :]) for t in (key, value)]
        for name, backend in BACKENDS.items():
            plain[f"cat, {name}"] = Way(
                lambda: attend(*(torch.cat(part, 1) for part in parts)),
                partial(sdpa_kernel, backend),
            )
    return Job(
        [query, query, key, value],
        Way(lambda: ras_kernels.sparse_attention(query, key, value)),
        plain,
        flops=4 * s.batch * s.heads * query.shape[1] * key.shape[1] * s.size,
    )


def region_scores(s: Shape, device: str) -> Job:
    """The scores of guided noise, of which there is one for each pair of the batch."""
    noise = normal(device, s.batch // 2, s.tokens, PATCH**2 * s.channels)

    def plain() -> Tensor:
        return noise.float().unflatten(2, (PATCH**2, -1)).std(3, correction=0).mean(2)

    return Job(
        [noise, noise[:, :, 0].float()],
        Way(lambda: ras_kernels.region_scores(noise, PATCH**2)),
        {"std, mean": Way(plain)},
    )


def update_drift_(s: Shape, device: str) -> Job:
    """The drift of the regions that were computed, on guided noise."""
    samples = s.batch // 2
    noise, last = (normal(device, samples, s.tokens, PATCH**2 * s.channels) for _ in range(2))
    pace, since = (torch.zeros(samples, s.tokens, device=device) for _ in range(2))
    index, values = active_index(s, device)[:samples], noise[:, : s.active]
    written = last, pace, since

    def ours() -> Sequence[Tensor]:
        ras_kernels.update_drift_(*written, index, noise, position=0.5)
        return written

    def definition() -> Sequence[Tensor]:
        reference.update_drift_(*written, index, noise, 0.5)
        return written

    columns = pace[:, : s.active]
    return Job(
        [values, values, values, columns, columns, columns, index],
        Way(ours),
        {"our definition": Way(definition)},
        written=written,
    )


def drift_scores(s: Shape, device: str) -> Job:
    """The scores that come of it."""
    pace, since = (torch.rand(s.batch // 2, s.tokens, device=device) for _ in range(2))
    return Job(
        [pace, since, pace],
        Way(lambda: ras_kernels.drift_scores(pace, since, position=0.5)),
        {"sub, abs, mul": Way(lambda: pace * (0.5 - since).abs())},
    )


def select_lowest(s: Shape, device: str) -> Job:
    """`select_regions` without ages: the regions of least score, which is all that topk can do."""
    scores, ages = _scores_and_ages(s, device)

    def topk() -> Tensor:
        return scores.topk(s.active, largest=False, sorted=False).indices.sort().values

    return Job(
        [scores, scores[:, : s.active], ages, ages],
        Way(
            lambda: ras_kernels.select_regions(
                scores, ages, s.active, high_ratio=1.0, starvation_scale=0.0
            )[0]
        ),
        {"topk, sort": Way(topk)},
        tolerance=0,
    )


def select_regions(s: Shape, device: str) -> Job:
    """With ages, which takes each region's rank."""
    scores, ages = _scores_and_ages(s, device)
    _, centre = reference.kept_ranks(s.tokens, s.active, 0.5)
    options = {"high_ratio": 0.5, "starvation_scale": 0.7}

    def topk() -> Sequence[Tensor]:
        ranks = scores.argsort(1).argsort(1)
        urgency = (ranks - centre).abs().log() - options["starvation_scale"] * ages
        active = urgency.topk(s.active, largest=False, sorted=False).indices.sort().values
        return active, (ages + 1).scatter(1, active, 0)

    return Job(
        [scores, scores[:, : s.active], ages, ages],
        Way(lambda: ras_kernels.select_regions(scores, ages, s.active, **options)),
        {
            "argsort twice, topk, sort": Way(topk),
            "our definition": Way(
                lambda: reference.select_regions(scores, ages, s.active, *options.values())
            ),
        },
        tolerance=0,
    )


def _scores_and_ages(s: Shape, device: str) -> tuple[Tensor, Tensor]:
    """Without ties, whose order is not topk's business."""
    scores = torch.rand(s.batch // 2, s.tokens, device=device).argsort(1).float()
    ages = torch.rand(scores.shape, device=device).argsort(1).to(torch.int32)
    return scores, ages


JOBS: dict[str, Callable[[Shape, str], Job]] = {
    job.__name__: job
    for job in (
        gather_tokens,
        scatter_tokens_,
        update_tokens_,
        carry_tokens,
        linear_scatter_,
        norm_rotary,
        norm_rotary_scatter_,
        sparse_attention,
        region_scores,
        update_drift_,
        drift_scores,
        select_lowest,
        select_regions,
    )
}


def prepare(op: str, shape: Shape, device: str) -> Job:
    """A job with its data, the same each time."""
    torch.manual_seed(0)
    return JOBS[op](shape, device)
