"""Rows of hidden states times one number each, in another dtype, and gradients of rows back at their places.

    weighted_kernel   x_ND, coef_N                    ->  coef_n x_n in `dtype`
    link_kernel       rows_N, coef_N                  ->  lists of the rows that read each hidden state
    place_kernel      dx_ND, coef_N, lists            ->  dX_r = sum over them of coef_n dx_n

In float32 until it is stored, once; no copy of x or dX in another dtype exists. A hidden state without a row gets
zeros. One that several rows read, as the last prompt token of a prefix-shared pair, has a list of them. The order of
the list is not the same in every run; that of the sum is. Finding that order takes the square of the list's length, so
rows with a coefficient of 0 are in no list: thousands of them may read one hidden state, to fill up a CUDA graph. They
add nothing, not even 0 times a dx_n that is not finite.

Letters: R hidden states, N rows, D hidden size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 8
_COLUMNS = 256
_LINKED = 256


@triton.jit
def weighted_kernel(x_ptr, coef_ptr, out_ptr, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    blocks_d = tl.cdiv(D, BLOCK_D)
    offs_n = tl.program_id(0) // blocks_d * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(0) % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (offs_n < N)[:, None] & (offs_d < D)[None, :]
    # int64: N * D may exceed 2^31.
    offs = offs_n.to(tl.int64)[:, None] * D + offs_d[None, :]
    x_NB = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    coef_N = tl.load(coef_ptr + offs_n, mask=offs_n < N, other=0.0)
    tl.store(out_ptr + offs, (x_NB * coef_N[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def link_kernel(rows_ptr, coef_ptr, head_ptr, next_ptr, N, BLOCK: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # NaN is not 0, and has to arrive.
    mask = (offs_n < N) & (tl.load(coef_ptr + offs_n, mask=offs_n < N, other=0.0) != 0.0)
    rows_N = tl.load(rows_ptr + offs_n, mask=mask, other=0)
    tl.store(next_ptr + offs_n, tl.atomic_xchg(head_ptr + rows_N, offs_n, mask=mask), mask=mask)


@triton.jit
def next_row(head, next_ptr, last):
    """The first row after `last` of the list that begins with `head`, -1 where there is none."""
    found = head * 0 - 1
    n = head
    while n >= 0:
        found = tl.where((n > last) & ((found < 0) | (n < found)), n, found)
        n = tl.load(next_ptr + n)
    return found


@triton.jit
def place_kernel(dx_ptr, coef_ptr, head_ptr, next_ptr, out_ptr, D, BLOCK_D: tl.constexpr):
    blocks_d = tl.cdiv(D, BLOCK_D)
    r = tl.program_id(0) // blocks_d
    offs_d = tl.program_id(0) % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < D
    sum_B = tl.zeros([BLOCK_D], tl.float32)
    head = tl.load(head_ptr + r)
    n = next_row(head, next_ptr, -1)
    while n >= 0:
        dx_B = tl.load(dx_ptr + n.to(tl.int64) * D + offs_d, mask=mask, other=0.0)
        sum_B += dx_B * tl.load(coef_ptr + n)
        n = next_row(head, next_ptr, n)
    tl.store(out_ptr + r.to(tl.int64) * D + offs_d, sum_B.to(out_ptr.dtype.element_ty), mask=mask)


def weighted(x_ND: Tensor, coef_N: Tensor, dtype: torch.dtype) -> Tensor:
    """coef_n x_n in `dtype`; x_ND and coef_N (float32) contiguous."""
    (n, d), out_ND = x_ND.shape, x_ND.new_empty(x_ND.shape, dtype=dtype)
    if out_ND.numel():
        programs = triton.cdiv(n, _ROWS) * triton.cdiv(d, _COLUMNS)
        blocks = dict(BLOCK_N=_ROWS, BLOCK_D=_COLUMNS, num_warps=4)
        weighted_kernel[(programs,)](x_ND, coef_N, out_ND, N=n, D=d, **blocks, enable_fp_fusion=True)
    return out_ND


def placed(dx_ND: Tensor, coef_N: Tensor, rows_N: Tensor, hidden_RD: Tensor, dtype: torch.dtype) -> Tensor:
    """dX_RD in `dtype` from float32 dx_ND and coef_N (contiguous), whose row n belongs to hidden state rows_N[n]."""
    (r, d), n = hidden_RD.shape, dx_ND.shape[0]
    out_RD = hidden_RD.new_empty((r, d), dtype=dtype)
    if out_RD.numel() == 0:
        return out_RD
    head_R = torch.full((r,), -1, dtype=torch.int32, device=hidden_RD.device)
    next_N = torch.empty(n, dtype=torch.int32, device=hidden_RD.device)
    if n:
        programs = triton.cdiv(n, _LINKED)
        link_kernel[(programs,)](rows_N, coef_N, head_R, next_N, N=n, BLOCK=_LINKED, enable_fp_fusion=True)
    block = min(1024, triton.next_power_of_2(d))
    place_kernel[(r * triton.cdiv(d, block),)](
        dx_ND,
        coef_N,
        head_R,
        next_N,
        out_RD,
        D=d,
        BLOCK_D=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out_RD
