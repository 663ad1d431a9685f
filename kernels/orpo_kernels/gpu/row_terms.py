"""What stage 3 needs of each row's statistics, computed once for all strips and in one launch.

    target_grad_n = 1 - p_y = -expm1(logp_n)                                the target's entry of g (Eq. 8)
    kept_target_grad_n = target_grad_n cap'(z_y), z_y = logp_n + lse_n      the same beside kept exponentials
    row_scale_n = 2^(14 - floor(log2(target_grad_n)))                       float16 rows of g alone: logit_grad.py
    coef'_n = scale * dL/dloss * coef_n / row_scale_n                       the coefficient as it applies to stored g

The scale is made of the bits of target_grad: a logarithm that is off by its last bit would be another power of two.

Letters: N rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.gpu.device_math import expm1
from orpo_kernels.head import Head

# float16 g holds the target's entry, a row's largest, between 2^14 and 2^15.
_ROW_EXPONENT = 14
# 1 - p_y below this is not scaled up any further: the scale itself has to stay finite in float32.
_SMALLEST = 2.0**-100
_BLOCK = 256


class RowTerms(NamedTuple):
    """float32 (N,) each; row_scale_N is None but for float16."""

    target_grad_N: Tensor
    kept_target_grad_N: Tensor
    row_scale_N: Tensor | None


@triton.jit
def row_terms_kernel(
    logp_ptr,
    lse_ptr,
    coef_ptr,
    upstream_ptr,
    target_grad_ptr,
    kept_target_grad_ptr,
    row_scale_ptr,
    coef_out_ptr,
    N,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_COEF: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    ROW_EXPONENT: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_n < N
    logp_N = tl.load(logp_ptr + offs_n, mask=mask, other=0.0)
    target_grad_N = -expm1(logp_N)
    tl.store(target_grad_ptr + offs_n, target_grad_N, mask=mask)
    if HAS_SOFTCAP:
        max_N = tl.load(lse_ptr + offs_n, mask=mask, other=0.0)
        log_sum_N = tl.load(lse_ptr + N + offs_n, mask=mask, other=0.0)
        t_N = (logp_N + log_sum_N + max_N) / softcap
        # Rounded beyond the cap, it would turn the sign.
        kept_N = target_grad_N * tl.maximum(1.0 - t_N * t_N, 0.0)
        tl.store(kept_target_grad_ptr + offs_n, kept_N, mask=mask)
    if HAS_ROW_SCALE:
        bits_N = tl.maximum(target_grad_N, SMALLEST).to(tl.int32, bitcast=True)
        exponent_N = (bits_N >> 23) - 127
        row_scale_N = ((ROW_EXPONENT + 127 - exponent_N) << 23).to(tl.float32, bitcast=True)
        tl.store(row_scale_ptr + offs_n, row_scale_N, mask=mask)
    if HAS_COEF:
        coef_N = scale * tl.load(coef_ptr + offs_n, mask=mask, other=0.0)
        if HAS_UPSTREAM:
            coef_N *= tl.load(upstream_ptr).to(tl.float32)
        if HAS_ROW_SCALE:
            coef_N /= row_scale_N
        tl.store(coef_out_ptr + offs_n, coef_N, mask=mask)


def row_terms(
    logp_N: Tensor,
    lse_2N: Tensor,
    head: Head,
    dtype: torch.dtype,
    coef_N: Tensor | None = None,
    upstream: Tensor | None = None,
) -> tuple[RowTerms, Tensor | None]:
    """The terms for g stored in `dtype`, and coef'_N; without coef_N 1 / row_scale_N, None where that is 1."""
    n, scaled, capped = logp_N.shape[0], dtype == torch.float16, head.softcap is not None
    target_grad_N = torch.empty_like(logp_N)
    kept_target_grad_N = torch.empty_like(logp_N) if capped else target_grad_N
    row_scale_N = torch.empty_like(logp_N) if scaled else None
    coef_out_N = None if coef_N is None else torch.empty_like(logp_N)
    if n:
        row_terms_kernel[(triton.cdiv(n, _BLOCK),)](
            logp_N,
            lse_2N,
            None if coef_N is None else coef_N.contiguous(),
            upstream,
            target_grad_N,
            kept_target_grad_N,
            row_scale_N,
            coef_out_N,
            N=n,
            scale=head.scale,
            softcap=head.softcap or 0.0,
            HAS_SOFTCAP=capped,
            HAS_ROW_SCALE=scaled,
            HAS_COEF=coef_N is not None,
            HAS_UPSTREAM=upstream is not None,
            ROW_EXPONENT=_ROW_EXPONENT,
            SMALLEST=_SMALLEST,
            BLOCK=_BLOCK,
            enable_fp_fusion=True,
        )
    if coef_N is None and scaled:
        coef_out_N = 1 / row_scale_N
    return RowTerms(target_grad_N, kept_target_grad_N, row_scale_N), coef_out_N
