"""The launches of Triton kernels that `ras_kernels` can choose, noted instead of made.

They are found by having the ops' plans made for CPU tensors, so that the rules of tiles, vectors
and flags are those that a GPU would see. `tests/kernels/test_compiled.py` holds this list
to be complete: each kernel occurs, each flag on and off, each dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from ras_kernels import (
    _triton,
    attention,
    changes,
    drift,
    flash,
    linear,
    norm,
    quantized,
    regions,
    rows,
    states,
)
from ras_kernels._checks import FLOATS
from ras_kernels._codes import CODES

MODULES = changes, drift, flash, linear, norm, quantized, regions, rows, states
BATCH, TOKENS, TEXT, ACTIVE = 2, 4096, 333, 1024  # SD3 at 1024 x 1024, a quarter of it active
HEAD_SIZES = range(8, 257, 8)  # of which those are kept that the rules treat differently
SHORT = {
    torch.int8: "8-bit",
    torch.int16: "16-bit",
    torch.int32: "32-bit",
    torch.int64: "64-bit",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}


class Call(NamedTuple):
    """An op's plan, which has at least one launch."""

    op: str
    dtype: torch.dtype
    what: str
    run: Callable[[], Any]

    @property
    def text(self) -> str:
        return f"{SHORT[self.dtype]}, {self.what}"


class Launch(NamedTuple):
    """One launch.

    Attributes:
        kernel, grid, args: The kernel, where it runs and what it is given by position.
        options: Its constants and Triton's options, by name.
        call: What made it.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]
    call: Call

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def half(self) -> bool:
        """Whether it is for 16-bit numbers, or for what was chosen by them."""
        return self.call.dtype.itemsize == 2

    @property
    def identity(self) -> tuple[Any, ...]:
        """Alike for launches that compile to the same code, head sizes of one tile aside."""
        options = dict(self.options)
        if "SIZE1" in options:
            options["SIZE"] = options["SIZE"] == options["SIZE1"] + options["SIZE2"]
        kinds = (
            a.dtype if isinstance(a, Tensor) else isinstance(a, int) and a == 1 for a in self.args
        )
        return self.name, *kinds, *sorted(options.items())


class _Recorder:
    """Stands in for a kernel that is to be compiled."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, ...]]) -> None:
        self.kernel, self.launches = kernel, launches

    def warmup(self, *args: Any, grid: tuple[int, ...], **options: Any) -> None:
        self.launches.append((self.kernel, grid, args, options))


def kernels(module: ModuleType) -> dict[str, Any]:
    """The kernels of a module that are launched, by name."""
    return {name: value for name, value in vars(module).items() if name.endswith("_kernel")}


@contextmanager
def recording(architecture: int) -> Iterator[list[tuple[Any, ...]]]:
    """Note launches, as on a GPU of this architecture, and make none: `Launch` but for `call`."""
    launches: list[tuple[Any, ...]] = []
    with ExitStack() as stack:
        for module in MODULES:
            for name, kernel in kernels(module).items():
                stack.enter_context(patch.object(module, name, _Recorder(kernel, launches)))
        stack.enter_context(patch.object(_triton, "architecture", lambda device: architecture))
        stack.enter_context(patch.object(_triton, "multiprocessors", lambda device: 132))
        yield launches


def launches(architecture: int, ops: Iterable[str] | None = None) -> list[Launch]:
    """All launches that differ, of these ops (default: all of `OPS`)."""
    found: dict[tuple[Any, ...], Launch] = {}
    with recording(architecture) as noted:
        for call in itertools.chain.from_iterable(OPS[op]() for op in ops or OPS):
            noted.clear()
            call.run()
            if not noted:
                raise RuntimeError(f"{call.op}, {call.text}: no kernel was launched")
            for one in noted:
                launch = Launch(*one, call)
                found.setdefault(launch.identity, launch)
    return list(found.values())


