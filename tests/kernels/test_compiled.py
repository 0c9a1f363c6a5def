"""The kernels' machine code, for GPUs that need not be there: some of `benchmarks.kernels`."""

import pkgutil
import re
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
import torch
from support.operands import calls, recorded

import ras_kernels
from ras_kernels import _library, _triton, regions, rows
from ras_kernels._checks import FLOATS

if _triton.triton is None or _triton.INTERPRETED:
    pytest.skip("compiles Triton kernels, which are not to be interpreted", allow_module_level=True)

from triton.backends.nvidia.compiler import CUDABackend

from benchmarks.kernels import compiled, variants
from benchmarks.kernels.chips import CHIPS, floor_us, occupancy

H100 = CHIPS["H100"]
FLOAT32_ALONE = "_choose_kernel", "_list_kernel", "_drift_scores_kernel"
LAUNCHES = {name: variants.launches(chip.architecture) for name, chip in CHIPS.items()}


def test_every_kernel_flag_and_dtype_is_listed():
    """A kernel, a constant or a dtype that is new cannot go uncompiled."""
    kernels = set()
    for module in pkgutil.iter_modules(ras_kernels.__path__):
        kernels |= set(variants.kernels(import_module(f"ras_kernels.{module.name}")))
    for name, launches in LAUNCHES.items():
        assert {launch.name for launch in launches} == kernels, name
        for kernel in kernels:
            found = [launch for launch in launches if launch.name == kernel]
            for flag, value in found[0].options.items():
                if isinstance(value, bool):
                    values = {launch.options[flag] for launch in found}
                    assert values == {False, True}, f"{kernel}: {flag}"
            if kernel not in FLOAT32_ALONE:
                dtypes = set(rows.WORDS.values()) if kernel == "_copy_rows_kernel" else set(FLOATS)
                assert {launch.call.dtype for launch in found} == dtypes, kernel


def chosen(name, *ops):
    launches = variants.sample(LAUNCHES[name])
    return [
        pytest.param(name, launch, id=f"{name}, {launch.name}: {launch.call.text}")
        for launch in launches
        if not ops or launch.call.op in ops
    ]


@pytest.mark.parametrize(
    "name, launch",
    [
        *chosen("H100"),
        *chosen("A100", "sparse_attention", "select_regions"),
        *chosen("RTX4090", "sparse_attention", "linear_scatter_"),
        *chosen("B200", "sparse_attention"),
        *chosen("RTX5090", "gather_tokens"),
        *chosen("MI300X", "sparse_attention", "gather_tokens"),
    ],
)
def test_sample(name, launch):
    (row,) = compiled.check([launch], name)
    assert not row.faults


@pytest.mark.parametrize("name", calls())
def test_strides_of_any_two_widths(monkeypatch, tmp_path, name):
    """Each tensor's in turn take 64 bits: all types agree, which Triton's front end looks at."""
    monkeypatch.setattr(_library, "supports", lambda *_: True)
    monkeypatch.setattr(CUDABackend, "make_ttgir", _stop)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # nothing has been compiled before
    op, args = recorded(name)
    for at, tensor in enumerate(args):
        if not isinstance(tensor, torch.Tensor):
            continue
        strides = [2**40 if dim < 2 else s for dim, s in enumerate(tensor.stride())]
        wide = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in args]
        wide[at] = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device="meta")
        with variants.recording(90) as noted:
            _library.PLANS[op._opname](*wide)
        for launch in noted:
            with pytest.raises(_ThroughTheFrontEnd):
                compiled.build(variants.Launch(*launch, variants.Call(name, *[None] * 3)), H100)


@pytest.mark.parametrize("chip", ["A100", "H100"])
def test_comparisons_are_counted_without_a_wait(chip):
    """No sum over threads in a loop over the others: it would be as dear as the comparisons."""
    names = "_rank_kernel", "_choose_kernel"
    for launch in variants.sample(one for one in LAUNCHES[chip] if one.name in names):
        code = compiled.build(launch, CHIPS[chip]).asm["ttir"]
        loops = re.findall(r"scf\.for .*?scf\.yield", code, re.DOTALL)
        assert len(loops) == 2 and not any("tt.reduce" in loop for loop in loops)


