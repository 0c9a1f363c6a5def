"""Projections of tokens to queries, and to keys and values in rows of their caches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import _triton, reference
from ._checks import check_floats, check_index, check_same, check_written, shapes
from ._library import register
from ._plans import Run, launch
from ._project import GROUP, _project_kernel, tile
from ._triton import cdiv

NAMES = "query", "key", "value"
NO_TEXT: tuple[Any, ...] = (None,) * 7  # which has a text's layers, too


def linear_scatter_(
    key: Tensor,
    value: Tensor,
    index: Tensor | None,
    tokens: Tensor,
    *,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor | None = None,
    value_bias: Tensor | None = None,
    key_changes: Tensor | None = None,
    value_changes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Project tokens to keys and values, and write those into rows of the caches, in one launch.

    `key[b, index[b, j]] = tokens[b, j] @ key_weight.T + key_bias`, and likewise for the value, with
    sums in float32.

    Args:
        key, value: `(B, N, G, D)` or `(B, N, G * D)`, written in place.
        index: `(B, K)` or `(1, K)`, each row once per sample; None for the first K rows, in order.
        tokens: `(B, K, C)`.
        key_weight, value_weight: `(G * D, C)`, as of `torch.nn.Linear`.
        key_bias, value_bias: `(G * D,)`, both or neither.
        key_changes, value_changes: As `key` and `value`, maybe of their first rows alone, both or
            neither; their rows are set to what was added to those of the caches.

    Returns:
        `key` and `value` themselves.
    """
    layers = key_weight, value_weight, key_bias, value_bias
    _linear_scatter(key, value, key_changes, value_changes, index, tokens, *layers)
    return key, value


