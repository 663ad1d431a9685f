"""Stage 3: the gradient of log-probability by logit, one strip of recomputed logits at a time.

    g_nv = ([v = y_n] - p_nv) * cap'(z_nv),   p_nv = exp(z_nv - lse_n),   1 - p_y = -expm1(logp_n)      (Eq. 8)

    x_ND, weight_WD [bias_W], targets_N, lse_2N, target_grad_N  ->  g_NW     the recomputed matmul's epilogue

Everything is float32 until g is stored, once, in the dtype of the two matmuls that follow; target_grad_N is 1 - p_y. In
float16 each row carries a power of two (row_scale_N) that puts its largest entry, the target's, near 2^14: without it
entries of 1e-7 are 15 % wrong, and a nearly certain answer loses its gradient. The rows' coefficients divide it out.

Letters: N rows, D hidden size, W columns of the strip.
"""

import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.gpu import tiles
from orpo_kernels.gpu.device_math import apply_head, grouped_block, raw_logits, tanh_and_slope
from orpo_kernels.gpu.tuning import TIMED_ROWS
from orpo_kernels.head import ALIGNED, Head, strip_memory


@triton.jit
def gradient(
    u_NV,
    offs_v,
    targets_N,
    lse_ptr,
    target_grad_N,
    row_scale_ptr,
    offs_n,
    N,
    row_mask,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
):
    """Eq. 8 for one tile, from its logits before their softcap."""
    if HAS_SOFTCAP:
        t_NV, slope_NV = tanh_and_slope(u_NV / softcap)
        z_NV = softcap * t_NV
    else:
        z_NV = u_NV
    is_target_NV = offs_v[None, :] == targets_N[:, None]
    max_N = tl.load(lse_ptr + offs_n, mask=row_mask, other=0.0)
    log_sum_N = tl.load(lse_ptr + N + offs_n, mask=row_mask, other=0.0)
    g_NV = tl.where(is_target_NV, target_grad_N[:, None], -tl.exp(z_NV - max_N[:, None] - log_sum_N[:, None]))
    if HAS_SOFTCAP:
        g_NV *= slope_NV
    if HAS_ROW_SCALE:
        g_NV *= tl.load(row_scale_ptr + offs_n, mask=row_mask, other=0.0)[:, None]
    return g_NV


@triton.jit
def logit_grad_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    lse_ptr,
    target_grad_ptr,
    row_scale_ptr,
    g_ptr,
    N,
    D,
    first,
    columns,
    stride_wv,
    stride_wd,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    block_n, block_v = grouped_block(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(columns, BLOCK_V), GROUP_N)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_v = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
    row_mask = offs_n < N
    u_NV = raw_logits(
        x_ptr,
        weight_ptr,
        block_n * BLOCK_N,
        block_v * BLOCK_V,
        N,
        D,
        columns,
        stride_wv,
        stride_wd,
        INPUT_PRECISION,
        EVEN_D,
        BLOCK_N,
        BLOCK_V,
        BLOCK_D,
        DESCRIPTORS,
    )
    u_NV = apply_head(u_NV, bias_ptr, offs_v, columns, scale, softcap, HAS_BIAS, False)
    # A target outside the strip equals none of its columns.
    targets_N = tl.load(targets_ptr + offs_n, mask=row_mask, other=-1).to(tl.int32) - first
    target_grad_N = tl.load(target_grad_ptr + offs_n, mask=row_mask, other=0.0)
    g_NV = gradient(
        u_NV,
        offs_v,
        targets_N,
        lse_ptr,
        target_grad_N,
        row_scale_ptr,
        offs_n,
        N,
        row_mask,
        softcap,
        HAS_SOFTCAP,
        HAS_ROW_SCALE,
    )
    # int64: N * W may exceed 2^31.
    g_ptrs = g_ptr + offs_n.to(tl.int64)[:, None] * (tl.cdiv(columns, ALIGNED) * ALIGNED) + offs_v[None, :]
    tl.store(g_ptrs, g_NV.to(g_ptr.dtype.element_ty), mask=row_mask[:, None] & (offs_v < columns)[None, :])


def logit_grad(
    x_ND: Tensor,
    targets_N: Tensor,
    lse_2N: Tensor,
    target_grad_N: Tensor,
    row_scale_N: Tensor | None,
    head: Head,
    first: int = 0,
) -> Tensor:
    """g_NW in x's dtype for the strip `head`, whose first column is column `first` of the vocabulary.

    x_ND is contiguous and of the weight's dtype.
    """
    assert x_ND.is_contiguous() and targets_N.is_contiguous() and x_ND.dtype == head.weight_VD.dtype
    assert lse_2N.is_contiguous()
    g_NW = strip_memory(x_ND, x_ND.shape[0], head.weight_VD.shape[0])
    candidates = tiles.matmul_candidates(x_ND, head.weight_VD, softcap=head.softcap is not None)

    def launch(config: tiles.MatmulConfig) -> None:
        few_scales = None if row_scale_N is None else row_scale_N[:TIMED_ROWS]
        # A copy, since the second half is read N elements after the first.
        few_lse_2N = lse_2N[:, :TIMED_ROWS].contiguous()
        few = x_ND[:TIMED_ROWS], targets_N[:TIMED_ROWS], few_lse_2N, target_grad_N[:TIMED_ROWS], few_scales
        _logit_grad(*few, head, first, g_NW, config)

    config = tiles.fastest("logit_grad", candidates, x_ND, head, launch)
    _logit_grad(x_ND, targets_N, lse_2N, target_grad_N, row_scale_N, head, first, g_NW, config)
    return g_NW


def _logit_grad(
    x_ND: Tensor,
    targets_N: Tensor,
    lse_2N: Tensor,
    target_grad_N: Tensor,
    row_scale_N: Tensor | None,
    head: Head,
    first: int,
    g_NW: Tensor,
    config: tiles.MatmulConfig,
) -> None:
    (n, d), columns = x_ND.shape, head.weight_VD.shape[0]
    logit_grad_kernel[(triton.cdiv(n, config.block_n) * triton.cdiv(columns, config.block_v),)](
        *config.operands(x_ND, head.weight_VD),
        head.bias_V,
        targets_N,
        lse_2N,
        target_grad_N,
        row_scale_N,
        g_NW,
        N=n,
        D=d,
        first=first,
        columns=columns,
        stride_wv=head.weight_VD.stride(0),
        stride_wd=head.weight_VD.stride(1),
        scale=head.scale,
        softcap=head.softcap or 0.0,
        HAS_BIAS=head.bias_V is not None,
        HAS_SOFTCAP=head.softcap is not None,
        HAS_ROW_SCALE=row_scale_N is not None,
        INPUT_PRECISION=tiles.input_precision(),
        EVEN_D=d % config.block_d == 0,
        ALIGNED=ALIGNED,
        **config.launch_options(),
    )
