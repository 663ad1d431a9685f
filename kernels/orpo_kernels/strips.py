"""Stages 1 and 3 strip by strip over the vocabulary, or from the exponentials that stage 1 kept, as a `Plan` says.

Letters: N kept rows, D hidden size, V vocabulary, C kept columns, W columns of a strip.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from orpo_kernels.head import Gradients, Head, strip_width, strips
from orpo_kernels.kept import Kept
from orpo_kernels.matmul import accumulation_dtype, add_matmul
from orpo_kernels.plan import Plan, Way


def token_stats(
    plan: Plan, x_ND: Tensor, targets_N: Tensor, head: Head, kept: Kept | None = None
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """((logp_N, lse_2N), u_ND): stage 1, and dlogp/dx before the logit scale where the head is frozen.

    A frozen head goes the same way with and without a gradient, so that both give the same log-probabilities.
    """
    stages, wants_u = plan.stages, plan.needs.frozen and plan.needs.hidden
    if wants_u and plan.way == Way.RUNNING:
        *stats, u_ND = stages.frozen_head_stats_and_grad(x_ND, targets_N, head, plan.strip_bytes)
        return tuple(stats), u_ND
    parts, n = [], x_ND.shape[0]
    u_ND = x_ND.new_zeros(x_ND.shape, dtype=accumulation_dtype(x_ND, head.weight_VD)) if wants_u else None
    for first, last in strips(n, plan.block or n) if n else ((0, 0),):
        part = x_ND[first:last], targets_N[first:last]
        stats = stages.token_stats(*part, head, plan.strip_bytes, plan.columns, kept)
        parts.append(stats)
        if u_ND is None:
            continue
        for _, _, g_NW, weight_WD in _strips_of_g(plan, *part, *stats, head, kept):
            add_matmul(u_ND[first:last], g_NW, weight_WD)
            del g_NW, weight_WD
    stats = logp_N, _ = parts[0] if len(parts) == 1 else tuple(torch.cat(t, -1) for t in zip(*parts, strict=True))
    if u_ND is None:
        return stats, None
    dtype = stages.compute_dtype(x_ND.dtype, head.weight_VD.dtype)
    return stats, u_ND.mul_(stages.grad_coefficient(torch.ones_like(logp_N), logp_N, dtype)[:, None])


def _strips_of_g(
    plan: Plan, x_ND: Tensor, targets_N: Tensor, logp_N: Tensor, lse_2N: Tensor, head: Head, kept: Kept | None
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(first, last, g_NW, weight_WD) of every strip: from what is kept, then from recomputed logits.

    Delete g_NW before the next one, or two strips are alive.
    """
    stages, n, v = plan.stages, x_ND.shape[0], head.weight_VD.shape[0]
    columns = 0 if kept is None else kept.columns
    if kept is not None:
        for first, last in strips(columns, strip_width(n, columns, kept.exps.dtype.itemsize, plan.strip_bytes)):
            yield first, last, *stages.kept_grad(kept, targets_N, logp_N, lse_2N, head, first, last)
    if columns == v:
        return
    element_bytes = stages.compute_dtype(x_ND.dtype, head.weight_VD.dtype).itemsize
    for first, last in strips(v - columns, strip_width(n, v - columns, element_bytes, plan.strip_bytes)):
        first, last = columns + first, columns + last
        yield first, last, *stages.logit_grad(x_ND, targets_N, logp_N, lse_2N, head, first, last)


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
) -> Gradients:
    """Stage 3, one strip at a time; coef_N holds the upstream gradient (Eq. 7).

    dX sums over strips in float32; each row of dW belongs to one strip and is written once, in `head_dtype` or the
    weight's.
    """
    stages, needs, n, (v, d) = plan.stages, plan.needs, x_ND.shape[0], head.weight_VD.shape
    dx_ND = x_ND.new_zeros((n, d), dtype=coef_N.dtype) if needs.hidden else None
    dw_VD = x_ND.new_empty((v, d), dtype=head_dtype or head.weight_VD.dtype) if needs.weight else None
    db_V = x_ND.new_empty(v, dtype=head_dtype or head.bias_V.dtype) if needs.bias else None
    dtype = stages.compute_dtype(x_ND.dtype, head.weight_VD.dtype)
    coef_N = stages.grad_coefficient(head.scale * coef_N, logp_N, dtype)
    operand = stages.head_grad_operand(x_ND, coef_N, head) if needs.head else None
    for first, last, g_NK, weight_KD in _strips_of_g(plan, x_ND, targets_N, logp_N, lse_2N, head, kept):
        if dx_ND is not None:
            add_matmul(dx_ND, g_NK, weight_KD)
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
        dx_ND.mul_(coef_N[:, None])
    return Gradients(dx_ND, dw_VD, db_V)
