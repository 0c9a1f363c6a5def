"""What the Triton kernels' machine code takes up on each chip; needs no GPU.

    python -m benchmarks.kernels.compiled
    python -m benchmarks.kernels.compiled --chips H100 MI300X --ops attention linear

Compiles every launch of `variants` beside it ahead of time as Triton's own just-in-time path would,
and reads from the code: registers, spills (bytes of a thread's stack), shared memory, tensor-core
instructions, loads and stores of 128 bits or more. Nothing is measured: occupancy is arithmetic
with the limits in `chips`. Prints a table and what is wrong, if anything:

- shared memory or registers beyond the chip's, or code that does not compile;
- spills with 16-bit numbers, unless `SPILLS` says why;
- a kernel with a dot of 16-bit floats and without tensor cores, or without wgmma on sm_90 in tiles
  of at least 64 rows;
- a kernel that copies rows of whole 16-byte vectors, and not by 128 bits at a time;
- on sm_90 what `sass.hazards` looks for in products of 16-bit floats in whole 16-byte vectors: that
  they wait for each other, or for copies just asked for, or that shared memory is written before
  all are done with it.

Then the exit status is 1. All of it takes an hour and a half of one core; `TRITON_CACHE_DIR` keeps
what is done.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest.mock import patch

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ..commands import as_command
from ..tables import cells
from . import sass, variants
from .chips import CHIPS, Chip, occupancy
from .variants import Launch

COPIES = "_copy_rows_kernel", "_update_kernel", "_carry_kernel"
WARP_GROUP_ROWS = 64  # the rows of a wgmma
PARTS = 8  # of an op's variants, for as many cores


class Spill(NamedTuple):
    """An exception: at these head sizes a kernel may spill so many bytes on a target.

    Attributes:
        text: What a variant has to be called by to be one.
    """

    kernel: str
    target: str
    sizes: tuple[int, ...]
    most: int
    reason: str
    text: str = ""


BEFORE = "stored and loaded outside the loops over the keys"
TWO_BLOCKS = f"ptxas keeps to 128 registers, so that two blocks fit; {BEFORE}"
IN_LOOP = "in 128 registers two blocks fit; at most two loads and a store in a loop of 380 others"
RELOAD = "in 128 registers two blocks fit; with triton 3.7.1 one load and one store are in the loop"
ONCE = "one number, in a kernel without loops"
SPILLS = (
    Spill("_attention_kernel", "sm_80", (24,), 16, TWO_BLOCKS, "mask"),
    Spill("_attention_kernel", "sm_80", (88, 96), 8, BEFORE),
    Spill("_attention_kernel", "sm_90", (64,), 24, BEFORE, "odd strides"),
    Spill("_attention_kernel", "sm_90", (72,), 72, RELOAD),
    Spill("_attention_kernel", "sm_90", (88, 96), 120, IN_LOOP),
    Spill("_attention_kernel", "sm_90", (64,), 24, BEFORE, "negative scale"),
    Spill("_attention_kernel", "sm_100", (40, 72, 80, 88, 96), 16, TWO_BLOCKS),
    Spill("_attention_kernel", "sm_100", (256,), 16, TWO_BLOCKS, "mask"),
    Spill("_attention_kernel", "gfx942", (88, 96), 16, BEFORE, "mask"),
    Spill("_norm_rotary_kernel", "sm_90", (72, 96, 128), 8, ONCE),
    Spill("_norm_rotary_kernel", "sm_100", (72,), 8, ONCE),
)


class Usage(NamedTuple):
    """What a kernel's code takes up: per thread, or for shared memory per block.

    Attributes:
        registers: Of 32 bits.
        spills: Bytes of stack.
        shared: Bytes.
        occupancy: The share of a multiprocessor's warps that can be filled, in [0, 1].
        dots: Products of tiles in the kernel, as Triton first sees it.
        tensor: Instructions for tensor cores (AMD: matrix cores), as they stand in the code.
        grouped: Those of them that a whole warp group or block issues: wgmma and tcgen05.
        loads, wide_loads, stores, wide_stores: From and to global memory, of any width and of at
            least 128 bits, the asynchronous ones included.
        hazards: See `sass.hazards`.
    """

    registers: int
    spills: int
    shared: int
    occupancy: float
    dots: int
    tensor: int
    grouped: int
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    hazards: tuple[str, ...] = ()


class Row(NamedTuple):
    """A variant on a chip: what it takes up, if it compiles, and what is wrong with it."""

    chip: str
    op: str
    kernel: str
    text: str
    usage: Usage | None
    faults: list[str]


class Driver:
    """What compiling asks of a GPU's driver, answered for a chip that need not be there."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip

    def get_current_device(self) -> str:  # the key of a kernel's own cache
        return self.chip.target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        kind = "hip" if self.chip.amd else "cuda"
        return GPUTarget(kind, self.chip.architecture or self.chip.target, self.chip.lanes)