def sample(launches: Iterable[Launch]) -> list[Launch]:
    """For each kernel its plainest launch and its fullest, in bfloat16 where there is any.

    For the attention heads of 64 without a mask, and of 72 with one.
    """
    by_kernel: dict[str, list[Launch]] = {}
    for launch in launches:
        by_kernel.setdefault(launch.name, []).append(launch)
    found = []
    for name, every in by_kernel.items():
        some = [launch for launch in every if launch.call.dtype in (torch.bfloat16, torch.int16)]
        some = sorted(some or every, key=lambda launch: list(launch.options.values()).count(True))
        if name == "_attention_kernel":
            some = [
                launch for launch in some if launch.call.text in ("bf16, D 64", "bf16, D 72, mask")
            ]
        found += some[:1] if len(some) == 1 else [some[0], some[-1]]
    return found


# --- the calls ------------------------------------------------------------------------------------


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")  # whose memory is none, at address 0


def index(dtype: torch.dtype = torch.int64) -> Tensor:
    return empty(BATCH, ACTIVE, dtype=dtype)


def copy_calls() -> Iterator[Call]:
    """Rows of whole vectors and tiles, narrow ones, of odd widths, transposed, by either index."""
    layouts = [
        (1536, False, torch.int64),
        (1536, False, torch.int32),
        (64, False, torch.int64),
        (64, True, torch.int64),
        (15, False, torch.int64),
    ]
    for words, (columns, across, number) in itertools.product(rows.WORDS.values(), layouts):
        tokens, new = (empty(BATCH, count, columns, dtype=words) for count in (TOKENS, ACTIVE))
        if across:
            tokens = empty(BATCH, columns, TOKENS, dtype=words).transpose(1, 2)
        text = f"C {columns}" + ", transposed" * across
        text += ", int32 index" * (number == torch.int32)
        at = index(number)
        yield Call("gather_tokens", words, text, partial(rows._plan_gather, tokens, at))
        yield Call("scatter_tokens_", words, text, partial(rows._plan_scatter, tokens, at, new))


def update_calls() -> Iterator[Call]:
    for dtype, columns, number in itertools.product(
        FLOATS, (1536, 64, 15), (torch.int64, torch.int32, None)
    ):
        tokens = empty(BATCH, TOKENS, columns, dtype=dtype)
        at, new, which = None, tokens, "all"
        if number is not None:
            at, new, which = index(number), tokens[:, :ACTIVE], SHORT[number] + " index"
        run = partial(changes._plan_update, tokens, tokens, at, new)
        yield Call("update_tokens_", dtype, f"C {columns}, {which}", run)


def carry_calls() -> Iterator[Call]:
    for dtype, columns in itertools.product(FLOATS, (1536, 64, 15)):
        tokens = empty(BATCH, TOKENS + TEXT, columns, dtype=dtype)
        gain = empty(BATCH, TOKENS, dtype=torch.float32)
        run = partial(changes._plan_carry, tokens, tokens[:, :TOKENS], gain)
        yield Call("carry_tokens", dtype, f"C {columns}", run)
        both = tokens, tokens, *(tokens[:, :TOKENS] for _ in range(2)), gain
        run = partial(changes._plan_carry_both, *both)
        yield Call("carry_keys_and_values", dtype, f"C {columns}", run)


def quantized_calls() -> Iterator[Call]:
    """Rows of all dtypes into codes of both and out again, with changes and without."""
    for dtype, codes, (heads, size), changed, number in itertools.product(
        FLOATS,
        CODES,
        ((24, 64), (40, 128), (8, 72), (3, 15)),
        (False, True),
        (torch.int64, torch.int32, None),
    ):
        cache = empty(BATCH, TOKENS, heads, size, dtype=codes)
        scales = empty(BATCH, TOKENS, heads, dtype=torch.float32)
        beside = (cache, scales) if changed else (None, None)
        text = f"{heads} x {size}, {'int8' if codes == torch.int8 else 'e4m3'}"
        text += ", changes" * changed
        at, which, count = None, ", all", TOKENS
        if number is not None:
            at, which, count = index(number), f", {SHORT[number]} index", ACTIVE
        rows = empty(BATCH, count, heads, size, dtype=dtype)
        run = partial(quantized._plan_quantize, cache, scales, *beside, at, rows)
        yield Call("quantize_tokens_", dtype, text + which, run)
        if number is None:
            gain = empty(BATCH, TOKENS, dtype=torch.float32) if changed else None
            run = partial(quantized._plan_dequantize, cache, scales, *beside, gain, dtype)
            yield Call("dequantize_tokens", dtype, text, run)


