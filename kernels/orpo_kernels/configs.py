"""Tile sizes of the kernels, by dtype and chip, each with its reason; and how many programs share the vocabulary."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class MatmulConfig:
    """Launch options of the two kernels with a matmul inside."""

    block_n: int
    block_v: int
    block_d: int
    group_n: int
    num_warps: int
    num_stages: int

    def launch_options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return dict(
            BLOCK_N=self.block_n,
            BLOCK_V=self.block_v,
            BLOCK_D=self.block_d,
            GROUP_N=self.group_n,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )


# 227 KB of shared memory and 64-row warpgroup matmuls, two side by side. 128 rows would spill: the compiler reports 122
# accesses to local memory for logit_stats in bfloat16 on sm_90, and over 600 with bias and softcap.
_HOPPER = MatmulConfig(64, 256, 64, group_n=8, num_warps=8, num_stages=4)
# 163 KB on sm_80, but 99 KB on sm_86, sm_89 and sm_120: 3 stages of (128 + 128) * 64 * 2 bytes are 96 KB.
_AMPERE = MatmulConfig(128, 128, 64, group_n=8, num_warps=8, num_stages=3)
# 64 KB of shared memory on gfx942: 2 stages of (128 + 128) * 32 * 2 bytes, the compiler prefetches through registers.
_AMD = MatmulConfig(128, 128, 32, group_n=8, num_warps=8, num_stages=2)
# float32 operands are twice as wide, and without TF32 there is no matrix unit to feed.
_FLOAT32 = MatmulConfig(64, 64, 32, group_n=8, num_warps=4, num_stages=2)
# Rows that do not start at multiples of 16 elements, as far as the compiler can tell: no 16-byte copies, so that each
# element has a pointer of its own in registers, and a larger tile would spill them.
_UNALIGNED = MatmulConfig(64, 64, 32, group_n=8, num_warps=8, num_stages=2)
_UNALIGNED_FLOAT32 = MatmulConfig(32, 64, 16, group_n=8, num_warps=8, num_stages=2)
# 64 KB for executing compiled kernels on a CPU, where time goes with the number of threads.
_SMALL = MatmulConfig(32, 64, 32, group_n=4, num_warps=4, num_stages=1)


def matmul_config(x_ND: Tensor, weight_VD: Tensor) -> MatmulConfig:
    """Tile of the kernels with a matmul of x_ND, contiguous, and weight_VD."""
    if not x_ND.is_cuda:
        return _SMALL
    major = torch.cuda.get_device_capability(x_ND.device)[0]
    return matmul_config_for(x_ND.dtype, torch.version.hip is not None, major, rows_aligned(x_ND, weight_VD))


def rows_aligned(x_ND: Tensor, weight_VD: Tensor) -> bool:
    """Whether triton can prove that every row of both operands starts at a multiple of 16 bytes."""
    return weight_VD.stride(1) == 1 and x_ND.shape[1] % 16 == 0 and weight_VD.stride(0) % 16 == 0


def matmul_config_for(dtype: torch.dtype, is_amd: bool, major: int, aligned: bool = True) -> MatmulConfig:
    """Tile for a dtype on a chip, by vendor and, for NVIDIA, major compute capability."""
    if not aligned:
        return _UNALIGNED_FLOAT32 if dtype == torch.float32 else _UNALIGNED
    if dtype == torch.float32:
        return _FLOAT32
    if is_amd:
        return _AMD
    return _HOPPER if major in (9, 10) else _AMPERE


def rows_config(columns: int) -> dict[str, int]:
    """Row blocks that sweep a strip: enough programs to fill a chip already at a few hundred rows.

    512 columns at once; 1024 in float32 with bias and softcap spill on sm_90.
    """
    return dict(BLOCK_N=4, BLOCK_V=min(512, max(16, triton.next_power_of_2(columns))), num_warps=4)


def elementwise_config() -> dict[str, int]:
    """One pass over a strip, bound by memory: 16 bytes and more a thread in flight."""
    return dict(BLOCK_N=4, BLOCK_V=512, num_warps=4)


def input_precision() -> str:
    """Of float32 matmuls: TF32 only where torch's own setting allows it, and never on AMD, where few chips have it."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 and torch.version.hip is None else "ieee"


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def vocabulary_splits(blocks_n: int, vocabulary: int, block_v: int, device: torch.device) -> tuple[int, int]:
    """(splits, columns of a split): at least four programs for each multiprocessor, so that the last wave is short.

    A split is whole tiles. At most 64, which bounds the partial sums to 512 bytes a row.
    """
    tiles = -(-vocabulary // block_v)
    wanted = -(-4 * _multiprocessors(device) // blocks_n)
    tiles_each = -(-tiles // min(wanted, tiles, 64))
    return -(-tiles // tiles_each), tiles_each * block_v
