"""What must not matter does not: results are the same with NaN, infinities and zeros in its place.

Per op: rows that no index names, keys that nobody attends to, what is overwritten, changes that are
not added, memory between strides, other samples, and memory that nobody has written to yet.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from support.operands import (
    COMPUTED,
    DEVICE,
    LAYER_NORM,
    calls,
    codes_of,
    laid,
    new_memory,
    normal,
    turns,
)
from torch import Tensor

import ras_kernels

INDEX = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32, device=DEVICE)
NAMED = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 1]], device=DEVICE) > 0
ALL = torch.ones_like(NAMED)
EXACT = dict(rtol=0, atol=0)


class Case(NamedTuple):
    """A call, and what must not matter in it.

    Attributes:
        run: A function of the tensors; it returns what must not be reached.
        tensors: By argument.
        idle: For some arguments what must not matter, over their first dimensions.
    """

    run: Callable
    tensors: dict[str, Tensor]
    idle: dict[str, Tensor]


def poisons(tensor):
    if tensor.is_floating_point():
        return [math.nan, math.inf, -math.inf, torch.finfo(tensor.dtype).max]
    bounds = torch.iinfo(tensor.dtype)
    return [bounds.min, bounds.max] * 2


def filled(tensor, idle, value):
    return tensor.masked_fill(idle.view(*idle.shape, *[1] * (tensor.ndim - idle.ndim)), value)


def rows(op, *names):
    """What an op writes to the rows of its index, in the tensors `names`."""

    def run(index=INDEX, **tensors):
        op(index=index, **tensors)
        index = torch.arange(5, device=DEVICE)[None] if index is None else index
        return [ras_kernels.gather_tokens(tensors[name], index) for name in names]

    return run


def attention_cases(dtype):
    """Of one tile of keys and a part; with heads in one piece, in two, and the widest."""
    keys = torch.arange(70, device=DEVICE)
    lengths = torch.tensor([70, 37, 64, 0, -1], device=DEVICE)
    some = normal(5, 70, seed=3) > 0
    some[0], some[2, :64], some[3], some[4, :6] = True, False, False, True
    for size in (8, 72, 128):
        tensors = dict(
            query=normal(5, 3, 2, size, dtype=dtype),
            key=normal(5, 70, 1, size, seed=1, dtype=dtype),
            value=normal(5, 70, 1, size, seed=2, dtype=dtype),
        )
        for name, seen, option in (
            ("lengths", keys < lengths[:, None], dict(key_lengths=lengths)),
            ("mask", some, dict(key_mask=some)),
        ):
            idle = dict(key=~seen, value=~seen, query=~seen.any(1))
            run = partial(ras_kernels.sparse_attention, **option)
            yield f"sparse_attention, {name}, D {size}", Case(run, tensors, idle)


def cases(dtype=torch.float32):
    some = partial(normal, dtype=dtype)
    heads, new = (2, 5, 2, 4), some(2, 2, 2, 4, seed=1)
    gain = torch.tensor([[0.5, 0, 2, 0], [0, 0, -1, 1]], device=DEVICE)
    columns = dict(pace=normal(2, 5, seed=2).abs(), since=normal(2, 5, seed=3))
    drift = partial(ras_kernels.update_drift_, position=0.5)
    codes, others = (
        dict(zip((f"{name}codes", f"{name}scales"), codes_of(*heads, seed=seed)))
        for name, seed in (("", 2), ("change_", 3))
    )
    moving = {name: part[:, :4] for name, part in others.items()}
    noted = dict(last=some(2, 5, 6), noise=some(2, 5, 6, seed=1), **columns)
    weights = dict(key_weight=some(8, 3, seed=2), value_weight=some(8, 3, seed=3))
    caches = dict(key=some(*heads), value=some(*heads, seed=4))
    beside = dict(key_changes=some(*heads, seed=5), value_changes=some(*heads, seed=6))
    projected = dict(tokens=some(2, 2, 3, seed=7), **weights)
    select = partial(ras_kernels.select_regions, high_ratio=0.3)
    ranked = dict(scores=some(2, 5), ages=torch.arange(10, device=DEVICE).view(2, 5))
    found = {
        "gather_tokens": Case(
            partial(ras_kernels.gather_tokens, index=INDEX),
            dict(tokens=some(*heads)),
            dict(tokens=~NAMED),
        ),
        "scatter_tokens_": Case(
            rows(ras_kernels.scatter_tokens_, "tokens"),
            dict(tokens=some(*heads), rows=new),
            dict(tokens=ALL),
        ),
        "update_tokens_": Case(
            rows(ras_kernels.update_tokens_, "tokens", "changes"),
            dict(tokens=some(*heads), changes=some(*heads), rows=new),
            dict(tokens=~NAMED, changes=ALL),
        ),
        "update_tokens_, all": Case(
            partial(rows(ras_kernels.update_tokens_, "tokens", "changes"), index=None),
            dict(tokens=some(*heads), changes=some(*heads), rows=some(*heads, seed=1)),
            dict(changes=ALL),
        ),
        "carry_tokens": Case(
            ras_kernels.carry_tokens,
            dict(tokens=some(*heads), changes=some(2, 4, 2, 4, seed=1), gain=gain),
            dict(changes=gain == 0),
        ),
        "carry_keys_and_values": Case(
            ras_kernels.carry_keys_and_values,
            dict(key=some(*heads), value=some(*heads, seed=2), gain=gain)
            | {name: some(2, 4, 2, 4, seed=1) for name in ("key_changes", "value_changes")},
            dict(key_changes=gain == 0, value_changes=gain == 0),
        ),
        "quantize_tokens_": Case(
            rows(ras_kernels.quantize_tokens_, *codes),
            codes | dict(rows=new),
            dict(codes=ALL, scales=ALL),
        ),
        "quantize_tokens_, changes": Case(
            rows(ras_kernels.quantize_tokens_, *codes, *others),
            codes | others | dict(rows=new),
            dict(codes=~NAMED, scales=~NAMED, change_codes=ALL, change_scales=ALL),
        ),
        "dequantize_tokens": Case(
            partial(ras_kernels.dequantize_tokens, dtype=dtype),
            codes | moving | dict(gain=gain),
            dict(change_codes=gain == 0, change_scales=gain == 0),
        ),
        "update_drift_": Case(
            rows(drift, "last", "pace", "since"),
            noted,
            dict(last=~NAMED, noise=~NAMED, since=~NAMED, pace=ALL),
        ),
        "update_drift_, all": Case(
            partial(rows(drift, "last", "pace", "since"), index=None), noted, dict(pace=ALL)
        ),
        "select_regions, all chosen": Case(
            partial(select, num_active=5, starvation_scale=1.0), ranked, dict(scores=ALL)
        ),
        "select_regions, ages of no weight": Case(
            lambda **tensors: select(**tensors, num_active=2, starvation_scale=0.0)[0],
            ranked,
            dict(ages=ALL),
        ),
        "linear_scatter_": Case(
            rows(ras_kernels.linear_scatter_, *caches),
            caches | projected,
            dict(key=ALL, value=ALL),
        ),
        "linear_scatter_, changes": Case(
            rows(ras_kernels.linear_scatter_, *caches, *beside),
            caches | beside | projected,
            dict(key=~NAMED, value=~NAMED, key_changes=ALL, value_changes=ALL),
        ),
    }
    states = dict(out_a=some(*heads), out_b=some(*heads, seed=1))
    gone, there = torch.full((2, 2, 5), -torch.inf, device=DEVICE), normal(2, 2, 5)
    for name, lses in (("a", (gone, there)), ("b", (there, gone))):
        tensors = states | dict(zip(("lse_a", "lse_b"), lses))
        found[f"merge_states, {name}"] = Case(
            ras_kernels.merge_states, tensors, {f"out_{name}": ALL}
        )
    for norm in (None, *ras_kernels.NORMS):
        weight = some(8 if norm == LAYER_NORM else 4, seed=2)
        options = dict(norm=norm, rotary=turns(2, 2, 2), weight=weight if norm else None)
        op = partial(ras_kernels.norm_rotary_scatter_, **options)
        out, changes = dict(out=some(*heads)), dict(changes=some(*heads, seed=3))
        found |= {
            f"norm_rotary_scatter_, {norm}": Case(
                rows(op, "out"), out | dict(tokens=new), dict(out=ALL)
            ),
            f"norm_rotary_scatter_, {norm}, changes": Case(
                rows(op, "out", "changes"),
                out | changes | dict(tokens=new),
                dict(out=~NAMED, changes=ALL),
            ),
        }
    return found | dict(attention_cases(dtype))


@pytest.mark.parametrize("dtype", COMPUTED, ids=str)
@pytest.mark.parametrize("name", cases())
def test_what_an_argument_says_not_to_matter(name, dtype):
    run, tensors, idle = cases(dtype)[name]

    def result(kind=None):
        """With zeros, or poison of one kind."""
        given = {argument: tensor.clone() for argument, tensor in tensors.items()}
        for argument, where in idle.items():
            value = 0 if kind is None else poisons(tensors[argument])[kind]
            given[argument] = filled(tensors[argument], where, value)
        return run(**given)

    clean = result()
    for kind in range(4):
        torch.testing.assert_close(result(kind), clean, **EXACT)


@pytest.mark.parametrize("option", ["key_mask", "key_lengths"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_without_a_key_to_attend_to_there_are_zeros(option, poison):
    """Of the first and the last sample of three."""
    query, key, value = (torch.full((3, 2, 2, 8), poison, device=DEVICE) for _ in range(3))
    query[1], key[1], value[1] = 1, 1, 1
    lengths = torch.tensor([0, 2, 0], device=DEVICE)
    mask = lengths[:, None].expand(3, 2) > 0
    given = mask if option == "key_mask" else lengths
    found = ras_kernels.sparse_attention(query, key, value, **{option: given})
    torch.testing.assert_close(found, (lengths > 0).float()[:, None, None, None].expand_as(found))


def results(name, tensors):
    """What an op of `calls` returns, and what it may have written to."""
    found = calls()[name][0](**tensors)
    found = [] if found is None else list(found) if isinstance(found, tuple) else [found]
    return [*found, *tensors.values()]


MEET = {
    *(("sparse_attention", name) for name in ("key", "value")),
    *(("sparse_attention, two queries", name) for name in ("key", "value")),
    *(("merge_states", name) for name in ("lse_a", "lse_b")),  # whose second dimension is of heads
    ("select_regions", "scores"),
}


@pytest.mark.parametrize("dim", [0, 1], ids=["samples", "rows"])
@pytest.mark.parametrize("name", calls())
def test_what_does_not_meet(name, dim):
    """The first sample does not reach the others; nor does the first row, but where rows meet."""

    def result(argument, value):
        tensors = calls()[name][1]
        if "index" in tensors:
            tensors["index"] = torch.arange(3, device=DEVICE)[None]
        tensors[argument].select(dim, 0).fill_(value)
        return [t.narrow(dim, 1, 2) for t in results(name, tensors) if t.shape[:2] == (3, 3)]

    for argument, tensor in calls()[name][1].items():
        if tensor.shape[:2] != (3, 3) or not tensor.is_floating_point():
            continue
        if dim == 0 or (name, argument) not in MEET:
            clean = result(argument, 0)
            for value in poisons(tensor):
                torch.testing.assert_close(result(argument, value), clean, **EXACT)


@pytest.mark.parametrize("layout", ["part", "gaps"])
@pytest.mark.parametrize("name", calls())
def test_what_lies_between_strides(name, layout):
    def result(poison):
        tensors = calls()[name][1]
        return results(name, {key: laid(t, layout, poison) for key, t in tensors.items()})

    clean = result(0)
    for value in poisons(torch.empty(0, dtype=torch.float16)):  # for float32 inf and NaN do
        torch.testing.assert_close(result(value), clean, **EXACT)


@pytest.mark.parametrize("name", calls())
def test_what_new_memory_holds(name):
    """Outputs, and what kernels keep on the way."""
    found = []
    for poisoned in (False, True):
        tensors = calls()[name][1]
        with new_memory(poisoned):
            found.append(results(name, tensors))
    torch.testing.assert_close(*found, **EXACT)