def linear_calls() -> Iterator[Call]:
    """Keys and values; with queries, and with the text's, as many as models have."""
    choices = itertools.product(FLOATS, (1536, 1533, 8), *[(False, True)] * 5)
    for dtype, width, biased, changed, indexed, query, joint in choices:
        usual = biased and width == 1536
        if not (usual or indexed) or (joint and not (usual and query)):
            continue
        cache = empty(BATCH, TOKENS + TEXT, width, dtype=dtype)
        beside = cache[:, :TOKENS] if changed else None
        tokens, weight = empty(BATCH, ACTIVE, width, dtype=dtype), empty(width, width, dtype=dtype)
        layers = [weight] * 3 + [weight[0] if biased else None] * 3
        text = [empty(BATCH, TEXT, width, dtype=dtype), *layers] if joint else linear.NO_TEXT
        given = cache, cache, beside, beside, index(torch.int32) if indexed else None, tokens
        what = f"C {width}" + ", bias" * biased + ", changes" * changed
        what += ", query" * query + ", text" * joint + ", in order" * (not indexed)
        if query:
            run = partial(linear._plan_qkv, *given, *layers, *text)
        else:
            run = partial(linear._plan, *given, *layers[:2], *layers[4:])
        if usual and indexed and not query:  # few rows, for which there may be other tiles
            few = index(torch.int32)[:, :64], tokens[:, :64], *layers[:2], *layers[4:]
            few_rows = partial(linear._plan, cache, cache, beside, beside, *few)
            yield Call("linear_scatter_", dtype, what + ", few rows", few_rows)
        yield Call("qkv_scatter_" if query else "linear_scatter_", dtype, what, run)


