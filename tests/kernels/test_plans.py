"""What is worked out once for each kind of arguments, and launches that go by it."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from support.operands import calls, half, normal, recorded

import ras_kernels
from ras_kernels import _plans, _triton

if _triton.triton is None or _triton.INTERPRETED:
    pytest.skip("compiles Triton kernels, which are not to be interpreted", allow_module_level=True)

from benchmarks.kernels import host, variants
from benchmarks.kernels.chips import CHIPS
from benchmarks.kernels.host import IdleDriver, as_if_on

H100 = CHIPS["H100"]


def test_a_plan_is_made_once_for_each_kind():
    made = []

    def plan(*args):
        made.append(args)
        return lambda *args: len(made)

    run, whole = _plans.remembered(plan), half(4, 8, 16)
    dense = whole[:2, :4].contiguous()
    kinds = [
        (dense, 1.0, None),
        (dense[:, :3].contiguous(), 1.0, None),
        (whole[:2, :4], 1.0, None),
        (whole.flatten()[1:129].view(2, 4, 16), 1.0, None),  # 2 bytes past a multiple of 16
        (dense.bfloat16(), 1.0, None),
        (dense.to("meta"), 1.0, None),
        (dense, 2.0, None),
        (dense, 1.0, dense),
    ]
    for count, kind in enumerate(kinds, 1):
        assert run(*kind) == count
    for kind in kinds:
        like = [a.clone() if torch.is_tensor(a) and a.is_contiguous() else a for a in kind]
        assert run(*(kind if kind is kinds[3] else like)) == len(kinds)


def test_what_raises_is_not_remembered_nor_more_than_so_many(monkeypatch):
    monkeypatch.setattr(_plans, "MOST", 2)
    made = []

    def plan(number):
        made.append(number)
        if number < 0:
            raise ValueError(number)
        return lambda number: number

    run = _plans.remembered(plan)
    for _ in range(2):
        with pytest.raises(ValueError):
            run(-1)
    assert [run(number) for number in (1, 2, 1, 2, 3, 1)] == [1, 2, 1, 2, 3, 1]
    assert made == [-1, -1, 1, 2, 3, 1]  # 1 again, since the third was too much


@pytest.mark.parametrize("name", calls())
def test_wrong_arguments_are_named_although_right_ones_are_known(name):
    launched = []
    call, tensors = calls()[name]
    with as_if_on(IdleDriver(H100, lambda *_: launched.append(_))):
        call(**tensors)
        call(**tensors)
        count = len(launched)
        for argument, tensor in tensors.items():
            with pytest.raises(ValueError, match=rf"\b{argument}\b|scores and ages"):
                call(**{**tensors, argument: tensor.flatten()[:1]})
        assert len(launched) == count > 0


@pytest.mark.parametrize("name", calls())
def test_launches_are_those_that_triton_would_make(monkeypatch, name):
    """Of the same code, with the same grid and arguments, at the first call and at later ones."""
    launched, expected = [], []

    def both(kernel, grid, tensors, *numbers, **constants):
        kernel[tuple(grid)](*tensors, *numbers, **constants)
        expected.append(seen(launched.pop()))
        return launch(kernel, grid, tensors, *numbers, **constants)

    def seen(launch):
        """The grid, the stream, the code, what Triton says of it and the arguments."""
        kinds = [
            (a.dtype.itemsize, a.shape, a.data_ptr() % 16) if torch.is_tensor(a) else a
            for a in launch[9:]
        ]
        return *launch[:6], *kinds

    launch = _plans.launch
    for module in variants.MODULES:
        monkeypatch.setattr(module, "launch", both)
    call, _ = calls()[name]
    with as_if_on(IdleDriver(H100, lambda *told: launched.append(told))):
        for _ in range(3):
            call(**calls()[name][1])
            assert [seen(one) for one in launched] == expected != []
            launched.clear()


@pytest.mark.parametrize("name", calls())
def test_a_plan_keeps_no_tensors(name):
    with as_if_on(IdleDriver(H100)):
        call, tensors = calls()[name]
        returned = call(**tensors)
        returned = returned if isinstance(returned, tuple) else (returned,)
        alive = [weakref.ref(t) for t in (*tensors.values(), *returned) if t is not None]
        del tensors, returned
        gc.collect()
        assert not any(one() is not None for one in alive)


@pytest.mark.parametrize("hook", ["enter", "exit"])
def test_a_profiler_is_told_of_launches(hook):
    told = []
    chain = getattr(_triton.triton.knobs.runtime, f"launch_{hook}_hook")

    def note(metadata):
        told.append(metadata.get()["name"])

    def launched(*args):
        for given in args[7:9]:  # the hooks, which Triton's own launcher calls
            if given is not None:
                given(args[6])

    call, tensors = calls()["gather_tokens"]
    with as_if_on(IdleDriver(H100, launched)):
        call(**tensors)
        chain.add(note)
        try:
            call(**tensors)
        finally:
            chain.remove(note)
        call(**tensors)
    assert told == ["_copy_rows_kernel"]


COUNTS = 16, 48, 17, 1, 333


def of_rows(op, count):
    """Calls for another number of active tokens."""
    heads, index = (2, count, 2, 24), torch.arange(count)[None]
    cache, flat = half(2, 400, 2, 24), half(2, 400, 24)
    return {
        "gather_tokens": lambda: ras_kernels.gather_tokens(flat, index),
        "scatter_tokens_": lambda: ras_kernels.scatter_tokens_(flat, index, half(2, count, 24)),
        "update_tokens_": lambda: ras_kernels.update_tokens_(
            flat, flat.clone(), index, half(2, count, 24)
        ),
        "carry_tokens": lambda: ras_kernels.carry_tokens(cache, half(*heads), normal(2, count)),
        "carry_keys_and_values": lambda: ras_kernels.carry_keys_and_values(
            cache, cache, half(*heads), half(*heads), normal(2, count)
        ),
        "sparse_attention": lambda: ras_kernels.sparse_attention(half(*heads), cache, cache),
        "norm_rotary": lambda: ras_kernels.norm_rotary(half(*heads), norm="rms_norm"),
        "norm_rotary_scatter_": lambda: ras_kernels.norm_rotary_scatter_(
            cache, index, half(*heads)
        ),
    }[op]()


@pytest.mark.parametrize(
    "name",
    [
        "gather_tokens",
        "scatter_tokens_",
        "update_tokens_",
        "carry_tokens",
        "carry_keys_and_values",
        "sparse_attention",
        "norm_rotary",
        "norm_rotary_scatter_",
    ],
)
def test_another_number_of_tokens_compiles_nothing_anew(name):
    driver, loaded = IdleDriver(H100), []
    load = driver.utils.load_binary
    driver.utils.load_binary = lambda *args: loaded.append(args[0]) or load(*args)
    with as_if_on(driver):
        for count in COUNTS:
            of_rows(name, count)
    assert len(loaded) == 1


def test_the_hosts_time(monkeypatch, capsys):
    monkeypatch.setattr(host, "CALLS", 5)
    monkeypatch.setattr(host, "ROUNDS", 20)
    monkeypatch.setattr(host, "MODELS", host.MODELS[:1])
    monkeypatch.setattr(host, "JOBS", ["gather_tokens", "sparse_attention"])
    host.main(["--chip", "A100"])
    rows = capsys.readouterr().out.splitlines()[-2:]
    for row, op in zip(rows, host.JOBS):
        assert row.startswith(f"| {op} | SD3-medium |")
        later, *parts, first = map(float, row.split("|")[3:-1])
        assert 0 < later < first
        assert sum(parts) == pytest.approx(later, abs=0.3)  # rounded each


# --- what the kernels are for --------------------------------------------------------------------


@pytest.mark.parametrize(
    "capability, by_kernel", [((7, 5), False), ((7, 0), False), ((8, 0), True), ((12, 0), True)]
)
def test_gpus_before_sm_80_take_the_definitions(monkeypatch, capability, by_kernel):
    gpu = SimpleNamespace(is_available=lambda: True, get_device_capability=lambda _: capability)
    monkeypatch.setattr(torch, "cuda", gpu)
    _triton.capability.cache_clear()
    try:
        assert ras_kernels.backend("cuda:3") == ("triton" if by_kernel else "torch")
        for dtype, computed in (
            (torch.float32, True),
            (torch.bfloat16, True),
            (torch.int32, True),
            (torch.float64, False),
            (torch.complex128, False),
        ):
            assert ras_kernels.supports("cuda:3", dtype) is (by_kernel and computed)
        assert not ras_kernels.supports("cpu", torch.float32)
    finally:
        _triton.capability.cache_clear()


def test_what_is_not_supported_is_run_by_the_definition(monkeypatch):
    """As on an old GPU: with the same plan nothing is launched there."""
    launched = []
    op, args = recorded("sparse_attention")
    expected = op(*args)
    with as_if_on(IdleDriver(H100, lambda *_: launched.append(_))):
        monkeypatch.setattr(ras_kernels._library, "supports", ras_kernels.supports)
        torch.testing.assert_close(op(*args), expected)
    assert not launched


@pytest.mark.filterwarnings("error")
def test_a_compiled_function_may_ask_what_is_supported():
    def plus(x):
        return x + ras_kernels.supports("cuda", x.dtype) + ras_kernels.supports(x.device, x.dtype)

    compiled = torch.compile(plus, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), plus(torch.zeros(2)))
