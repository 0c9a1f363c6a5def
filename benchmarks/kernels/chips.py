"""Chips that the kernels are compiled for, their limits and their peaks, from data sheets.

Nothing here is measured. A multiprocessor is AMD's compute unit, a block its workgroup, a warp its
wavefront, of 64 lanes, and shared memory its LDS.
"""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """One product of an architecture.

    Attributes:
        name: Of the product.
        target: What Triton compiles for: `sm_…` or `gfx…`.
        shared: Bytes of shared memory that a block can have.
        shared_per_sm: And those that a multiprocessor has.
        reserved: Bytes of shared memory that each block costs beyond its own.
        registers: Of 32 bits, of a multiprocessor.
        warps, blocks: That a multiprocessor can hold.
        bandwidth: Of the memory, GB/s.
        flops: Dense, of 16-bit numbers with sums in float32, TFLOP/s.
    """

    name: str
    target: str
    shared: int
    shared_per_sm: int
    reserved: int
    registers: int
    warps: int
    blocks: int
    bandwidth: float
    flops: float

    @property
    def amd(self) -> bool:
        return self.target.startswith("gfx")

    @property
    def architecture(self) -> int:
        """As `ras_kernels._triton.architecture` would say it."""
        return 0 if self.amd else int(self.target.removeprefix("sm_"))

    @property
    def lanes(self) -> int:
        return 64 if self.amd else 32


K = 1024
REGISTERS = 64 * K
# Limits: CUDA programming guide, "Compute Capabilities", technical specifications; AMD CDNA3 ISA
# guide and LLVM's AMDGPU usage guide (4 SIMDs of 512 registers for 8 wavefronts of 64 lanes each).
# Peaks: NVIDIA's A100, H100 and HGX B200 data sheets, the white papers of GA102, Ada and RTX
# Blackwell (tensor cores at fp32 accumulation, without sparsity), AMD's MI300X data sheet.
CHIPS = {
    "A100": Chip("A100 SXM 80 GB", "sm_80", 163 * K, 164 * K, K, REGISTERS, 64, 32, 2039.0, 312.0),
    "RTX3090": Chip(
        "GeForce RTX 3090", "sm_86", 99 * K, 100 * K, K, REGISTERS, 48, 16, 936.0, 71.0
    ),
    "RTX4090": Chip(
        "GeForce RTX 4090", "sm_89", 99 * K, 100 * K, K, REGISTERS, 48, 24, 1008.0, 165.2
    ),
    "H100": Chip("H100 SXM", "sm_90", 227 * K, 228 * K, K, REGISTERS, 64, 32, 3350.0, 989.0),
    "B200": Chip("B200", "sm_100", 227 * K, 228 * K, K, REGISTERS, 64, 32, 8000.0, 2250.0),
    "RTX5090": Chip(
        "GeForce RTX 5090", "sm_120", 99 * K, 100 * K, K, REGISTERS, 48, 24, 1792.0, 209.5
    ),
    "MI300X": Chip("MI300X", "gfx942", 64 * K, 64 * K, 0, 2 * REGISTERS, 32, 32, 5300.0, 1307.0),
}
TENSOR_COLUMNS = 512  # of an sm_100 multiprocessor's tensor memory


def occupancy(
    chip: Chip, warps: int, registers: int, shared: int, tensor_columns: int = 0
) -> float:
    """The share of a multiprocessor's warps that blocks of a kernel can fill; 0: it cannot run.

    Args:
        warps: Of a block.
        registers: Of a thread. They are given out in eights, in each quarter of a multiprocessor.
        shared: Bytes of a block.
        tensor_columns: Of tensor memory, of a block.
    """
    if shared > chip.shared:
        return 0.0
    of_warp = chip.lanes * 8 * -(-max(registers, 1) // 8)
    room = [
        chip.blocks,
        chip.warps // warps,
        4 * (chip.registers // 4 // of_warp) // warps,
        chip.shared_per_sm // max(shared + chip.reserved, 1),
    ]
    if tensor_columns:
        room.append(TENSOR_COLUMNS // tensor_columns)
    return min(room) * warps / chip.warps


def floor_us(size: int, flops: int, bandwidth: float, peak: float) -> float:
    """The least microseconds for so many bytes and operations at so many GB/s and TFLOP/s."""
    return max(size / bandwidth / 1e3, flops / peak / 1e6)
