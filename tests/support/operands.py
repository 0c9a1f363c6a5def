"""What tests call the ops of `ras_kernels` with, in many layouts, and how results are checked.

The oracle is the ops' definition in float64, whatever runs them here: on a GPU compiled kernels;
with TRITON_INTERPRET=1 (see `test_interpreter.py`) Triton's interpreter; otherwise the definitions,
which `test_ops.py` holds against plain loops.
"""

import contextlib
import math
from functools import partial

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import ras_kernels
from ras_kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu" and ras_kernels.backend("cpu") == "triton"

COMPUTED = [torch.float32, torch.float16, torch.bfloat16]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
LAYER_NORM = "layer_norm_across_heads"

# The interpreter takes seconds for what definitions and compiled kernels do in milliseconds.
few = settings(
    max_examples=6 if INTERPRETED else 12, deadline=None, derandomize=True, database=None
)
more = settings(few, max_examples=12 if INTERPRETED else 25)

batches, counts = st.integers(0, 3), st.integers(1, 9) | st.just(70)
trailing = st.sampled_from([(), (1,), (9,), (72,), (2, 5), (4, 9), (2, 3, 4), (0,), (1030,)])


# --- tensors --------------------------------------------------------------------------------------


def normal(*shape, seed=0, dtype=torch.float32):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, dtype)


half = partial(normal, dtype=torch.float16)


def codes_of(*shape, seed=0, dtype=torch.int8):
    """Codes of a cache of 8 bits, with their scales."""
    codes, scales = torch.zeros(shape, dtype=dtype), torch.zeros(shape[:-1])
    reference.quantize_tokens_(codes, scales, None, None, None, normal(*shape, seed=seed).cpu())
    return codes.to(DEVICE), scales.to(DEVICE)


def any_bits(*shape, seed=0, dtype):
    """NaNs of all kinds among them."""
    count, generator = math.prod(shape) * dtype.itemsize, torch.Generator().manual_seed(seed)
    values = torch.randint(256, (count,), dtype=torch.uint8, generator=generator)
    return values.view(dtype).view(shape).to(DEVICE)


def turns(*shape):
    return torch.polar(torch.ones(shape, device=DEVICE), normal(*shape, seed=5))


LAYOUTS = ["dense", "offset", "rows", "part", "rows first", "heads first", "gaps"]
READ = [*LAYOUTS, "expanded"]
layouts, read = st.sampled_from(LAYOUTS), st.sampled_from(READ)


def laid(tensor, how, poison=math.nan):
    """The same values in a storage that is poisoned wherever they do not lie.

    `offset` is contiguous, but starts at an odd place; `rows` and `part` lie within a larger
    tensor, the first so that rows stay as aligned as they were; `gaps` takes every second column;
    `expanded` repeats the first sample.
    """
    poison = poison if tensor.is_floating_point() or tensor.is_complex() else 77
    if how == "expanded":
        return laid(tensor[:1], "part", poison).expand_as(tensor)
    if how == "offset":
        whole = tensor.new_full([tensor.numel() + 2], poison)
        return whole[1:-1].view(tensor.shape).copy_(tensor)
    dims = range(tensor.ndim)
    order = [*dims]
    first = {"rows first": 0, "heads first": 1}.get(how, tensor.ndim)
    order[first : first + 2] = reversed(order[first : first + 2])
    edges = [{"dense": 0, "rows": int(dim == 1)}.get(how, 1) for dim in dims]
    steps = [2 if how == "gaps" and dim == tensor.ndim - 1 else 1 for dim in dims]
    room = [2 * edge + step * size for edge, step, size in zip(edges, steps, tensor.shape)]
    whole = tensor.new_full([room[dim] for dim in order], poison)
    parts = [slice(e, e + step * size, step) for e, step, size in zip(edges, steps, tensor.shape)]
    return whole.permute([order.index(dim) for dim in dims])[tuple(parts)].copy_(tensor)


def far(tensor, dim):
    """The same values, so far apart along `dim` that the last lies 2**31 elements from the first.

    What lies between is never touched, and takes no memory on Linux.
    """
    strides = list(tensor.contiguous().stride())
    strides[dim] = 64 * math.ceil(2**31 / 64 / (tensor.shape[dim] - 1))
    size = 1 + sum(stride * (size - 1) for stride, size in zip(strides, tensor.shape))
    return tensor.new_empty(size).as_strided(tensor.shape, strides).copy_(tensor)


