"""Tiles of the kernels: a few for each, with their reasons, of which the card's fastest runs; and the grid of stage 1.

A tile that does not fit a chip's shared memory or registers is left out there; of the rest the fastest is found once
for each class of shapes (tuning.py), or the first is taken where nothing may be timed. `python
tests/tools/compile_report.py` compiles each of them for each chip and refuses one that spills.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from orpo_kernels.gpu import tuning
from orpo_kernels.head import Head
from orpo_kernels.matmul import tf32_allowed


@dataclass(frozen=True)
class Limits:
    """What a block may use on a chip: bytes of shared memory, and registers over all its threads.

    `major`: compute capability, of NVIDIA's alone.
    """

    is_amd: bool
    major: int
    max_shared: int
    max_registers: int


@dataclass(frozen=True)
class MatmulConfig:
    """Launch options of the two kernels with a matmul inside.

    `group_n`: row blocks whose programs run together and share the weight in L2. `descriptors`: operands are copied
    through tensor descriptors (TMA). `spills_on`: majors on which the compiler needs more registers than there are,
    `spills_keeping`: those on which it does where stage 1 stores exponentials, `spills_capped`: under a softcap.
    """

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int
    group_n: int = 8
    descriptors: bool = False
    spills_on: tuple[int, ...] = ()
    spills_keeping: tuple[int, ...] = ()
    spills_capped: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name

    # Cached, like all that every launch asks for: a strip's matmul may take less time than the host takes to name it.
    @functools.cached_property
    def name(self) -> str:
        how = " descriptors" if self.descriptors else ""
        return f"{self.block_n}x{self.block_v}x{self.block_d} w{self.num_warps} s{self.num_stages}{how}"

    def operands(self, x_ND: Tensor, weight_VD: Tensor) -> tuple[Any, Any]:
        """What a launch gets for the two matrices: themselves, or descriptors of their blocks."""
        if not self.descriptors:
            return x_ND, weight_VD
        return tuple(
            TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, self.block_d])
            for matrix, rows in ((x_ND, self.block_n), (weight_VD, self.block_v))
        )

    def launch_options(self) -> dict[str, int | bool]:
        """Keyword arguments of a launch."""
        return dict(
            BLOCK_N=self.block_n,
            BLOCK_V=self.block_v,
            BLOCK_D=self.block_d,
            GROUP_N=self.group_n,
            DESCRIPTORS=self.descriptors,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
            # As at every launch of this folder. Triton 3.9 warns where nobody says it, and from 3.10 on a product would
            # be rounded before it is added: other bits, and code that no compile report has seen.
            enable_fp_fusion=True,
        )

    def fits(self, chip: Limits, element_bytes: int, keeps: bool = False, softcap: bool = False) -> bool:
        """Whether operands of every stage fit shared memory, and the sums a quarter of the registers.

        The rest of the registers holds what the epilogue computes of the sums: with half of them it spills, and with a
        quarter where it keeps exponentials times a softcap's slope (not on AMD).
        """
        shared = self.num_stages * (self.block_n + self.block_v) * self.block_d * element_bytes
        threads = self.num_warps * (64 if chip.is_amd else 32)
        sums = self.block_n * self.block_v // threads
        # `spills_keeping` holds for heads with a softcap too.
        of_this_call = self.spills_keeping if keeps else self.spills_capped if softcap else ()
        spills = not chip.is_amd and chip.major in (*self.spills_on, *of_this_call)
        known = not self.descriptors or (chip.major >= 9 and not chip.is_amd)
        registers = min(256, chip.max_registers // threads)
        share = 8 if keeps and softcap and not chip.is_amd else 4
        return known and shared <= chip.max_shared and share * sums <= registers and not spills


# 64 rows, wide: on Hopper and Blackwell two warpgroup matmuls side by side. 160 KB, which sm_80 has too.
_WIDE = MatmulConfig(64, 256, 64, num_warps=8, num_stages=4, spills_keeping=(9, 10))
# Square: fewest bytes from L2 for an operation. 96 KB, for chips with 99 KB (sm_86, sm_89, sm_120).
_SQUARE = MatmulConfig(128, 128, 64, num_warps=8, num_stages=3, spills_on=(10,), spills_keeping=(8,))
# The same with one more tile under way, where there is room.
_DEEP = MatmulConfig(128, 128, 64, num_warps=8, num_stages=4, spills_on=(10,), spills_keeping=(8,))
# Half the sums and half the registers: two blocks a multiprocessor hide each other's epilogue; few rows waste less.
_SMALL_ROWS = MatmulConfig(64, 128, 64, num_warps=8, num_stages=4)
# One thread copies a block through a tensor descriptor, and no other holds pointers: compiled for sm_90 187 registers a
# thread instead of 252, for sm_120 189 instead of 254. The wide tile gains 8, spills on sm_100, and keeps pointers.
_SQUARE_TMA = MatmulConfig(128, 128, 64, num_warps=8, num_stages=3, descriptors=True)
_DEEP_TMA = MatmulConfig(
    128, 128, 64, num_warps=8, num_stages=4, descriptors=True, spills_on=(10,), spills_keeping=(9,)
)
# On sm_100 two blocks a multiprocessor, where pointers leave room for one.
_SMALL_ROWS_TMA = MatmulConfig(64, 128, 64, num_warps=8, num_stages=4, descriptors=True)
_HOPPER = (_WIDE, _DEEP, _DEEP_TMA, _SMALL_ROWS_TMA)
_NVIDIA = (_SQUARE, _DEEP, _WIDE, _SMALL_ROWS)
# sm_120: 99 KB. Few rows through descriptors spill there with triton 3.8.
_CONSUMER = (_SQUARE, _SQUARE_TMA, _SMALL_ROWS)
# gfx942 has 64 KB, of which the compiler uses one stage less: it prefetches through registers.
_AMD = (
    MatmulConfig(128, 128, 32, num_warps=8, num_stages=2),
    # Reads the weight once for twice the columns; one block a compute unit.
    MatmulConfig(128, 256, 32, num_warps=8, num_stages=2),
    # Few rows.
    MatmulConfig(64, 128, 64, num_warps=4, num_stages=2),
)
# float32 operands are twice as wide. TF32: as square as fits, and a smaller one for Blackwell and few rows.
_TF32 = (
    MatmulConfig(128, 128, 32, num_warps=8, num_stages=3, spills_on=(10,), spills_keeping=(8, 9, 12)),
    MatmulConfig(64, 128, 32, num_warps=8, num_stages=3),
)
# Without TF32 NVIDIA has no matrix unit for it: operands and sums compete for registers. With 4 warps 64 x 64 x 16
# spills on sm_89, and 64 x 64 x 32 on sm_100.
_FLOAT32 = (
    MatmulConfig(64, 64, 16, num_warps=8, num_stages=3, spills_keeping=(8,), spills_capped=(9,)),
    # Fewer rounds of the loop; one stage less fits.
    MatmulConfig(64, 64, 32, num_warps=8, num_stages=2, spills_keeping=(9, 10)),
)
# Rows that do not start at multiples of 16 elements, as far as the compiler can tell: no 16-byte copies, so that each
# element has a pointer of its own in registers, and a larger tile would spill them.
_UNALIGNED = (MatmulConfig(64, 64, 32, num_warps=8, num_stages=2),)
_UNALIGNED_FLOAT32 = (
    MatmulConfig(32, 64, 16, num_warps=8, num_stages=2, spills_keeping=(9, 12)),
    # No pointers of a next tile, so that exponentials can be stored on sm_90, and on sm_120 under a softcap.
    MatmulConfig(32, 64, 16, num_warps=8, num_stages=1, spills_on=(10,)),
)
# 64 KB for executing compiled kernels on a CPU, where time goes with the number of threads.
_CPU = (MatmulConfig(32, 64, 32, num_warps=4, num_stages=1, group_n=4),)


@functools.cache
def matmul_configs(
    dtype: torch.dtype, precision: str, aligned: bool, chip: Limits, keeps: bool = False, softcap: bool = False
) -> tuple[MatmulConfig, ...]:
    """Tiles of the kernels with a matmul that fit a chip; the first is taken where nothing may be timed.

    `keeps`: of stage 1 where it stores exponentials, or would if a gradient were wanted; `softcap`: the head has one.
    """
    if not aligned:
        configs = _UNALIGNED_FLOAT32 if dtype == torch.float32 else _UNALIGNED
    elif dtype == torch.float32:
        configs = _TF32 if precision == "tf32" else _FLOAT32
    elif chip.is_amd:
        configs = _AMD
    elif chip.major in (9, 10):
        configs = _HOPPER
    else:
        configs = _CONSUMER if chip.major >= 12 else _NVIDIA
    return tuple(config for config in configs if config.fits(chip, dtype.itemsize, keeps, softcap)) or configs[-1:]


def matmul_candidates(
    x_ND: Tensor, weight_VD: Tensor, keeps: bool = False, softcap: bool = False
) -> tuple[MatmulConfig, ...]:
    """`matmul_configs` of x_ND, contiguous, and weight_VD on the device where they are."""
    if not x_ND.is_cuda:
        return _CPU
    aligned = rows_aligned(x_ND, weight_VD)
    return matmul_configs(x_ND.dtype, input_precision(), aligned, _limits(x_ND.device), keeps, softcap)


@functools.cache
def _limits(device: torch.device) -> Limits:
    found = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    major = torch.cuda.get_device_capability(device)[0]
    return Limits(torch.version.hip is not None, major, found["max_shared_mem"], found["max_num_regs"])


def rows_aligned(x_ND: Tensor, weight_VD: Tensor) -> bool:
    """Whether triton can prove that every row of both operands starts at a multiple of 16 bytes."""
    strides = weight_VD.stride(1) == 1 and x_ND.shape[1] % 16 == 0 and weight_VD.stride(0) % 16 == 0
    # Strides do not tell where memory begins: a parameter may be a view into a flat buffer.
    return strides and all(tensor.data_ptr() % 16 == 0 for tensor in (x_ND, weight_VD))


def fastest(kernel: str, candidates: tuple, x_ND: Tensor, head: Head, launch: Callable[[Any], object]) -> Any:
    """The candidate that `launch` runs fastest on the first `tuning.TIMED_ROWS` rows of x_ND, by class of shapes."""
    if len(candidates) == 1:
        return candidates[0]
    by_name = {config.name: config for config in candidates}

    def time(name: str) -> float:
        return tuning.milliseconds(lambda: launch(by_name[name]), x_ND.device)

    key = tuning.shape_class(x_ND[: tuning.TIMED_ROWS], head)
    return by_name[tuning.fastest(kernel, tuple(by_name), key, x_ND.device, time)]


def input_precision() -> str:
    """Of float32 matmuls: TF32 only where torch's own setting allows it, and never on AMD, where few chips have it."""
    return "tf32" if tf32_allowed() and torch.version.hip is None else "ieee"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; a CPU, which executes compiled kernels in tests, counts as 4."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def vocabulary_splits(blocks_n: int, vocabulary: int, block_v: int, multiprocessors: int) -> tuple[int, int]:
    """(splits, columns of a split), a split being whole tiles.

    Enough for four programs on each multiprocessor, up to twice as many where the last wave is fuller then. At most 64,
    which bounds a launch's partial sums to 512 bytes a row, unless multiprocessors would stand idle; fewer than four
    programs each where 64 would end in a wave that is nearly empty.
    """
    tiles = -(-vocabulary // block_v)
    fewest = min(tiles, -(-multiprocessors // blocks_n))
    most = min(tiles, max(64, fewest))
    wanted = -(-4 * multiprocessors // blocks_n)

    def duration(tiles_each: int) -> int:
        programs = blocks_n * -(-tiles // tiles_each)
        return -(-programs // multiprocessors) * tiles_each

    splits = range(wanted if wanted <= most else fewest, min(most, 2 * wanted) + 1)
    # Of splits that take equally long, the shortest: they wait the least for one another.
    tiles_each = min({-(-tiles // n) for n in splits}, key=lambda each: (duration(each), each))
    return -(-tiles // tiles_each), tiles_each * block_v
