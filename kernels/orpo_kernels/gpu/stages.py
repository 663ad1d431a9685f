"""Stages 1 to 3 with Triton: the interface of cpu/stages.py over logit_stats.py, odds_ratio.py and logit_grad.py.

Letters: N rows, D hidden size, V vocabulary, W columns of a strip.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orpo_kernels.gpu.kept_grad import kept_grad as exps_grad
from orpo_kernels.gpu.logit_grad import logit_grad as recomputed_grad
from orpo_kernels.gpu.logit_stats import logit_stats
from orpo_kernels.gpu.odds_ratio import combine, objective
from orpo_kernels.head import Head
from orpo_kernels.kept import Kept
from orpo_kernels.matmul import WeightedRows

__all__ = ["objective"]

# float16 g holds the target's entry, a row's largest, between 2^14 and 2^15.
_ROW_EXPONENT = 14
# 1 - p_y below this is not scaled up any further: the scale itself has to stay finite in float32.
_SMALLEST = 2.0**-100


def compute_dtype(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the matmuls: the wider of the two operands'."""
    return torch.promote_types(x_dtype, weight_dtype)


def operands(x_ND: Tensor, head: Head) -> tuple[Tensor, Head]:
    """x and the bias contiguous, and both operands in one dtype."""
    dtype = compute_dtype(x_ND.dtype, head.weight_VD.dtype)
    bias_V = None if head.bias_V is None else head.bias_V.contiguous()
    head = Head(head.weight_VD.to(dtype), bias_V, head.scale, head.softcap)
    return x_ND.to(dtype).contiguous(), head


def _row_scale(logp_N: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The power of two that float16 rows of g carry; None for dtypes with float32's range."""
    if dtype != torch.float16:
        return None
    return torch.exp2(_ROW_EXPONENT - torch.floor(torch.log2((-torch.expm1(logp_N)).clamp(min=_SMALLEST))))


def token_stats(
    x_ND: Tensor, targets_N: Tensor, head: Head, strip_bytes: int, columns: int = 0, kept: Kept | None = None
) -> tuple[Tensor, Tensor]:
    """Stage 1: (logp_N, lse_2N); logits exist only as tiles on the chip, and the exponentials that `kept` is to hold.

    `columns` are the first ones, of which a call with a gradient keeps them and one without does not.
    """
    if x_ND.shape[0] == 0:
        return x_ND.new_zeros(0, dtype=torch.float32), x_ND.new_zeros((2, 0), dtype=torch.float32)
    x_ND, head = operands(x_ND, head)
    return combine(*logit_stats(x_ND, targets_N, head, columns, kept))


def logit_grad(
    x_ND: Tensor, targets_N: Tensor, logp_N: Tensor, lse_2N: Tensor, head: Head, first: int, last: int
) -> tuple[Tensor, Tensor]:
    """Stage 3: (g_NW, weight_WD) for columns [first, last), logits recomputed."""
    x_ND, head = operands(x_ND, head.strip(first, last))
    if x_ND.shape[0] == 0:
        return x_ND.new_empty((0, last - first)), head.weight_VD
    row_scale_N = _row_scale(logp_N, x_ND.dtype)
    g_NW = recomputed_grad(x_ND, targets_N - first, lse_2N, -torch.expm1(logp_N), row_scale_N, head)
    return g_NW, head.weight_VD


def kept_grad(
    kept: Kept, targets_N: Tensor, logp_N: Tensor, lse_2N: Tensor, head: Head, first: int, last: int
) -> tuple[Tensor, Tensor]:
    """Stage 3: (g_NW, weight_WD) for columns [first, last) from their kept exponentials."""
    dtype = kept.exps.dtype
    if targets_N.shape[0] == 0:
        return kept.exps.new_empty((0, last - first)), head.weight_VD[first:last].to(dtype)
    target_grad_N = -torch.expm1(logp_N)
    if head.softcap is not None:
        # Of the target's own logit, which logp + lse is.
        slope_N = 1 - ((logp_N + lse_2N[1] + lse_2N[0]) / head.softcap) ** 2
        # Rounded beyond the cap, it would turn the sign.
        target_grad_N *= slope_N.clamp(min=0)
    g_NW = exps_grad(kept, targets_N, lse_2N, target_grad_N, _row_scale(logp_N, dtype), first, last)
    return g_NW, head.weight_VD[first:last].to(dtype)


def grad_coefficient(coef_N: Tensor, logp_N: Tensor, dtype: torch.dtype) -> Tensor:
    """coef_N as it applies to g as stored in `dtype`: float16 rows of g carry a power of two."""
    row_scale_N = _row_scale(logp_N, dtype)
    return coef_N if row_scale_N is None else coef_N / row_scale_N


def head_grad_operand(x_ND: Tensor, coef_N: Tensor, head: Head) -> WeightedRows:
    """What `strip_head_grad` needs for every strip of one backward pass."""
    return WeightedRows(x_ND, coef_N, compute_dtype(x_ND.dtype, head.weight_VD.dtype))


def strip_head_grad(g_NW: Tensor, operand: WeightedRows, dw_WD: Tensor | None, db_W: Tensor | None) -> None:
    """dW = g^T (coef * x), db = g^T coef for one strip, written once."""
    if dw_WD is not None:
        operand.weight_grad(g_NW, dw_WD.dtype, out=dw_WD)
    if db_W is not None:
        db_W.copy_(operand.bias_grad(g_NW, db_W.dtype))