def bits(tensor):
    return tensor.contiguous().view(BITS[tensor.element_size()])


def outside(tensor, index):
    """The bits of all that lies in the storage of `tensor`, but for its rows `index`."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    written = torch.zeros(size, dtype=torch.bool, device=tensor.device)
    rows = written.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    reference.scatter_tokens_(rows, index, True)
    return bits(tensor.as_strided((size,), (1,), 0)[~written])


@contextlib.contextmanager
def only_rows(index, *tensors):
    """Nothing else is written in the storages of the tensors."""
    before = [outside(tensor, index) for tensor in tensors]
    yield
    for tensor, bits_before in zip(tensors, before):
        assert torch.equal(outside(tensor, index), bits_before)


@st.composite
def indices(draw, batch, tokens):
    """`(B, K)` or `(1, K)`, in any order and layout."""
    count = draw(st.sampled_from([1, tokens]) | st.integers(0, tokens))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    order = torch.rand(draw(st.sampled_from([batch, 1])), tokens, generator=generator).argsort(1)
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return laid(order[:, :count].to(DEVICE, dtype), draw(read))


@contextlib.contextmanager
def new_memory(poisoned):
    """Filled with NaN and the largest integers by PyTorch when it is allocated, or as it comes."""
    deterministic = torch.utils.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = poisoned
    try:
        assert not poisoned or torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        deterministic.fill_uninitialized_memory = True  # its default
        torch.use_deterministic_algorithms(False)


# --- tolerance ------------------------------------------------------------------------------------


def wide(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def check(found, exact, same):
    """At most twice the error that the definition itself makes in this dtype, and one rounding."""
    assert found.shape == exact.shape and found.dtype == same.dtype
    if not exact.numel():
        return
    rounding = torch.finfo(found.dtype).eps * exact.abs().max().item()
    error, error_of_same = ((t.double() - exact).abs().max().item() for t in (found, same))
    assert error_of_same <= 16 * rounding  # or the bound below would say nothing
    assert error <= 2 * error_of_same + rounding


# --- all ops --------------------------------------------------------------------------------------


def qkv_scatter(**tensors):
    """With weights and biases by the names that errors have for them."""
    return ras_kernels.qkv_scatter_(**by_three(tensors))


def by_three(tensors):
    """Weights and biases of query, key and value in one."""
    tensors = dict(tensors)
    layers = {
        f"{of}{plural}": [tensors.pop(f"{of}{name}_{one}") for name in ("query", "key", "value")]
        for of in ("", "text_")
        for plural, one in (("weights", "weight"), ("biases", "bias"))
    }
    return tensors | layers


def calls():
    """Each op, with all that it takes: a function of tensors, and the tensors."""
    index = torch.tensor([[2, 0, 1], [1, 2, 0], [0, 1, 2]], dtype=torch.int32, device=DEVICE)
    tokens, rows, heads = (3, 3, 3, 4), half(3, 3, 3, 4, seed=1), (3, 3, 3, 8)
    norm = dict(weight=half(24, seed=2), bias=half(24, seed=3), rotary=turns(3, 3, 4))
    select = partial(ras_kernels.select_regions, num_active=2, high_ratio=0.3, starvation_scale=1.0)
    ages = torch.arange(9, device=DEVICE).view(3, 3)
    codes, beside = (
        dict(zip((f"{name}codes", f"{name}scales"), codes_of(*tokens, seed=seed)))
        for name, seed in (("", 6), ("change_", 7))
    )
    return {
        "gather_tokens": (ras_kernels.gather_tokens, dict(tokens=half(*tokens), index=index)),
        "scatter_tokens_": (
            ras_kernels.scatter_tokens_,
            dict(tokens=half(*tokens), index=index, rows=rows),
        ),
        "update_tokens_": (
            ras_kernels.update_tokens_,
            dict(tokens=half(*tokens), changes=half(*tokens, seed=2), index=index, rows=rows),
        ),
        "carry_tokens": (
            ras_kernels.carry_tokens,
            dict(tokens=half(*tokens), changes=rows, gain=normal(3, 3)),
        ),
        "carry_keys_and_values": (
            ras_kernels.carry_keys_and_values,
            dict(
                key=half(*tokens),
                value=half(*tokens, seed=2),
                key_changes=rows,
                value_changes=half(*tokens, seed=3),
                gain=normal(3, 3),
            ),
        ),
        "quantize_tokens_": (
            ras_kernels.quantize_tokens_,
            dict(**codes, **beside, index=index, rows=rows),
        ),
        "dequantize_tokens": (
            partial(ras_kernels.dequantize_tokens, dtype=torch.float16),
            dict(**codes, **beside, gain=normal(3, 3)),
        ),
        "sparse_attention": (
            ras_kernels.sparse_attention,
            dict(query=half(*heads), key=half(*heads, seed=1), value=half(*heads, seed=2)),
        ),
        "sparse_attention, two queries": (
            _two_queries,
            dict(
                query=half(*heads),
                second=half(*heads, seed=3),
                key=half(*heads, seed=1),
                value=half(*heads, seed=2),
            ),
        ),
        "merge_states": (
            _merged,
            dict(
                out_a=half(*heads),
                lse_a=normal(3, 3, 3),
                out_b=half(*heads, seed=1),
                lse_b=normal(3, 3, 3, seed=1),
            ),
        ),
        "region_scores": (
            partial(ras_kernels.region_scores, pixels=4),
            dict(noise=half(3, 3, 16)),
        ),
        "update_drift_": (
            partial(ras_kernels.update_drift_, position=0.5),
            dict(
                last=half(3, 3, 16, seed=1),
                pace=normal(3, 3),
                since=normal(3, 3, seed=1),
                index=index,
                noise=half(3, 3, 16),
            ),
        ),
        "drift_scores": (
            partial(ras_kernels.drift_scores, position=0.5),
            dict(pace=normal(3, 3), since=normal(3, 3, seed=1)),
        ),
        "select_regions": (select, dict(scores=half(3, 3), ages=ages)),
        "norm_rotary": (
            partial(ras_kernels.norm_rotary, norm=LAYER_NORM),
            dict(tokens=half(*heads), **norm),
        ),
        "norm_rotary_scatter_": (
            partial(ras_kernels.norm_rotary_scatter_, norm=LAYER_NORM),
            dict(
                out=half(*heads, seed=4),
                changes=half(*heads, seed=5),
                index=index,
                tokens=half(*heads),
                **norm,
            ),
        ),
        "norm_rotary_scatter_, per head": (
            partial(ras_kernels.norm_rotary_scatter_, norm="rms_norm"),
            dict(
                out=half(*heads, seed=4),
                changes=half(*heads, seed=5),
                index=index,
                tokens=half(*heads),
                rotary=norm["rotary"],
            ),
        ),
        "linear_scatter_": (
            ras_kernels.linear_scatter_,
            dict(
                key=half(*heads, seed=1),
                value=half(*heads, seed=2),
                index=index,
                tokens=half(3, 3, 16),
                key_weight=half(24, 16, seed=3),
                value_weight=half(24, 16, seed=4),
                key_bias=half(24, seed=5),
                value_bias=half(24, seed=6),
                key_changes=half(*heads, seed=7),
                value_changes=half(*heads, seed=8),
            ),
        ),
        "qkv_scatter_": (
            qkv_scatter,
            dict(
                key=half(3, 5, 3, 8, seed=1),
                value=half(3, 5, 3, 8, seed=2),
                index=index,
                tokens=half(3, 3, 16),
                text=half(3, 2, 16, seed=9),
                key_changes=half(*heads, seed=7),
                value_changes=half(*heads, seed=8),
                **{
                    f"{of}{name}_{part}": half(*shape, seed=3 + seed + len(of))
                    for of in ("", "text_")
                    for seed, name in enumerate(("query", "key", "value"))
                    for part, shape in (("weight", (24, 16)), ("bias", (24,)))
                },
            ),
        ),
    }


def _two_queries(query, second, key, value):
    """All of it by row, so that row and row can be compared."""
    outs, lses = ras_kernels.sparse_attention((query, second), key, value, return_lse=True)
    return *outs, *(lse.transpose(1, 2) for lse in lses)


def _merged(out_a, lse_a, out_b, lse_b):
    out, lse = ras_kernels.merge_states(out_a, lse_a, out_b, lse_b)
    return out, lse.transpose(1, 2)


class Recorder(TorchDispatchMode):
    """Notes which ops of the package are called, and with what."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ras_kernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def recorded(name, layout="dense"):
    """The op that the public function calls, and its arguments."""
    call, tensors = calls()[name]
    with Recorder() as recorder:
        call(**{argument: laid(tensor, layout) for argument, tensor in tensors.items()})
    return recorder.calls[-1]
