"""Which rows a mean hidden state is over, as the operand of a library matmul, and how many they are.

    sequence_N, masks  ->  picks_2N, count_2        1 for the rows of the chosen and of the rejected answers that count

One program counts, so that the counts have one writer. Letters: N rows, P pairs, D hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.matmul import matmul, widened_matmul
from orpo_kernels.rows import Rows
from orpo_kernels.slices import WHOLE, Slices

_BLOCK = 4096


@triton.jit
def picks_kernel(
    sequence_ptr,
    response_ptr,
    nll_ptr,
    picks_ptr,
    count_ptr,
    N,
    P,
    ALL_COUNT: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chosen_sum = tl.zeros([BLOCK], tl.float32)
    rejected_sum = tl.zeros([BLOCK], tl.float32)
    for first in range(0, N, BLOCK):
        offs_n = first + tl.arange(0, BLOCK)
        mask = offs_n < N
        sequence = tl.load(sequence_ptr + offs_n, mask=mask, other=0)
        counts = mask
        if not ALL_COUNT:
            response = tl.load(response_ptr + offs_n, mask=mask, other=0) != 0
            nll = tl.load(nll_ptr + offs_n, mask=mask, other=0) != 0
            counts = response | nll
        chosen = tl.where(counts & (sequence < P), 1.0, 0.0)
        rejected = tl.where(counts & (sequence >= P), 1.0, 0.0)
        tl.store(picks_ptr + offs_n, chosen.to(picks_ptr.dtype.element_ty), mask=mask)
        # int64: 2 * N may exceed 2^31.
        tl.store(picks_ptr + N + offs_n.to(tl.int64), rejected.to(picks_ptr.dtype.element_ty), mask=mask)
        chosen_sum += chosen
        rejected_sum += rejected
    tl.store(count_ptr, tl.maximum(tl.sum(chosen_sum, 0), LEAST))
    tl.store(count_ptr + 1, tl.maximum(tl.sum(rejected_sum, 0), LEAST))


def mean_hidden(x_ND: Tensor, rows: Rows, dtype: torch.dtype, slices: Slices = WHOLE) -> Tensor:
    """(2, D) in `dtype`: the mean hidden state of the chosen and of the rejected rows that count."""
    # Another rank may have the rows that this one has not: then 0 are no 1.
    picks_2N, count_21 = picks(x_ND, rows, least=0 if slices.name else 1)
    # Divided at the end: 1 / n is not a number of bfloat16, and would be off by 2^-9 in every term.
    if x_ND.is_cuda:
        sums_2D = matmul(picks_2N, x_ND, dtype)
    else:
        # A CPU, which executes the kernels in tests, would round its sums.
        sums_2D = widened_matmul(picks_2N.to(dtype), x_ND, dtype)
    return slices.whole_mean(sums_2D, count_21)


def picks(x_ND: Tensor, rows: Rows, least: int = 1) -> tuple[Tensor, Tensor]:
    """(2, N) of x's dtype, and float32 (2, 1), at least `least`."""
    picks_2N = x_ND.new_empty((2, x_ND.shape[0]))
    count_21 = x_ND.new_empty((2, 1), dtype=torch.float32)
    picks_kernel[(1,)](
        rows.sequence_N,
        rows.in_response_N.view(torch.int8),
        rows.in_nll_N.view(torch.int8),
        picks_2N,
        count_21,
        N=x_ND.shape[0],
        P=rows.pairs,
        ALL_COUNT=rows.all_count,
        LEAST=least,
        BLOCK=_BLOCK,
        num_warps=8,
        enable_fp_fusion=True,
    )
    return picks_2N, count_21
