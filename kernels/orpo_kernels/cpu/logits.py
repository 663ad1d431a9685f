"""Logits of the torch backend: in which dtype a CPU multiplies, and how a strip of logits is written and read.

* float32, float64: computed as they are. float16 is computed in float32: a CPU's float16 matmuls are slower than that.
* bfloat16 on a CPU with instructions for it: its matmuls are four times as fast as float32's, but their output is
  rounded to 8 bits, which puts 8e-3 on a log-probability. What a log-probability needs is z_v - z_y, so that is what is
  rounded: c_n, the target's logit from fp32 products, enters the matmul's accumulator (z - c = x W^T - c). A logit's
  error is then 2^-9 of its distance from the target's logit, not of its size; gradients come out as with float32
  logits, and nothing is multiplied twice. Only a softcap needs c again: a softmax is that of z - c.
* bfloat16 on a CPU without them is computed in float32, the weight widened part by part. Such a CPU emulates
  bfloat16's matmuls: on an AVX2 machine x W^T takes 6 times, g W 100 times as long as in float32.

Letters: N rows, D hidden size, V vocabulary, K columns of a strip.
"""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor

from orpo_kernels.head import Head
from orpo_kernels.matmul import converted_parts

# With fewer rows a float32 matmul packs the weight too often, with more nothing is faster.
CHUNK_ROWS = 1024
# Elementwise passes over one block of rows: small enough to stay in the caches from one pass to the next.
_BLOCK_BYTES = 4 * 2**20


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 (AVX512-BF16, AMX, Arm's BF16).

    The processor is asked, not the library, from which ONEDNN_MAX_CPU_ISA may hide them.
    """
    if platform.machine().lower() in ("x86_64", "amd64"):
        names = ("avx512_bf16", "amx_bf16", "avx10_2")
    else:
        names = ("bf16", "sve_bf16")
    return any(_capabilities().get(name) for name in names)


def _capabilities() -> dict[str, bool]:
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    # torch 2.8 can tell these two only.
    return {"avx512_bf16": torch.cpu._is_avx512_bf16_supported(), "amx_bf16": torch.cpu._is_amx_tile_supported()}


def compute_dtype(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the matmuls: the wider of the two operands', float32 for what this CPU does not multiply well.

    Tensors on a GPU, where this backend is there to check the kernels, follow the CPU beside it.
    """
    dtype = torch.promote_types(x_dtype, weight_dtype)
    narrow = dtype == torch.float16 or (dtype == torch.bfloat16 and not multiplies_bfloat16())
    return torch.float32 if narrow else dtype


@functools.cache
def chunk_rows(dtype: torch.dtype) -> int:
    """Rows of a tile over the whole vocabulary to one matmul in `dtype`: `CHUNK_ROWS`, but 256 in bfloat16.

    Each chunk packs the weight anew, and then passes over its logits, which caches hold if it is small. 1,532 rows in
    bfloat16, in front of heads of 512 and 576, were evaluated by 256 in a quarter less time than by 1,024 (AMD EPYC,
    AVX512-BF16); wide heads took as long either way. AMX multiplies so fast that packing would weigh as much as the
    products.
    """
    small = dtype == torch.bfloat16 and not _capabilities().get("amx_bf16")
    return 256 if small else CHUNK_ROWS


class LogitStrip:
    """Columns [first, last) of the logits of some rows, read block by block of rows in fp32 (fp64 for fp64).

    The strip's memory, `out` where given, is overwritten by what stage 3 stores into it: exp or gradient, in the
    matmul's dtype. In bfloat16 without a softcap `read` leaves scale * c_n out, shift_N1 of `target_shift`, the same in
    every strip of these rows.
    """

    def __init__(
        self, x_ND: Tensor, shift_N1: Tensor | None, head: Head, first: int, last: int, out: Tensor | None = None
    ) -> None:
        dtype = compute_dtype(x_ND.dtype, head.weight_VD.dtype)
        # A matmul would resize an `out` of another shape without a word, and its caller would read other memory.
        assert out is None or out.shape == (x_ND.shape[0], last - first), (out.shape, x_ND.shape, first, last)
        self.head, self.first, self.last = head, first, last
        self.z_NK = x_ND.new_empty(x_ND.shape[0], last - first, dtype=dtype) if out is None else out
        weight_KD, x_ND = head.weight_VD[first:last], x_ND.to(dtype)
        self.shift_N1 = shift_N1
        if self.shift_N1 is not None:
            # One memory for all blocks: fresh, its first touch would cost more than the conversion.
            self.block_memory = x_ND.new_empty(_block_rows(*self.z_NK.shape), last - first, dtype=torch.float32)
            torch.addmm(-self.shift_N1, x_ND, weight_KD.T, out=self.z_NK)
        else:
            for a, b in converted_parts(weight_KD, dtype):
                torch.mm(x_ND, weight_KD[a:b].to(dtype).T, out=self.z_NK[:, a:b])

    def blocks(self) -> list[slice]:
        """Slices of rows whose logits fit in cache."""
        return row_blocks(*self.z_NK.shape)

    def read(self, block: slice) -> Tensor:
        """The block's logits with bias, scale and softcap applied (Eq. 1), until the next is read.

        In place where the strip holds float32.
        """
        z = self.uncapped(block)
        if self.head.softcap is not None:
            z.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return z

    def read_with_slope(self, block: slice) -> tuple[Tensor, Tensor | None]:
        """`read`, and the softcap's slope at each logit, or None without a softcap.

        The slope is as large as the block: drop it before the next block is read. It is computed as 1 / cosh^2, since
        1 - (z / softcap)^2 would be rounding error near the cap.
        """
        z, slope = self.uncapped(block), None
        if self.head.softcap is not None:
            z.div_(self.head.softcap)
            slope = torch.cosh(z).square_().reciprocal_()
            z.tanh_().mul_(self.head.softcap)
        return z, slope

    def uncapped(self, block: slice) -> Tensor:
        """`read` before the softcap."""
        z = self.z_NK[block]
        if self.shift_N1 is not None:
            z = self.block_memory[: len(z)].copy_(z)
            if self.head.softcap is not None:
                z.add_(self.shift_N1[block])
        if self.head.bias_V is not None:
            z.add_(self.head.bias_V[self.first : self.last])
        if self.head.scale != 1.0:
            z.mul_(self.head.scale)
        return z

    def write(self, block: slice, values: Tensor) -> None:
        """Keep `values` (what `read` returned, worked on in place) as the block's part of the strip."""
        if self.shift_N1 is not None:
            self.z_NK[block].copy_(values)


def _block_rows(n: int, k: int) -> int:
    return min(n, max(1, _BLOCK_BYTES // (4 * max(1, k))))


def row_blocks(n: int, k: int) -> list[slice]:
    """Slices of n rows, of k float32 numbers each, that fit in cache."""
    step = max(1, _block_rows(n, k))
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def target_shift(x_ND: Tensor, targets_N: Tensor, head: Head) -> Tensor | None:
    """c_n = x_n . W_y of every row's target, summed in fp32 and rounded once: (N, 1) bfloat16, None in other dtypes.

    A call of all ranks where the head is a shard, with -1 for the targets of others.
    """
    if compute_dtype(x_ND.dtype, head.weight_VD.dtype) != torch.bfloat16:
        return None
    c_N1 = x_ND.new_empty((len(x_ND), 1), dtype=torch.float32)
    # Three float32 copies of a block are alive beside the logits.
    for block in row_blocks(len(x_ND), 4 * x_ND.shape[1]):
        weight_ND = head.weight_VD[targets_N[block].clamp(min=0)]
        c_N1[block] = (x_ND[block].float() * weight_ND.float()).sum(1, keepdim=True)
    c_N1 = head.shard.sum_(c_N1.masked_fill_(targets_N[:, None] < 0, 0)).to(torch.bfloat16)
    # An infinite c would make every logit of the row inf - inf.
    return c_N1.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