def qkv_scatter_(
    key: Tensor,
    value: Tensor,
    index: Tensor | None,
    tokens: Tensor,
    *,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] = (None, None, None),
    text: Tensor | None = None,
    text_weights: Sequence[Tensor | None] = (None, None, None),
    text_biases: Sequence[Tensor | None] = (None, None, None),
    key_changes: Tensor | None = None,
    value_changes: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Project image tokens, and text tokens by layers of their own, to Q, K and V in one launch.

    Queries are returned, keys and values written as by `linear_scatter_`: those of the image into
    rows `index` of the caches, those of the text into the last T rows.

    Args:
        key, value: `(B, S, G, D)` or `(B, S, G * D)`, written in place.
        index: `(B, K)` or `(1, K)`, in `[0, S - T)`, each row once per sample; None for the first
            K rows, in order.
        tokens: `(B, K, C)`, of the image.
        weights: Of query, key and value: `(H * D, C)` and twice `(G * D, C)`.
        biases: `(H * D,)` and twice `(G * D,)`, all or none.
        text: `(B, T, C)`, or None.
        text_weights, text_biases: The text's, of the same shapes.
        key_changes, value_changes: See `linear_scatter_`; of image rows.

    Returns:
        The queries of the image, `(B, K, H * D)`, and of the text, `(B, T, H * D)`, or None.
    """
    for name, three in (
        *(("weights", weights), ("biases", biases)),
        *(("text_weights", text_weights), ("text_biases", text_biases)),
    ):
        kinds = (
            [type(three), *map(type, three)] if isinstance(three, list | tuple) else [type(three)]
        )
        if len(kinds) != 4 or not all(issubclass(k, Tensor | type(None)) for k in kinds[1:]):
            got = ", ".join(kind.__name__ for kind in kinds[:5])
            raise TypeError(f"{name} must be three tensors, of query, key and value; got a {got}")
    own = *weights, *biases
    caches = key, value, key_changes, value_changes
    query, text_query = _qkv(*caches, index, tokens, *own, text, *text_weights, *text_biases)
    return query, None if text is None else text_query


# --- checks ---------------------------------------------------------------------------------------


def _check(
    key: Tensor,
    value: Tensor,
    key_changes: Tensor | None,
    value_changes: Tensor | None,
    index: Tensor | None,
    tokens: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    key_bias: Tensor | None,
    value_bias: Tensor | None,
) -> None:
    layers = None, key_weight, value_weight, None, key_bias, value_bias
    _check_qkv(key, value, key_changes, value_changes, index, tokens, *layers)


def _check_qkv(
    key: Tensor,
    value: Tensor,
    key_changes: Tensor | None,
    value_changes: Tensor | None,
    index: Tensor | None,
    tokens: Tensor,
    *layers: Any,
) -> None:
    if tokens.ndim != 3 or key.ndim not in (3, 4) or key.shape != value.shape:
        raise ValueError(
            "tokens must be (B, K, C), and key and value both (B, N, G, D) or (B, N, G * D); got "
            f"{shapes(tokens, key, value)}"
        )
    own, (text, *of_text) = layers[:6], layers[6:] or NO_TEXT
    written = {"key": key, "value": value}
    if (key_changes is None) != (value_changes is None):
        raise ValueError("give key_changes and value_changes, or neither")
    if index is not None:
        check_index(index, key, "key")
    count = tokens.shape[1] if index is None else index.shape[1]
    if tokens.shape[:2] != (len(key), count):
        raise ValueError(
            f"tokens must be ({len(key)}, {count}, C) by key and index; got {shapes(tokens)}"
        )
    length = 0 if text is None or text.ndim < 2 else text.shape[1]
    for name, changes in (("key_changes", key_changes), ("value_changes", value_changes)):
        if changes is None:
            continue
        written[name] = changes
        rows = changes.shape[1] if changes.ndim == key.ndim else key.shape[1]
        if changes.shape != (len(key), rows, *key.shape[2:]) or rows + length > key.shape[1]:
            raise ValueError(
                f"{name} must be {tuple(key.shape)} as key, or of its first rows; got "
                f"{tuple(changes.shape)}"
            )
    check_floats(tokens=tokens)
    read = {"tokens": tokens} | _check_layers("", own, key, tokens.shape[2])
    if text is not None:
        if text.ndim != 3 or text.shape != (len(key), length, tokens.shape[2]):
            raise ValueError(
                f"text must be ({len(key)}, T, {tokens.shape[2]}); got {tuple(text.shape)}"
            )
        if length > key.shape[1]:
            raise ValueError(f"key must have a row for each of {length} of text; got {shapes(key)}")
        read |= {"text": text} | _check_layers("text_", of_text, key, text.shape[2])
        wide = len(own[0])
        if len(of_text[0]) != wide or (of_text[3] is None) != (own[3] is None):
            raise ValueError(
                f"text_query_weight must have {wide} rows, and text_biases be given as biases are"
            )
    elif any(layer is not None for layer in of_text):
        raise ValueError("text_weights and text_biases belong to a text, and text is None")
    if count > _rows(key, value, key_changes, value_changes, index, tokens, *layers):
        raise ValueError(
            "tokens must be no more than there are rows for; got "
            f"{shapes(tokens, *written.values())}"
        )
    check_same(**read, **written)
    for name, cache in written.items():
        check_written(cache, name)


def _check_layers(of: str, layers: Sequence[Any], key: Tensor, depth: int) -> dict[str, Tensor]:
    """Weights and biases of query, key and value, by name: without a query's, two of each."""
    width, found = math.prod(key.shape[2:]), {}
    weights, biases = layers[:3], layers[3:]
    first = 0 if of or weights[0] is not None else 1
    for name, weight in zip(NAMES[first:], weights[first:]):
        given = None if weight is None else tuple(weight.shape)
        wide = len(weight) if name == "query" and weight is not None and weight.ndim else width
        if weight is None or given != (wide, depth):
            raise ValueError(f"{of}{name}_weight must be ({wide}, {depth}); got {given}")
        found[f"{of}{name}_weight"] = weight
    if len({bias is None for bias in biases[first:]}) > 1:
        names = " and ".join(f"{of}{name}_bias" for name in NAMES[first:])
        raise ValueError(f"give {names}, or none of them")
    for name, weight, bias in zip(NAMES[first:], weights[first:], biases[first:]):
        if bias is not None:
            if bias.shape != weight.shape[:1]:
                raise ValueError(
                    f"{of}{name}_bias must be ({len(weight)},); got {tuple(bias.shape)}"
                )
            found[f"{of}{name}_bias"] = bias
    return found


def _rows(
    key: Tensor,
    value: Tensor,
    key_changes: Tensor | None,
    value_changes: Tensor | None,
    index: Tensor | None,
    tokens: Tensor,
    *layers: Any,
) -> int:
    """How many rows there are for an index to name."""
    text = layers[6] if len(layers) > 6 else None
    rows = key.shape[1] - (0 if text is None else text.shape[1])
    return min([rows, *(c.shape[1] for c in (key_changes, value_changes) if c is not None)])


# --- plans ----------------------------------------------------------------------------------------


def _operands(tokens: Tensor, *given: Tensor | None) -> list[Tensor]:
    """The kernel's tensors; for one that is not given, and then not read, any other."""
    return [tokens if tensor is None else tensor for tensor in given]