def norm_calls() -> Iterator[Call]:
    """All options for SD3's heads; for others the most that they can have."""
    for dtype, (heads, size), kind, weight, bias, turned in itertools.product(
        FLOATS,
        ((24, 64), (24, 96), (24, 128), (32, 72), (8, 72), (3, 10)),
        (None, *norm.NORMS),
        *[(False, True)] * 3,
    ):
        normed = kind is not None
        most = (weight, bias, turned) == (normed, normed, True)
        if (not normed and (weight or bias)) or ((heads, size) != (24, 64) and not most):
            continue
        tokens = empty(BATCH, ACTIVE, heads, size, dtype=dtype)
        cache = empty(BATCH, TOKENS + TEXT, heads, size, dtype=dtype)[:, :TOKENS]
        vector = empty(heads * size if kind == norm.NORMS[1] else size, dtype=dtype)
        turn = empty(1, ACTIVE, size // 2, 2, dtype=torch.float32) if turned else None
        options = kind, vector if weight else None, vector if bias else None, 1e-6, turn
        text = f"{heads} x {size}" + (f", {kind}" if kind else "")
        text += ", weight" * weight + ", bias" * bias + ", rotary" * turned
        yield Call("norm_rotary", dtype, text, partial(norm._plan, tokens, *options))
        for beside in (None, cache):
            run = partial(norm._plan_scatter, cache, beside, index(), tokens, *options)
            what = text + ", changes" * (beside is not None)
            yield Call("norm_rotary_scatter_", dtype, what, run)


def merge_calls() -> Iterator[Call]:
    for dtype, size in itertools.product(FLOATS, (64, 72)):
        state = (
            empty(BATCH, ACTIVE, 8, size, dtype=dtype),
            empty(BATCH, 8, ACTIVE, dtype=torch.float32),
        )
        yield Call("merge_states", dtype, f"D {size}", partial(states._plan, *state, *state))


RARE = "odd strides", "negative scale", "LSE", "two queries"


def attention_calls() -> Iterator[Call]:
    """All head sizes; keys that all may see, that a mask or lengths hide, that heads share."""
    heads = 8
    for dtype, size, form in itertools.product(
        FLOATS,
        HEAD_SIZES,
        ("", "mask", "lengths", "shared keys", *RARE),
    ):
        if form in RARE and size not in (64, 72):
            continue
        groups = 2 if form == "shared keys" else heads
        room = size + 1 if form == "odd strides" else size
        query = empty(BATCH, ACTIVE + TEXT, heads, room, dtype=dtype)[..., :size]
        key = empty(BATCH, TOKENS + TEXT, groups, room, dtype=dtype)[..., :size]
        mask = empty(BATCH, TOKENS + TEXT, dtype=torch.bool) if form == "mask" else None
        lengths = empty(BATCH, dtype=torch.int64) if form == "lengths" else None
        text = f"D {size}" + (f", {form}" if form else "")
        scale = -0.125 if form == "negative scale" else 0.125
        operands = key, key, mask, lengths, scale
        run = partial(attention._plan, query, *operands)
        if form in ("LSE", "two queries"):
            second = query[:, :TEXT] if form == "two queries" else None
            lse = empty(BATCH, heads, ACTIVE + TEXT, dtype=torch.float32) if form == "LSE" else None
            run = partial(attention._plan_into, query, second, lse, None, query, second, *operands)
        yield Call("sparse_attention", dtype, text, run)


NOISES = {"16 channels": (1, TOKENS, 64), "4 channels": (1, TOKENS, 16)}
"""SD3's latents, and Lumina-Next's, in patches of 2 x 2."""


def drift_calls() -> Iterator[Call]:
    columns = empty(1, TOKENS, dtype=torch.float32)
    for dtype, (text, shape), number in itertools.product(
        FLOATS, NOISES.items(), (torch.int32, torch.int64, None)
    ):
        noise, at, which = empty(*shape, dtype=dtype), None, "all"
        if number is not None:
            at, which = index(number)[:1], SHORT[number] + " index"
        run = partial(drift._plan_update, noise, columns, columns, at, noise, 0.5)
        yield Call("update_drift_", dtype, f"{text}, {which}", run)
    run = partial(drift._plan_scores, columns, columns, 0.5)
    yield Call("drift_scores", torch.float32, "", run)


def score_calls() -> Iterator[Call]:
    for dtype, metric, (text, shape) in itertools.product(FLOATS, regions.METRICS, NOISES.items()):
        run = partial(regions._plan_scores, empty(*shape, dtype=dtype), 4, metric)
        yield Call("region_scores", dtype, f"{metric}, {text}", run)


def select_calls() -> Iterator[Call]:
    """Those of 16 bits first, since the kernels after the first see none of the scores' dtype."""
    for dtype, number, scale in itertools.product(
        FLOATS[::-1], (torch.int32, torch.int64), (0.0, 1.0)
    ):
        scores, ages = empty(1, TOKENS, dtype=dtype), empty(1, TOKENS, dtype=number)
        run = partial(regions._plan_select, scores, ages, ACTIVE, 0.5, scale)
        text = f"{SHORT[number]} ages" + ", starvation_scale" * (scale > 0)
        yield Call("select_regions", dtype, text, run)


OPS: dict[str, Callable[[], Iterator[Call]]] = {
    "rows": copy_calls,
    "update": update_calls,
    "carry": carry_calls,
    "quantized": quantized_calls,
    "linear": linear_calls,
    "drift": drift_calls,
    "norm": norm_calls,
    "attention": attention_calls,
    "merge": merge_calls,
    "scores": score_calls,
    "select": select_calls,
}
