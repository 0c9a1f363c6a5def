"""One layer's site of attention: its keys and values, and what stands in for its processor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .kept import Kept, read
from .layout import Layout
from .output import HeldTokens
from .parallel import Share
from .projections import JointProjection, KeyValue, Projected, Projection
from .tokens import there


@dataclass(frozen=True)
class Walk:
    """How the tokens of one call of the transformer go, if some of them may stay behind.

    Of all that RAS is, a compiled transformer sees this and what it refers to: tensors, and
    settings that are the same in each dense step and in each partial step of a run.

    Attributes:
        held: The noise of the branch.
        layout: The tokens of a sample.
        rows: `(B, k)` tokens whose noise is fresh in this step, or None for all.
        references: `(B, r)` those of the R references that walk with them, or None for all, or for
            none if there are rows.
        gain: `(B, N)` float32, how much of its last change is added to each image token that does
            not walk, 0 for those that do; or None for nothing.
        kv_gain: `(B, N + R)` float32, the same of keys and values, those of references among them.
        whole: Whether all tokens walk all the same, and keep no keys and values.
        reuse_text: Whether the text stays behind where image tokens do.
        image_first: Whether the image comes before the text in joint attention.
        shared: Whether the rows of all samples are the same.
        image: `(B, k + r)` the rows that walk of noise and references, or None where all do.
        joint: `(B, T + k + r)` those of the model's joint sequence, its text's included.
        share: What of these is this rank's in context parallelism; None where all of it is.
    """

    held: HeldTokens
    layout: Layout
    rows: Tensor | None = None
    references: Tensor | None = None
    gain: Tensor | None = None
    kv_gain: Tensor | None = None
    whole: bool = False
    reuse_text: bool = False
    image_first: bool = False
    shared: bool = True
    image: Tensor | None = None
    joint: Tensor | None = None
    share: Share | None = None

    @property
    def active(self) -> Tensor | None:
        """The rows that walk through the blocks, or None for all."""
        return None if self.whole else self.rows

    @property
    def takes(self) -> bool:
        """Whether not all rows enter here: some stay behind, or are of other ranks."""
        return self.active is not None or self.share is not None


class KVCache:
    """One layer's keys and values, `(B, N + R + T, G, D)`: noise, references, then text.

    Beside what a token of the noise or a reference last had, how that changed may be kept, to carry
    it on.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        references: int,
        text: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        carries: bool,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        """Make room; `update` with all tokens is what fills it.

        Args:
            shape: `(B, N, G, D)`, of the noise tokens' keys.
            references, text: R and T, those that are attended to with them.
            dtype, device: Of keys and values.
            carries: Whether to keep how they change, the text's left out.
            cache_dtype: Of what is kept, `dtype` if None.
        """
        batch, tokens, *row = shape
        self._noise_tokens, self._dtype = tokens, dtype
        moving = tokens + references if carries else None
        rows = (batch, tokens + references + text, *row)
        self._key, self._value = (
            Kept.zeros(rows, moving, cache_dtype or dtype, device) for _ in range(2)
        )
        self.mask: Tensor | None = None
        """What the last step of all tokens was masked by: the model's own, one for all its layers
        where it makes but one."""

    @property
    def length(self) -> int:
        """N + R + T."""
        return self._key.rows.shape[1]

    @property
    def compressed(self) -> bool:
        """Whether codes of 8 bits are kept."""
        return self._key.scales is not None

    @property
    def heads(self) -> int:
        """G."""
        return self._key.rows.shape[2]

    def update(
        self,
        image: Projected | Projection,
        text: Projected | Projection | None,
        walk: Walk,
        references: Projected | None = None,
    ) -> KeyValue:
        """Write this step's keys and values and return those of all tokens.

        See `write`. A step of all tokens gets what it wrote, before that was rounded to codes.
        """
        if not self.compressed:
            self.write(image, text, walk, references)
            return self.read(walk)
        fresh, words = image.plain(), None if text is None else text.plain()
        beside = None if references is None else references.plain()
        self.write(fresh, words, walk, beside)
        if walk.active is not None:
            return self.read(walk)
        parts = [part for part in (fresh, beside, words) if part is not None]
        key, value = (
            torch.cat([getattr(part, name) for part in parts], 1).to(self._dtype)
            for name in ("key", "value")
        )
        return key, value

    def write(
        self,
        image: Projected | Projection,
        text: Projected | Projection | None,
        walk: Walk,
        references: Projected | None = None,
    ) -> None:
        """Write this step's keys and values.

        Args:
            image: Of the noise tokens that walk, `(B, k, G, D)`, or of all, `(B, N, G, D)`.
            text: Of the text tokens, `(B, T, G, D)`, if they are attended to with the image and
                walk in this step.
            walk: How the tokens go.
            references: Of the reference tokens that walk, `(B, r, G, D)` or `(B, R, G, D)`, where
                there are any.
        """
        tokens, active = self._noise_tokens, there(walk.active, self._key.rows)
        moving = tokens + walk.layout.references
        image.put(*self._part(0, tokens), active)
        if references is not None:
            index = None if active is None else there(walk.references, self._key.rows)
            references.put(*self._part(tokens, moving), index)
        if text is not None:
            text.put(*self._part(moving, self.length), None)

    def project(
        self, projection: JointProjection, walk: Walk
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Do `update` with what is projected here, into rows that are no codes, where there are no
        references.

        Returns:
            The queries, of the image and of the text, and the keys and values of all tokens.
        """
        active = there(walk.active, self._key.rows)
        queries = projection.put(self._key, self._value, active)
        return *queries, *self.read(walk)

    def read(self, walk: Walk) -> KeyValue:
        """Keys and values of all tokens, carried on where the walk says so."""
        gain = None if walk.kv_gain is None else walk.kv_gain.to(self._key.rows.device)
        return read(self._key, self._value, gain, self._dtype)

    def _part(self, begin: int, end: int) -> tuple[Kept, Kept]:
        return self._key.part(begin, end), self._value.part(begin, end)

    def forget_changes(self) -> None:
        """Hold keys and values as they are from now on."""
        self._key, self._value = self._key.without_changes(), self._value.without_changes()

    def reset(self) -> None:
        """Forget what was, where it is."""
        for tensor in self.tensors:
            tensor.zero_()

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return [*self._key.tensors, *self._value.tensors]


class Site:
    """The attention of one layer in the call under way.

    Attributes:
        walk: How the call's tokens go; None where RAS stands aside.
        cache: That of the branch under way.
        reached: For others to take back: whether attention has come here since.
    """

    def __init__(self, walk: Callable[[], Walk | None]) -> None:
        self.walk = walk
        self.cache: KVCache | None = None
        self.reached = False

    def attend(
        self, inner: Any, dim: int, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any
    ) -> Tensor:
        """Attend with the queries that walk over the keys and values of all tokens.

        Attention that is not this layer's own (that of an IP-adapter, of the text alone) is known
        by other lengths, or comes later, and passes by.

        Args:
            inner: The function that attends: `inner(query, key, value, mask, ...)`.
            dim: The dimension of the tokens, 1 or 2; that of the heads is the other one.
            query, key, value: Of the tokens that walk, with two such dimensions.
        """
        walk, cache = self.walk(), self.cache
        if walk is None or cache is None or self.reached:
            return inner(query, key, value, *args, **kw)
        joint = cache.length > walk.layout.image
        text = walk.layout.text if joint else 0
        if walk.active is not None and walk.reuse_text:
            text = 0
        image = walk.layout.image if walk.image is None else walk.image.shape[1]
        share, here = walk.share, text + image
        if share is not None:
            here = share.own(text) + share.own(image)
        if not query.shape[dim] == key.shape[dim] == here:
            return inner(query, key, value, *args, **kw)
        self.reached = True
        if share is None:
            return self._attend(inner, dim, text, query, key, value, *args, **kw)

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            rest = (mask, *args[1:]) if args else ()
            more = {**kw, **{name: None for name in ("parallel_config",) if name in kw}}
            more |= {} if args else {"attn_mask": mask}
            parts = (part.transpose(1, dim) for part in (query, key, value))
            return self._attend(inner, dim, text, *parts, *rest, **more).transpose(1, dim)

        mask = args[0] if args else kw.get("attn_mask")
        first = walk.image_first
        parts = (part.transpose(1, dim) for part in (query, key, value))
        output = share.attend(attend, parts, mask, text, image, image_first=first)
        return output.transpose(1, dim)

    def _attend(
        self,
        inner: Any,
        dim: int,
        text: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kw: Any,
    ) -> Tensor:
        """`attend` with all rows that walk, `text` of them the text's."""
        walk, cache = self.walk(), self.cache
        assert walk is not None and cache is not None
        joint = cache.length > walk.layout.image
        _write(walk, cache, dim, (key, value), text)
        mask = args[0] if args else kw.get("attn_mask")
        if walk.active is None:
            cache.mask = mask
            return inner(query, key, value, *args, **kw)
        if cache.mask is not None:
            mask = _cache_order(_of_queries(cache.mask, walk, joint, text), walk, joint)
            args, kw = ((mask, *args[1:]), kw) if args else (args, {**kw, "attn_mask": mask})
        kept, repeats = cache.read(walk), key.shape[3 - dim] // cache.heads
        key, value = (_as_heads(part, repeats, dim, like) for part, like in zip(kept, (key, value)))
        return inner(query, key, value, *args, **kw)

    def rotate(self, inner: Any, tokens: Tensor, *tables: Any, **kw: Any) -> Any:
        """Turn tokens by tables of the tokens that walk: where each sample has its own, one by one.

        Args:
            inner: The function that turns: `inner(tokens, *tables)`.
            tokens: `(B, n, H, D)` or `(B, H, n, D)`.
            tables: Some of diffusers' have no batch, as all samples have the same tokens there.
        """
        walk = self.walk()
        if walk is None or walk.active is None or self.cache is None:
            return inner(tokens, *tables, **kw)
        if not tokens.numel():  # text that stays behind, which not all of diffusers' take
            return tokens
        if walk.shared:
            return inner(tokens, *tables, **kw)
        turned = []
        for sample in range(len(tokens)):
            own = [_of_sample(table, sample) for table in tables]
            turned.append(inner(tokens[sample : sample + 1], *own, **kw))
        return torch.cat(turned)


class RASAttnProcessor:
    """Stands in an attention layer for the processor it found there, which it calls if idle.

    Copies and pickles of it are of that processor.
    """

    replaces: ClassVar[tuple[type, ...]]
    """The processors that compute what this one does."""

    def __init__(self, original: Any, site: Site) -> None:
        self.ras_original, self.ras_site = original, site

    def __copy__(self) -> Any:
        return copy.copy(self.ras_original)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.ras_original, memo)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _itself, (self.ras_original,)