def build(launch: Launch, chip: Chip) -> Any:
    """The compiled kernel of a launch, as on that chip."""
    with patch.object(triton.runtime.driver, "_active", Driver(chip)):
        return launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)


def usage(launch: Launch, chip: Chip) -> Usage:
    """Compile a launch and read its code."""
    built = build(launch, chip)
    found = _amd(built.asm["amdgcn"]) if chip.amd else _nvidia(built.asm["cubin"])
    shared = built.metadata.shared
    columns = getattr(built.metadata, "tmem_size", None) or 0
    share = occupancy(chip, built.metadata.num_warps, found["registers"], shared, columns)
    dots = _count(r"\btt\.dot\b", built.asm["ttir"])
    return Usage(shared=shared, occupancy=share, dots=dots, **found)


def _nvidia(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        resources, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", resources).groups())
    return {
        "registers": registers,
        "spills": stack,
        # HMMA: mma.sync; HGMMA: wgmma; UTCHMMA: tcgen05
        "tensor": _count(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", code),
        "grouped": _count(r"\b(?:HGMMA|UTCHMMA)\b", code),
        "loads": _count(r"\b(?:LDG|LDGSTS)\b", code),
        "wide_loads": _count(r"\b(?:LDG|LDGSTS)\.[\w.]*\b(?:128|256)\b", code),
        "stores": _count(r"\bSTG\b", code),
        "wide_stores": _count(r"\bSTG\.[\w.]*\b(?:128|256)\b", code),
        "hazards": tuple(sass.hazards(sass.instructions(code))),
    }


def _cuobjdump(option: str, path: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd(code: str) -> dict[str, int]:
    def said(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])

    return {
        "registers": said("vgpr_count"),
        "spills": said("private_segment_fixed_size"),
        "tensor": _count(r"\bv_s?mfma", code),
        "grouped": 0,
        "loads": _count(r"\b(?:global|buffer)_load_", code),
        "wide_loads": _count(r"\b(?:global|buffer)_load_dwordx4", code),
        "stores": _count(r"\b(?:global|buffer)_store_", code),
        "wide_stores": _count(r"\b(?:global|buffer)_store_dwordx4", code),
    }


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))


def faults(launch: Launch, chip: Chip, found: Usage) -> list[str]:
    """What is wrong with a launch's code."""
    wrong = []
    if found.shared > chip.shared:
        wrong.append(f"{found.shared} bytes of shared memory of {chip.shared}")
    elif not found.occupancy:
        wrong.append(f"no block fits: {found.registers} registers")
    if launch.half and found.spills > allowed(launch, chip):
        wrong.append(f"{found.spills} bytes of spills")
    if launch.half and found.dots:
        if not found.tensor:
            wrong.append("no tensor-core instructions")
        elif chip.target == "sm_90" and launch.options["BLOCK_M"] >= WARP_GROUP_ROWS:
            wrong += [] if found.grouped else ["no wgmma"]
            if launch.options["VECTOR"] == 8:  # of others tiles go through registers
                wrong += found.hazards
    if launch.name in COPIES and whole_vectors(launch, chip):
        wrong += [] if found.wide_loads else ["no 128-bit loads"]
        wrong += [] if found.wide_stores else ["no 128-bit stores"]
    return wrong


