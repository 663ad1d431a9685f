"""Whether the arrays of `Rows` can be read: three flags, of one launch.

    rows_N, targets_N, sequence_N  ->  good_3        sequences sorted and there; hidden states there; tokens there

One program, so that no flag is written by two. Letters: N rows, R hidden states, S sequences, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.rows import Rows

_BLOCK = 4096


@triton.jit
def check_kernel(rows_ptr, targets_ptr, sequence_ptr, good_ptr, N, R, S, V, BLOCK: tl.constexpr):
    sorted_ = tl.full([BLOCK], 1, tl.int32)
    read = tl.full([BLOCK], 1, tl.int32)
    known = tl.full([BLOCK], 1, tl.int32)
    for first in range(0, N, BLOCK):
        offs_n = first + tl.arange(0, BLOCK)
        mask = offs_n < N
        sequence = tl.load(sequence_ptr + offs_n, mask=mask, other=0)
        before = tl.load(sequence_ptr + offs_n - 1, mask=mask & (offs_n > 0), other=0)
        row = tl.load(rows_ptr + offs_n, mask=mask, other=0)
        target = tl.load(targets_ptr + offs_n, mask=mask, other=0)
        inside = (sequence >= before) & (sequence >= 0) & (sequence < S)
        sorted_ &= (inside | (offs_n >= N)).to(tl.int32)
        read &= (((row >= 0) & (row < R)) | (offs_n >= N)).to(tl.int32)
        known &= (((target >= 0) & (target < V)) | (offs_n >= N)).to(tl.int32)
    tl.store(good_ptr, tl.min(sorted_, 0).to(tl.int8))
    tl.store(good_ptr + 1, tl.min(read, 0).to(tl.int8))
    tl.store(good_ptr + 2, tl.min(known, 0).to(tl.int8))


def flags(rows: Rows, hidden_rows: int, vocabulary: int) -> Tensor:
    """bool (3,): sequence_N is sorted and inside [0, 2P), rows_N inside [0, R), targets_N inside [0, V)."""
    good_3 = torch.empty(3, dtype=torch.bool, device=rows.rows_N.device)
    check_kernel[(1,)](
        rows.rows_N,
        rows.targets_N,
        rows.sequence_N,
        good_3.view(torch.int8),
        N=rows.rows_N.shape[0],
        R=hidden_rows,
        S=2 * rows.pairs,
        V=vocabulary,
        BLOCK=_BLOCK,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return good_3
