"""Stages 1 and 3 strip by strip over the vocabulary, or from the exponentials that stage 1 kept, as a `Plan` says.

Letters: N kept rows, D hidden size, V vocabulary, C kept columns, W columns of a strip.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from orpo_kernels.head import Gradients, Head, strip_width, strips
from orpo_kernels.kept import Kept
from orpo_kernels.matmul import accumulation_dtype, add_matmul, set_matmul
from orpo_kernels.plan import Plan, Way


def token_stats(
    plan: Plan, x_ND: Tensor, targets_N: Tensor, head: Head, kept: Kept | None = None
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """((logp_N, lse_2N), u_ND): stage 1, and dlogp/dx before the logit scale where the head is frozen.

    targets_N are those of the head's own columns, -1 elsewhere (`Shard.place`).

    A frozen head goes the same way with and without a gradient, so that both give the same log-probabilities.
    """
    stages, wants_u = plan.stages, plan.needs.frozen and plan.needs.hidden
    if wants_u and plan.way == Way.RUNNING:
        *stats, u_ND = stages.frozen_head_stats_and_grad(x_ND, targets_N, head, plan.strip_bytes)
        return tuple(stats), head.shard.sum_(u_ND)
    parts, n = [], x_ND.shape[0]
    u_ND = x_ND.new_empty(x_ND.shape, dtype=accumulation_dtype(x_ND, head.weight_VD)) if wants_u else None
    dtype = stages.compute_dtype(x_ND.dtype, head.weight_VD.dtype)
    for first, last in strips(n, plan.block or n) if n else ((0, 0),):
        part = x_ND[first:last], targets_N[first:last]
        stats = stages.token_stats(*part, head, plan.strip_bytes, plan.columns, kept)
        parts.append(stats)
        if u_ND is None:
            continue
        terms, factor_N = stages.row_terms(*stats, head, dtype)
        for start, _, g_NW, weight_WD in _strips_of_g(plan, *part, terms, stats[1], head, kept):
            (add_matmul if start else set_matmul)(u_ND[first:last], g_NW, weight_WD)
            del g_NW, weight_WD
        if factor_N is not None:
            u_ND[first:last].mul_(factor_N[:, None])
    stats = parts[0] if len(parts) == 1 else tuple(torch.cat(t, -1) for t in zip(*parts, strict=True))
    return stats, u_ND if u_ND is None else head.shard.sum_(u_ND)


def _strips_of_g(
    plan: Plan, x_ND: Tensor, targets_N: Tensor, terms: Any, lse_2N: Tensor, head: Head, kept: Kept | None
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(first, last, g_NW, weight_WD) of every strip: from what is kept, then from recomputed logits.

    `terms` are those of `stages.row_terms`. Delete g_NW before the next one, or two strips are alive.
    """
    stages, n, v = plan.stages, x_ND.shape[0], head.weight_VD.shape[0]
    columns = 0 if kept is None else kept.columns
    if kept is not None:
        weight_CD, dtype = head.weight_VD[:columns], kept.exps.dtype
        width = strip_width(n, columns, dtype.itemsize, plan.strip_bytes)
        g_NC = stages.kept_grad(kept, targets_N, terms, lse_2N, 0, columns) if kept.overwrite else None
        if kept.overwrite and weight_CD.dtype == dtype != torch.float16:
            # g is there, and the products need nothing of the head's size beside it: then one is faster than several.
            width = columns
        for first, last in strips(columns, width):
            if g_NC is None:
                g_NW = stages.kept_grad(kept, targets_N, terms, lse_2N, first, last)
            else:
                g_NW = g_NC[:, first:last]
            yield first, last, g_NW, weight_CD[first:last].to(dtype)
            del g_NW
    if columns == v:
        return
    element_bytes = stages.compute_dtype(x_ND.dtype, head.weight_VD.dtype).itemsize
    # Once: ranks whose shards differ in size have different numbers of strips.
    shift_N1 = stages.target_shift(x_ND, targets_N, head)
    for first, last in strips(v - columns, strip_width(n, v - columns, element_bytes, plan.strip_bytes)):
        first, last = columns + first, columns + last
        yield first, last, *stages.logit_grad(x_ND, targets_N, terms, lse_2N, head, first, last, shift_N1)


def backward(
    plan: Plan,
    x_ND: Tensor,
    targets_N: Tensor,
    logp_N: Tensor,
    lse_2N: Tensor,
    coef_N: Tensor,
    head: Head,
    kept: Kept | None = None,
    head_dtype: torch.dtype | None = None,
    upstream: Tensor | None = None,
) -> Gradients:
    """Stage 3, one strip at a time; coef_N is Eq. 7's, without the `upstream` gradient where that is given.

    dX sums over strips, and over the ranks of a shard's group, in float32, its coefficients left out; each row of dW
    belongs to one strip and is written once, in `head_dtype` or the weight's.
    """
    stages, needs, n, (v, d) = plan.stages, plan.needs, x_ND.shape[0], head.weight_VD.shape
    dx_ND = x_ND.new_empty((n, d), dtype=coef_N.dtype) if needs.hidden else None
    dw_VD = x_ND.new_empty((v, d), dtype=head_dtype or head.weight_VD.dtype) if needs.weight else None
    db_V = x_ND.new_empty(v, dtype=head_dtype or head.bias_V.dtype) if needs.bias else None
    dtype = stages.compute_dtype(x_ND.dtype, head.weight_VD.dtype)
    terms, coef_N = stages.row_terms(logp_N, lse_2N, head, dtype, coef_N, upstream)
    operand = stages.head_grad_operand(x_ND, coef_N, head) if needs.head else None
    for first, last, g_NK, weight_KD in _strips_of_g(plan, x_ND, targets_N, terms, lse_2N, head, kept):
        if dx_ND is not None:
            (add_matmul if first else set_matmul)(dx_ND, g_NK, weight_KD)
        if needs.head:
            # Last, since it may use g_NK up.
            stages.strip_head_grad(
                g_NK,
                operand,
                None if dw_VD is None else dw_VD[first:last],
                None if db_V is None else db_V[first:last],
            )
        del g_NK, weight_KD
    if dx_ND is not None:
        head.shard.sum_(dx_ND)
    return Gradients(dx_ND, dw_VD, db_V, coef_N)
