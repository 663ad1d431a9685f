"""Which logits are alive when: the order in which the stages run over rows and vocabulary, for every backend.

Costs in units of N*V*D FLOPs, a plain forward and backward being 6:

    no gradient wanted                                               2     one strip alive
    strips   forward keeps nothing, backward recomputes              2+6   one strip alive (`strip_bytes`)
    frozen   weight and bias frozen: the input gradient follows
             the running maximum through the one forward pass        4     one strip alive
    bins     gradients are made while their tile is alive            6     at most `logits_budget` alive (bins.py)

Letters: N kept rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import bins
from .head import Gradients, Head, Needs, strip_width, strips
from .matmul import add_matmul
from .reference import Objective
from .rows import Rows


def recomputes(needs: Needs, logits_budget: int) -> bool:
    """Whether backward computes the logits again: the head wants a gradient and no budget keeps tiles alive."""
    return needs.head and logits_budget == 0


def forward(
    backend: ModuleType,
    x_ND: Tensor,
    rows: Rows,
    head: Head,
    settings: dict,
    needs: Needs,
    head_frozen: bool,
    logits_budget: int,
    strip_bytes: int,
) -> tuple[Tensor, Tensor | None, Objective, Gradients]:
    """Stages 1 and 2, and stage 3 where it can be done at once: (logp_N, lse_N, objective, gradients).

    lse_N is None under a budget; gradients are complete, for an upstream gradient of 1, unless `recomputes`.
    """
    if logits_budget > 0:
        logp_N, gradients = bins.forward(backend, x_ND, rows, head, settings, needs, logits_budget)
        return logp_N, None, backend.objective(logp_N, rows, **settings), gradients
    stats, u_ND = token_stats(backend, x_ND, rows.targets_N, head, needs, head_frozen, strip_bytes)
    objective = backend.objective(stats[0], rows, **settings)
    dx_ND = None if u_ND is None else u_ND.mul_(head.scale * objective.coef_N[:, None])
    return *stats, objective, Gradients(x_ND=dx_ND)


def token_stats(
    backend: ModuleType,
    x_ND: Tensor,
    targets_N: Tensor,
    head: Head,
    needs: Needs,
    head_frozen: bool,
    strip_bytes: int,
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """((logp_N, lse_N), u_ND): stage 1 by strips, and dlogp/dx before the logit scale where the head is frozen.

    A frozen head goes the same way with and without a gradient, so that both give the same log-probabilities.
    """
    if not head_frozen:
        return backend.token_stats(x_ND, targets_N, head, strip_bytes), None
    if not needs.hidden:
        return backend.frozen_head_stats(x_ND, targets_N, head, strip_bytes), None
    *stats, u_ND = backend.frozen_head_stats_and_grad(x_ND, targets_N, head, strip_bytes)
    return tuple(stats), u_ND


def backward_by_strips(
    backend: ModuleType,
    x_ND: Tensor,
    targets_N: Tensor,
    logp_N: Tensor,
    lse_N: Tensor,
    coef_N: Tensor,
    head: Head,
    needs: Needs,
    strip_bytes: int,
) -> Gradients:
    """Stage 3, one strip of recomputed logits at a time; coef_N holds the upstream gradient (Eq. 7).

    dX sums over strips in float32; each row of dW belongs to one strip and is written once.
    """
    n, (v, d) = x_ND.shape[0], head.weight_VD.shape
    dx_ND = x_ND.new_zeros((n, d), dtype=coef_N.dtype) if needs.hidden else None
    dw_VD = torch.empty((v, d), dtype=head.weight_VD.dtype, device=x_ND.device) if needs.weight else None
    db_V = torch.empty(v, dtype=head.bias_V.dtype, device=x_ND.device) if needs.bias else None
    coef_N = backend.grad_coefficient(
        head.scale * coef_N, logp_N, backend.compute_dtype(x_ND.dtype, head.weight_VD.dtype)
    )
    operand = backend.head_grad_operand(x_ND, coef_N, head) if needs.head else None
    element_bytes = backend.strip_element_bytes(x_ND.dtype, head.weight_VD.dtype)
    for first, last in strips(v, strip_width(n, v, element_bytes, strip_bytes)):
        g_NK, weight_KD = backend.logit_grad(x_ND, targets_N, logp_N, lse_N, head, first, last)
        if dx_ND is not None:
            add_matmul(dx_ND, g_NK, weight_KD)
        if needs.head:
            # Last, since it may use g_NK up.
            backend.strip_head_grad(
                g_NK,
                operand,
                None if dw_VD is None else dw_VD[first:last],
                None if db_V is None else db_V[first:last],
            )
        del g_NK, weight_KD
    if dx_ND is not None:
        dx_ND.mul_(coef_N[:, None])
    return Gradients(dx_ND, dw_VD, db_V)
