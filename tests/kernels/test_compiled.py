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

from benchmarks.kernels import compiled, sass, variants
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
@pytest.mark.parametrize("stride", [2**40, 1])
def test_strides_of_any_two_widths(monkeypatch, tmp_path, stride, name):
    """Each tensor's in turn take 64 bits: all types agree, which Triton's front end looks at.

    Or they are 1, of which it makes a constant where it may.
    """
    monkeypatch.setattr(_library, "supports", lambda *_: True)
    monkeypatch.setattr(CUDABackend, "make_ttgir", _stop)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # nothing has been compiled before
    op, args = recorded(name)
    for at, tensor in enumerate(args):
        if not isinstance(tensor, torch.Tensor):
            continue
        if op._opname == "sparse_attention_into_" and op._schema.arguments[at].alias_info:
            continue  # which are contiguous
        strides = [stride if dim < 2 else s for dim, s in enumerate(tensor.stride())]
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


@pytest.mark.parametrize("kind", ["int8", "e4m3"])
def test_codes_are_of_quotients_that_are_rounded(monkeypatch, tmp_path, kind):
    """As the definition's; NVIDIA's own division of float32 is off by up to 2 units."""
    noted = []

    def stop(_, code, *others):
        noted.append(str(code))
        _stop()

    monkeypatch.setattr(CUDABackend, "make_ttgir", stop)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = (one for one in LAUNCHES["H100"] if one.name == "_quantize_kernel")
    with pytest.raises(_ThroughTheFrontEnd):
        compiled.build(next(one for one in launches if kind in one.call.text), H100)
    assert "divf" in noted[0] and not re.search(r"arith\.divf", noted[0])


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
    waiting = good._replace(grouped=16, hazards=("13 waits for products in a loop",))
    assert compiled.faults(launch, CHIPS["H100"], waiting) == [*waiting.hazards]
    launch = next(launch for launch in LAUNCHES["H100"] if launch.call.op == "gather_tokens")
    narrow = good._replace(wide_loads=0)
    assert compiled.faults(launch, CHIPS["H100"], narrow) == ["no 128-bit loads"]


LOOP = """
        /*0010*/                   LDGSTS.E.BYPASS.128 [R144], desc[UR14][R44.64], P1 ;
        /*0020*/                   DEPBAR.LE SB0, 0x2 ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/                   WARPGROUP.ARRIVE ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT, gsb0 ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   MUFU.EX2 R3, R3 ;
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R56, R96, gdesc[UR20].tnspB, R56, gsb0 ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/                   LDGSTS.E.BYPASS.128 [R37], desc[UR14][R24.64], !P6 ;
        /*00b0*/              @!P1 BRA 0x20 ;
        /*00c0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00d0*/                   DEPBAR.LE SB0, 0x0 ;
        /*00e0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00f0*/                   STS.128 [R0+UR9], R4 ;
        /*0100*/               @P2 BRA 0x10 ;
        /*0110*/                   BRA 0x110;
"""
"""Attention's, shortened; around it a loop over what a block does, which is not looked at."""

WAIT, BARRIER = LOOP.splitlines()[6], LOOP.splitlines()[3]


@pytest.mark.parametrize(
    "old, new, found",
    [
        ("", "", None),
        (WAIT, "\n".join([WAIT] * 2), None),  # heads in two parts
        (WAIT, "\n".join([WAIT] * 3), "3 waits for products in a loop"),
        ("SB0, 0x2", "SB0, 0x0", "a loop waits for the copies that it has just asked for"),
        ("MUFU.EX2 R3, R3", "STS.128 [R0], R4", "shared memory is written between a wait"),
        ("MUFU.EX2 R3, R3", "UTMALDG.2D [UR8], [UR4]", "shared memory is written between a wait"),
        ("MUFU.EX2 R3, R3 ;", f";\n{BARRIER}\n /*0078*/ STS.128 [R0], R4 ;", None),
    ],
)
def test_hazards_of_wgmma(old, new, found):
    hazards = sass.hazards(sass.instructions(LOOP.replace(old, new, 1)))
    assert not hazards if found is None else len(hazards) == 1 and found in hazards[0]


def test_products_without_a_loop_are_no_pass():
    """Nothing has been looked at then; code without products has none."""
    code = sass.instructions(LOOP.replace("BRA 0x", "BRX R2 0x"))
    assert sass.hazards(code) == ["no loop is found around the products"]
    assert not sass.hazards([one for one in code if one.op != "HGMMA"])


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