def test_so_many_regions_that_they_are_not_compared_with_each_other():
    """A GPU sorts them: no kernel is launched whose work goes with the square of their number."""
    launched = {}
    for count in (8192, 8193, 75_600):
        scores = torch.empty(1, count, device="meta")
        with variants.recording(90) as noted:
            regions._plan_select(scores, scores.int(), count // 2, 0.5, 1.0)
        launched[count] = [launch[0].__name__ for launch in noted]
    assert launched == {
        8192: ["_rank_kernel", "_choose_kernel", "_list_kernel"],
        8193: [],
        75_600: [],
    }


class _ThroughTheFrontEnd(Exception):
    pass


def _stop(*_):
    raise _ThroughTheFrontEnd


def test_faults_are_found():
    """An attention without its tile's limits, as it would be told."""
    chip = CHIPS["RTX3090"]
    launch = next(launch for launch in LAUNCHES["RTX3090"] if launch.call.text == "bf16, D 64")
    good = compiled.Usage(168, 0, 64 * 1024, 0.25, 4, 64, 0, 20, 16, 4, 4)
    assert compiled.faults(launch, chip, good) == []
    bad = good._replace(shared=128 * 1024, spills=8, tensor=0)
    assert compiled.faults(launch, chip, bad) == [
        "131072 bytes of shared memory of 101376",
        "8 bytes of spills",
        "no tensor-core instructions",
    ]
    launch = next(launch for launch in LAUNCHES["H100"] if launch.call.text == "bf16, D 64")
    assert compiled.faults(launch, CHIPS["H100"], good) == ["no wgmma"]
    launch = next(launch for launch in LAUNCHES["H100"] if launch.call.op == "gather_tokens")
    narrow = good._replace(wide_loads=0)
    assert compiled.faults(launch, CHIPS["H100"], narrow) == ["no 128-bit loads"]


def test_the_table_and_the_exit_status(capsys, monkeypatch):
    def one(architecture, ops):
        return [launch for launch in LAUNCHES["A100"] if launch.name == "_list_kernel"][:1]

    monkeypatch.setattr(compiled.variants, "launches", one)
    monkeypatch.setattr(compiled, "PARTS", 1)
    monkeypatch.setattr(compiled, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    with pytest.raises(SystemExit, match="0"):
        compiled.main(["--chips", "A100", "--ops", "select"])
    assert "| A100 | list | select_regions: " in capsys.readouterr().out
    monkeypatch.setattr(compiled, "faults", lambda *_: ["slow"])
    with pytest.raises(SystemExit, match="1"):
        compiled.main(["--chips", "A100", "--ops", "select"])
    assert capsys.readouterr().out.splitlines()[-1].endswith(": slow")


def test_occupancy():
    """As NVIDIA's occupancy calculator has it, and AMD's registers for 8 wavefronts a SIMD."""
    h100, mi300 = CHIPS["H100"], CHIPS["MI300X"]
    assert occupancy(h100, 4, 32, 0) == 1
    assert occupancy(h100, 4, 255, 0) == 8 / 64
    assert occupancy(h100, 8, 168, 100 * 1024) == 8 / 64
    assert occupancy(h100, 4, 32, 228 * 1024) == 0
    assert occupancy(h100, 4, 32, 0, tensor_columns=256) == 8 / 64
    assert occupancy(h100, 16, 255, 0) == 0
    assert occupancy(mi300, 4, 64, 0) == 1 and occupancy(mi300, 4, 128, 0) == 0.5
    assert occupancy(CHIPS["RTX4090"], 4, 32, 33 * 1024) == 8 / 48


def test_floors():
    assert floor_us(3_350_000, 0, 3350.0, 989.0) == pytest.approx(1)
    assert floor_us(0, 989_000_000, 3350.0, 989.0) == pytest.approx(1)
