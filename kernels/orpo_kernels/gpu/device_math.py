"""What the kernels share on the device: a tile of logits (Eq. 1), and functions precise near 0.

Written out instead of taken from libdevice: the same code runs on NVIDIA, on AMD and in the interpreter, and the
hardware's approximate logarithm has no relative precision near 1, where log1p and expm1 are needed.
"""

import triton
import triton.language as tl


@triton.jit
def log1p(e):
    """log(1 + e) for 0 <= e <= 1, as 2 atanh(e / (2 + e)); t^2 <= 1/9, so nine terms reach float32."""
    t = e / (2.0 + e)
    u = t * t
    p = 1.0 / 17.0
    p = p * u + 1.0 / 15.0
    p = p * u + 1.0 / 13.0
    p = p * u + 1.0 / 11.0
    p = p * u + 1.0 / 9.0
    p = p * u + 1.0 / 7.0
    p = p * u + 1.0 / 5.0
    p = p * u + 1.0 / 3.0
    return 2.0 * t * (p * u + 1.0)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) for every x, infinities included."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def expm1(a):
    """exp(a) - 1 for a <= 0: Taylor's series above -1/2, where the difference would cancel."""
    p = 1.0 + a * 0.1
    p = 1.0 + a * (1.0 / 9.0) * p
    p = 1.0 + a * 0.125 * p
    p = 1.0 + a * (1.0 / 7.0) * p
    p = 1.0 + a * (1.0 / 6.0) * p
    p = 1.0 + a * 0.2 * p
    p = 1.0 + a * 0.25 * p
    p = 1.0 + a * (1.0 / 3.0) * p
    p = 1.0 + a * 0.5 * p
    return tl.where(a > -0.5, a * p, tl.exp(a) - 1.0)


@triton.jit
def tanh(u):
    """tanh with relative precision near 0."""
    e = expm1(-2.0 * tl.abs(u))
    t = -e / (2.0 + e)
    return tl.where(u < 0.0, -t, t)


@triton.jit
def tanh_and_slope(u):
    """`tanh`, and its slope with relative precision anywhere: 1 - tanh^2 would be what rounding leaves of 1 - 1.

    One reciprocal serves both: with two divisions stage 3 spills registers. `tanh` divides, since with a reciprocal
    stage 1 spills.
    """
    a = -2.0 * tl.abs(u)
    e = expm1(a)
    r = 1.0 / (2.0 + e)
    t = -e * r
    return tl.where(u < 0.0, -t, t), 4.0 * tl.exp(a) * r * r


@triton.jit
def raw_logits(
    x_ptr,
    weight_ptr,
    first_n,
    first_v,
    N,
    D,
    V,
    stride_wv,
    stride_wd,
    INPUT_PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """x . W of the rows from first_n on and the columns from first_v on, in float32; void past N and V.

    x_ptr and weight_ptr are tensor descriptors where DESCRIPTORS says so: one thread then copies a whole block.
    """
    z_NV = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if DESCRIPTORS:
        for d in range(0, D, BLOCK_D):
            x_NB = x_ptr.load([first_n, d])
            w_BV = weight_ptr.load([first_v, d]).T
            z_NV = tl.dot(x_NB, w_BV, z_NV, input_precision=INPUT_PRECISION)
    else:
        # Past the end the last row or column is read again: no mask in the loop.
        # int64 before the stride: N * D and V * D may exceed 2^31.
        rows = tl.minimum(first_n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        columns = tl.minimum(first_v + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
        offs_d = tl.arange(0, BLOCK_D)
        x_ptrs = x_ptr + rows[:, None] * D + offs_d[None, :]
        w_ptrs = weight_ptr + columns[None, :] * stride_wv + (offs_d * stride_wd)[:, None]
        for d in range(0, D, BLOCK_D):
            if EVEN_D:
                x_NB = tl.load(x_ptrs)
                w_BV = tl.load(w_ptrs)
            else:
                x_NB = tl.load(x_ptrs, mask=(offs_d < D - d)[None, :], other=0.0)
                w_BV = tl.load(w_ptrs, mask=(offs_d < D - d)[:, None], other=0.0)
            z_NV = tl.dot(x_NB, w_BV, z_NV, input_precision=INPUT_PRECISION)
            x_ptrs += BLOCK_D
            w_ptrs += BLOCK_D * stride_wd
    return z_NV


@triton.jit
def apply_head(z_NV, bias_ptr, offs_v, V, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Eq. 1 after the matmul: cap(scale * (x . W + b)), cap(u) = softcap * tanh(u / softcap)."""
    if HAS_BIAS:
        bias_V = tl.load(bias_ptr + offs_v, mask=offs_v < V, other=0.0).to(tl.float32)
        z_NV += bias_V[None, :]
    z_NV *= scale
    if HAS_SOFTCAP:
        z_NV = softcap * tanh(z_NV / softcap)
    return z_NV


@triton.jit
def grouped_block(pid, rows, columns, GROUP: tl.constexpr):
    """(row, column) of a program so that programs running together share few row blocks and few column blocks.

    Without it a wave of programs would stream every row block past one column block and find neither in L2.
    """
    width = GROUP * columns
    first = pid // width * GROUP
    size = tl.minimum(rows - first, GROUP)
    return first + pid % width % size, pid % width // size
