"""The chips that kernels are compiled for, and their limits.

Sources: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA3 and CDNA4 instruction
set architecture guides. Sizes in bytes; registers have 32 bits.
"""

from dataclasses import dataclass

from orpo_kernels.gpu.tiles import Limits
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Chip:
    """One compilation target.

    `max_shared` is what one block may use, `shared_per_core` what the blocks of one multiprocessor (AMD: compute unit)
    share; `reserved_shared` is taken from the latter for each block. `max_warps`: resident on one multiprocessor.
    """

    name: str
    cards: str
    target: GPUTarget
    major: int
    max_shared: int
    shared_per_core: int
    reserved_shared: int
    max_warps: int
    max_blocks: int

    @property
    def is_amd(self) -> bool:
        return self.target.backend == "hip"

    @property
    def limits(self) -> Limits:
        """What the package learns of the chip at run time, to leave out tiles that do not fit."""
        # 4 SIMDs of 512 registers for 64 lanes.
        return Limits(self.is_amd, self.major, self.max_shared, 131072 if self.is_amd else 65536)


def _nvidia(name: str, cards: str, arch: int, shared_kib: int, max_warps: int, max_blocks: int) -> Chip:
    target = GPUTarget("cuda", arch, 32)
    shared = shared_kib * 1024
    # One KiB of each block's shared memory is the system's.
    return Chip(name, cards, target, arch // 10, shared - 1024, shared, 1024, max_warps, max_blocks)


def _amd(name: str, cards: str, shared_kib: int) -> Chip:
    # 4 SIMDs of 8 waves a compute unit; ROCm reports compute capability 9.x for this family.
    shared = shared_kib * 1024
    return Chip(name, cards, GPUTarget("hip", name, 64), 9, shared, shared, 0, max_warps=32, max_blocks=32)


CHIPS = {
    chip.name: chip
    for chip in (
        _nvidia("sm_80", "A100", 80, 164, max_warps=64, max_blocks=32),
        _nvidia("sm_89", "RTX 4090, L40S", 89, 100, max_warps=48, max_blocks=24),
        _nvidia("sm_90", "H100, H200", 90, 228, max_warps=64, max_blocks=32),
        _nvidia("sm_100", "B200", 100, 228, max_warps=64, max_blocks=32),
        _nvidia("sm_120", "RTX 5090", 120, 100, max_warps=48, max_blocks=24),
        _amd("gfx942", "MI300X", 64),
        _amd("gfx950", "MI355X", 160),
    )
}


def resident_blocks(chip: Chip, warps: int, registers: int, shared: int) -> int:
    """How many blocks of `warps` warps, `registers` a thread and `shared` bytes one multiprocessor holds at once."""
    if chip.is_amd:
        # 512 registers a lane and SIMD, given out by eights, for at most 8 waves; a block spreads over 4 SIMDs.
        by_registers = 4 * min(8, 512 // max(8, _round_up(registers, 8))) // warps
    else:
        # 65536 registers a multiprocessor, given out to warps by 256.
        by_registers = 65536 // (_round_up(max(registers, 1) * 32, 256) * warps)
    by_shared = chip.shared_per_core // max(1, shared + chip.reserved_shared)
    return max(0, min(by_registers, by_shared, chip.max_warps // warps, chip.max_blocks))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
