"""Stages 1 to 3 with Triton: the interface of cpu/stages.py over the kernels.

Letters: N rows, D hidden size, V vocabulary, W columns of a strip.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from orpo_kernels.gpu import row_checks
from orpo_kernels.gpu.hidden_rows import placed, weighted
from orpo_kernels.gpu.kept_grad import kept_grad as exps_grad
from orpo_kernels.gpu.logit_grad import logit_grad as recomputed_grad
from orpo_kernels.gpu.logit_stats import logit_stats
from orpo_kernels.gpu.mean_hidden import mean_hidden
from orpo_kernels.gpu.odds_ratio import combine, objective
from orpo_kernels.gpu.row_terms import RowTerms, row_terms
from orpo_kernels.head import Head
from orpo_kernels.kept import Kept
from orpo_kernels.matmul import WeightedRows
from orpo_kernels.rows import Rows, refuse_by_flags

__all__ = ["mean_hidden", "objective", "placed", "row_terms", "weighted"]


def compute_dtype(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the matmuls: the wider of the two operands'."""
    return torch.promote_types(x_dtype, weight_dtype)


def operands(x_ND: Tensor, head: Head) -> tuple[Tensor, Head]:
    """x and the bias contiguous, and both operands in one dtype."""
    dtype = compute_dtype(x_ND.dtype, head.weight_VD.dtype)
    bias_V = None if head.bias_V is None else head.bias_V.contiguous()
    return x_ND.to(dtype).contiguous(), replace(head, weight_VD=head.weight_VD.to(dtype), bias_V=bias_V)


def token_stats(
    x_ND: Tensor, targets_N: Tensor, head: Head, strip_bytes: int, columns: int = 0, kept: Kept | None = None
) -> tuple[Tensor, Tensor]:
    """Stage 1: (logp_N, lse_2N); logits exist only as tiles on the chip, and the exponentials that `kept` is to hold.

    `columns` are the first ones, of which a call with a gradient keeps them and one without does not.
    """
    if x_ND.shape[0] == 0:
        return x_ND.new_zeros(0, dtype=torch.float32), x_ND.new_zeros((2, 0), dtype=torch.float32)
    x_ND, head = operands(x_ND, head)
    return combine(*head.shard.whole_stats(*logit_stats(x_ND, targets_N, head, columns, kept), targets_N))


def target_shift(x_ND: Tensor, targets_N: Tensor, head: Head) -> None:
    """Nothing is left out of the logits of these kernels, which are float32 from their accumulator on."""


def logit_grad(
    x_ND: Tensor,
    targets_N: Tensor,
    terms: RowTerms,
    lse_2N: Tensor,
    head: Head,
    first: int,
    last: int,
    shift_N1: None = None,
) -> tuple[Tensor, Tensor]:
    """Stage 3: (g_NW, weight_WD) for columns [first, last), logits recomputed."""
    x_ND, head = operands(x_ND, head.strip(first, last))
    if x_ND.shape[0] == 0:
        return x_ND.new_empty((0, last - first)), head.weight_VD
    g_NW = recomputed_grad(x_ND, targets_N, lse_2N, terms.target_grad_N, terms.row_scale_N, head, first)
    return g_NW, head.weight_VD


def kept_grad(kept: Kept, targets_N: Tensor, terms: RowTerms, lse_2N: Tensor, first: int, last: int) -> Tensor:
    """Stage 3: g_NW for columns [first, last) from their kept exponentials."""
    if targets_N.shape[0] == 0:
        return kept.exps.new_empty((0, last - first))
    return exps_grad(kept, targets_N, lse_2N, terms.kept_target_grad_N, terms.row_scale_N, first, last)


def head_grad_operand(x_ND: Tensor, coef_N: Tensor, head: Head) -> WeightedRows:
    """What `strip_head_grad` needs for every strip of one backward pass."""
    return WeightedRows(x_ND.contiguous(), coef_N, compute_dtype(x_ND.dtype, head.weight_VD.dtype), weighted)


def strip_head_grad(g_NW: Tensor, operand: WeightedRows, dw_WD: Tensor | None, db_W: Tensor | None) -> None:
    """dW = g^T (coef * x), db = g^T coef for one strip, written once."""
    if dw_WD is not None:
        operand.weight_grad(g_NW, dw_WD.dtype, out=dw_WD)
    if db_W is not None:
        db_W.copy_(operand.bias_grad(g_NW, db_W.dtype))


def check(rows: Rows, hidden_rows: int, vocabulary: int, source: str) -> None:
    """`rows.check_rows` in one launch, and one for each of its questions."""
    if rows.rows_N.numel():
        flags = row_checks.flags(rows, hidden_rows, vocabulary)
        refuse_by_flags(flags, rows, hidden_rows, vocabulary, source)