def allowed(launch: Launch, chip: Chip) -> int:
    """Bytes that a launch may spill."""
    size = launch.options.get("SIZE")
    found = (s for s in SPILLS if (s.kernel, s.target) == (launch.name, chip.target))
    fits = (s.most for s in found if size in s.sizes and s.text in launch.call.text)
    return max(fits, default=0)


def whole_vectors(launch: Launch, chip: Chip) -> bool:
    """Whether the launcher found that 16 bytes can be taken at a time, and gives each lane 16."""
    tokens: Tensor = launch.args[0]
    options = launch.options
    tile = options["BLOCK_K"] * options["BLOCK_C"] * tokens.element_size()
    enough = tile >= 16 * chip.lanes * options["num_warps"]
    return enough and options["VECTOR"] * tokens.element_size() == 16


def check(launches: Iterable[Launch], name: str) -> Iterator[Row]:
    """Compile launches for the chip of this name."""
    chip = CHIPS[name]
    for launch in launches:
        found = None
        try:
            found = usage(launch, chip)
            wrong = faults(launch, chip, found)
        except Exception as error:  # of any kind and from any stage: the others are to be seen, too
            wrong = [f"does not compile: {type(error).__name__}: {error}".partition("\n")[0]]
        yield Row(name, launch.call.op, launch.name, launch.call.text, found, wrong)


def check_part(task: tuple[str, str, int]) -> list[Row]:
    """One of `PARTS` parts of the variants of a chip and an op of `variants.OPS`."""
    name, op, part = task
    return list(check(variants.launches(CHIPS[name].architecture, [op])[part::PARTS], name))


TITLES = (
    "chip",
    "kernel",
    "variant",
    "registers",
    "spills, B",
    "shared, KB",
    "occupancy",
    "tensor cores",
    "128-bit loads",
    "128-bit stores",
)


def heading() -> list[str]:
    return [cells([*TITLES]), cells(["---"] * len(TITLES))]


def line(row: Row) -> str:
    """A row of the table."""
    entries = [row.chip, row.kernel.strip("_").removesuffix("_kernel"), f"{row.op}: {row.text}"]
    if row.usage is None:
        entries += [""] * (len(TITLES) - 3)
    else:
        u = row.usage
        entries += [
            str(u.registers),
            str(u.spills or ""),
            f"{u.shared / 1024:.1f}",
            f"{u.occupancy:.0%}",
            f"{u.tensor}" + f" ({u.grouped} of warp groups)" * (u.grouped > 0) if u.tensor else "",
            f"{u.wide_loads} of {u.loads}",
            f"{u.wide_stores} of {u.stores}",
        ]
    return cells(entries)


def main(argv: Sequence[str] | None = None) -> None:
    """Compile on all cores that this process may use, and exit with 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="benchmarks.kernels.compiled", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--ops", nargs="+", choices=variants.OPS, default=list(variants.OPS))
    options = parser.parse_args(argv)
    tasks = list(itertools.product(options.chips, options.ops, range(PARTS)))
    # Not forked: PyTorch's threads do not survive that.
    workers = min(len(os.sched_getaffinity(0)), len(tasks))
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    print(*heading(), sep="\n")
    wrong, count = [], 0
    with pool:
        for rows in pool.map(check_part, tasks):
            print(*map(line, rows), sep="\n", end="\n" * bool(rows), flush=True)
            wrong += [row for row in rows if row.faults]
            count += len(rows)
    print(f"\n{count} variants, {len(wrong)} with faults, triton {triton.__version__}")
    for row in wrong:
        print(f"- {row.chip}, {row.kernel}, {row.op}: {row.text}: {'; '.join(row.faults)}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    as_command(main)