def _itself(original: Any) -> Any:
    """What a pickle of ours is read as."""
    return original


def _write(walk: Walk, cache: KVCache, dim: int, fresh: KeyValue, text: int) -> None:
    """Write keys and values in the order of the model, of which `text` rows are the text's."""
    repeats = fresh[0].shape[3 - dim] // cache.heads
    rows = [part.transpose(1, dim)[:, :, ::repeats] for part in fresh]  # (B, n, G, D)
    count = rows[0].shape[1] - text
    start = 0 if walk.image_first else text
    noise = walk.layout.tokens if walk.active is None else walk.active.shape[1]
    ends = start + noise, start + count
    first_text = start + count if walk.image_first else 0

    def part(begin: int, end: int) -> Projected | None:
        return Projected(rows[0][:, begin:end], rows[1][:, begin:end]) if begin < end else None

    image = part(start, ends[0])
    assert image is not None
    cache.write(image, part(first_text, first_text + text), walk, part(*ends))


def _of_queries(mask: Tensor, walk: Walk, joint: bool, text: int) -> Tensor:
    """The rows of a mask that are the queries' that walk, where it has any."""
    if mask.ndim < 4 or mask.shape[-2] == 1:
        return mask
    rows = walk.joint if joint else walk.image
    assert rows is not None
    if joint and not text:  # the text stays behind
        start = 0 if walk.image_first else walk.layout.text
        assert walk.image is not None
        rows = walk.image + start
    index = rows.to(mask.device).long()[:, None, :, None]
    mask = mask.expand(len(rows), *mask.shape[1:])
    return mask.gather(2, index.expand(-1, mask.shape[1], -1, mask.shape[3]))


def _cache_order(mask: Tensor, walk: Walk, joint: bool) -> Tensor:
    """A mask with its keys, the last dimension, in the order of the cache."""
    text = walk.layout.text if joint else 0
    if walk.image_first or not text or mask.shape[-1] == 1:
        return mask
    return torch.cat([mask[..., text:], mask[..., :text]], dim=-1)


def _as_heads(kept: Tensor, repeats: int, dim: int, like: Tensor) -> Tensor:
    """What a cache has, as the model's attention takes it."""
    if repeats > 1:
        kept = kept.repeat_interleave(repeats, dim=2)
    return kept.transpose(1, dim).to(like.dtype)


def _of_sample(table: Any, sample: int) -> Any:
    """One sample's part of a table that was made to have a batch."""
    if isinstance(table, Tensor):
        return table[sample] if table.ndim == 3 else table
    if isinstance(table, tuple):
        return tuple(_of_sample(part, sample) for part in table)
    return table