def _launch(
    key: Tensor,
    value: Tensor,
    key_changes: Tensor | None,
    value_changes: Tensor | None,
    index: Tensor | None,
    tokens: Tensor,
    *layers: Any,
) -> Run | None:
    """What launches the kernel on `_operands`, for the arguments of `qkv_scatter_`."""
    written = [t for t in (key, value, key_changes, value_changes) if t is not None]
    own, text, of_text = layers[:6], layers[6], layers[7:]
    weights = [t for t in (*own[:3], *of_text[:3]) if t is not None]
    biases = [t for t in (*own[3:], *of_text[3:]) if t is not None]
    read = [tokens, *weights, *([] if text is None else [text])]
    if (
        any(tensor.stride(-1) != 1 for tensor in (*read, *written, *biases))
        or any(cache.ndim == 4 and cache.stride(2) != cache.shape[3] for cache in written)
        or len({weight.stride() for weight in weights}) > 1
    ):
        return None
    batch, count, depth = tokens.shape
    width, length = math.prod(key.shape[2:]), 0 if text is None else text.shape[1]
    wide = 0 if own[0] is None else len(own[0])
    caches = key, value, key_changes, value_changes
    queries = _fake_qkv(*caches, index, tokens, *layers) if wide else (None, None)
    operands = _operands(tokens, *caches, index, tokens, *layers, *queries)
    strides = [stride for cache in operands[:4] for stride in cache.stride()[:2]]
    strides += [*tokens.stride()[:2], *operands[12].stride()[:2], weights[0].stride(0)]
    size = tokens.element_size()
    starts = [tensor.data_ptr() // size for tensor in (*read, *written)]
    vector = math.gcd(16 // size, width, wide, depth, *strides, *starts)
    products = [(batch * rows, n) for rows in (count, length) for n in (wide, width, width)]
    chip = _triton.architecture(tokens.device), _triton.multiprocessors(tokens.device)
    block = tile(size, vector, products, *chip)
    tiles = sum(cdiv(m, block.rows) * cdiv(n, block.outputs) for m, n in products)
    return launch(
        _project_kernel,
        (tiles,),
        operands,
        *(stride // vector for stride in strides),
        0 if index is None or len(index) == 1 else index.stride(0),
        0 if index is None else index.stride(1),
        batch * count,
        count,
        batch * length,
        length,
        key.shape[1] - length,
        wide // vector,
        width // vector,
        depth // vector,
        QUERY=own[0] is not None,
        TEXT=text is not None,
        INDEX=index is not None,
        BIAS=bool(biases),
        CHANGES=key_changes is not None,
        VECTOR=vector,
        BLOCK_M=block.rows,
        BLOCK_N=block.outputs,
        BLOCK_K=block.inputs,
        GROUP=GROUP,
        num_warps=block.warps,
        num_stages=block.stages,
    )


def _plan_qkv(*args: Any) -> Run | None:
    project = _launch(*args)
    if project is None:
        return None
    sizes = [query.shape for query in _fake_qkv(*args)]

    def run(*args: Any) -> tuple[Tensor, Tensor]:
        tokens = args[5]
        query, text_query = tokens.new_empty(sizes[0]), tokens.new_empty(sizes[1])
        project(*_operands(tokens, *args, query, text_query))
        return query, text_query

    return run


def _fake_qkv(*args: Any) -> tuple[Tensor, Tensor]:
    tokens, weight, text = args[5], args[6], args[12]
    wide, length = 0 if weight is None else len(weight), 0 if text is None else text.shape[1]
    count = len(tokens), tokens.shape[1]
    return tokens.new_empty(*count, wide), tokens.new_empty(count[0], length, wide)


def _plan(*args: Any) -> Run | None:
    *caches, key_weight, value_weight, key_bias, value_bias = args
    layers = None, key_weight, value_weight, None, key_bias, value_bias
    project = _launch(*caches, *layers, *NO_TEXT)
    if project is None:
        return None

    def run(*args: Any) -> None:
        *caches, key_weight, value_weight, key_bias, value_bias = args
        layers = None, key_weight, value_weight, None, key_bias, value_bias
        project(*_operands(args[5], *caches, *layers, *NO_TEXT, None, None))

    return run


_CACHES = (
    "Tensor(a!) key, Tensor(b!) value, Tensor(c!)? key_changes, Tensor(d!)? value_changes, "
    "Tensor? index, Tensor tokens"
)
_linear_scatter = register(
    f"linear_scatter_({_CACHES}, Tensor key_weight, Tensor value_weight, Tensor? key_bias, "
    "Tensor? value_bias) -> ()",
    check=_check,
    reference=reference.linear_scatter_,
    plan=_plan,
    rows=_rows,
)
_qkv = register(
    f"qkv_scatter_({_CACHES}, Tensor query_weight, Tensor key_weight, Tensor value_weight, "
    "Tensor? query_bias, Tensor? key_bias, Tensor? value_bias, Tensor? text, "
    "Tensor? text_query_weight, Tensor? text_key_weight, Tensor? text_value_weight, "
    "Tensor? text_query_bias, Tensor? text_key_bias, Tensor? text_value_bias) "
    "-> (Tensor, Tensor)",
    check=_check_qkv,
    reference=reference.qkv_scatter_,
    plan=_plan_qkv,
    fake=_fake_qkv,
    rows=_rows,
)
