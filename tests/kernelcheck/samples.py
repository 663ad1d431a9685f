"""Small kernels that the tests of the tools run: right ones, and ones with a fault planted.

Import only after `plugin.configure`: decorating reads TRITON_INTERPRET.
"""

import triton
import triton.language as tl


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr, BOUND: tl.constexpr = 0):
    """out_N = x_N + y_N. `BOUND` > 0 widens the mask by that many elements: the planted out-of-bounds access."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n + BOUND
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    y = tl.load(y_ptr + offsets, mask=mask, other=0.0)
    tl.store(out_ptr + offsets, x + y, mask=mask)


@triton.jit
def affine_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out_N = x_N * y_N + 1, in the input's own dtype: each operation rounds once."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    y = tl.load(y_ptr + offsets, mask=mask, other=0.0)
    product = x * y
    tl.store(out_ptr + offsets, product + 1.0, mask=mask)


@triton.jit
def matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    m,
    n,
    k,
    stride_am,
    stride_bk,
    stride_cm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DROP_LAST: tl.constexpr = False,
):
    """c_MN = a_MK @ b_KN in float32. `DROP_LAST` leaves out the last tile of K: the planted wrong result."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    end = k - BLOCK_K if DROP_LAST else k
    for start in range(0, end, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        a_mask = (rows[:, None] < m) & (inner[None, :] < k)
        b_mask = (inner[:, None] < k) & (columns[None, :] < n)
        a = tl.load(a_ptr + rows[:, None] * stride_am + inner[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + inner[:, None] * stride_bk + columns[None, :], mask=b_mask, other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision="ieee")
    c_mask = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(c_ptr + rows[:, None] * stride_cm + columns[None, :], accumulator, mask=c_mask)


@triton.jit
def logsumexp_kernel(x_ptr, out_ptr, n, stride_xm, BLOCK_N: tl.constexpr):
    """out_M = log sum_n exp x_MN, one program a row, online over tiles of N."""
    row = tl.program_id(0)
    maximum = -float("inf")
    total = 0.0
    for start in range(0, n, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + row * stride_xm + columns, mask=columns < n, other=-float("inf")).to(tl.float32)
        new_maximum = tl.maximum(maximum, tl.max(x, axis=0))
        total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(x - new_maximum), axis=0)
        maximum = new_maximum
    tl.store(out_ptr + row, maximum + tl.log(total))


@triton.jit
def column_sum_kernel(x_ptr, out_ptr, n, ATOMIC: tl.constexpr, BLOCK_N: tl.constexpr):
    """out_N = sum_m x_MN, one program a row: by atomics, or by load, add, store, which races."""
    columns = tl.arange(0, BLOCK_N)
    mask = columns < n
    x = tl.load(x_ptr + tl.program_id(0) * n + columns, mask=mask, other=0.0)
    if ATOMIC:
        tl.atomic_add(out_ptr + columns, x, mask=mask)
    else:
        total = tl.load(out_ptr + columns, mask=mask, other=0.0)
        tl.store(out_ptr + columns, total + x, mask=mask)


@triton.jit
def last_writer_kernel(out_ptr, SAME: tl.constexpr):
    """Every program writes out[0]: its own number, or all the same one."""
    if SAME:
        tl.store(out_ptr, 7)
    else:
        tl.store(out_ptr, tl.program_id(0))


@triton.jit
def int32_offset_kernel(x_ptr, out_ptr, stride, WIDE: tl.constexpr):
    """out = x[3 * stride]. Without `WIDE` the product is computed in int32 and wraps around."""
    row = tl.program_id(0) + 3
    if WIDE:
        row = row.to(tl.int64)
    tl.store(out_ptr, tl.load(x_ptr + row * stride))
