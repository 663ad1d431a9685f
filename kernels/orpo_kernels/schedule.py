"""Which logits are alive when: the order in which the stages run over rows and vocabulary, for every backend.

Costs in units of N*V*D FLOPs, a plain forward and backward being 6:

    no gradient wanted                                               2     one strip alive
    strips   forward keeps nothing, backward recomputes              2+6   one strip alive (`strip_bytes`)
    Triton   forward keeps exponentials of the first C columns,
             of which backward recomputes no logit (kept.py)         2+4   at most `logits_budget`, and one strip
    torch    bins: gradients are made while their tile is alive      6     at most `logits_budget` alive (bins.py)

With weight and bias frozen there is no backward: dX is made in the forward, at 2 less, in torch without a second look
at any logit, since it follows the running maximum, with Triton from a block of rows' exponentials after the other's.

Letters: N kept rows, D hidden size, V vocabulary, C kept columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from . import bins
from .form import keeps_exponentials
from .head import Gradients, Head, Needs, strip_width, strips
from .kept import TILE, Keeping, Kept, block_rows, kept_columns, row_tiles
from .matmul import accumulation_dtype, add_matmul
from .reference import Objective
from .rows import Rows


def recomputes(needs: Needs, logits_budget: int, backend: str) -> bool:
    """Whether backward still has gradients to compute: the head wants one, and no tiles were alive to make it of."""
    return needs.head and not uses_bins(logits_budget, backend)


def uses_bins(logits_budget: int, backend: str) -> bool:
    """Whether the budget is one of tiles whose gradients are made in the forward."""
    return logits_budget > 0 and backend == "torch"


def kept_tiles(rows: int, hidden_RD: Tensor, weight_VD: Tensor, logits_budget: int, backend: str) -> int:
    """Row tiles of exponentials for so many rows; 0 for a backend that keeps none."""
    if logits_budget == 0 or not keeps_exponentials(backend):
        return 0
    dtype = torch.promote_types(hidden_RD.dtype, weight_VD.dtype)
    return row_tiles(rows, weight_VD.shape[0], dtype.itemsize, logits_budget)


def keeping(x_ND: Tensor, weight_VD: Tensor, logits_budget: int, backend: str, frozen: bool) -> Keeping:
    """What is kept of these rows, with a gradient; without one they go the same way. `frozen`: the head is."""
    n, v = x_ND.shape[0], weight_VD.shape[0]
    if frozen and logits_budget > 0 and keeps_exponentials(backend):
        dtype = torch.promote_types(x_ND.dtype, weight_VD.dtype)
        if block := block_rows(n, v, dtype.itemsize, logits_budget):
            return Keeping(v, block * -(-v // TILE), block)
    tiles = kept_tiles(n, x_ND, weight_VD, logits_budget, backend)
    return Keeping(kept_columns(n, v, tiles), tiles)


def forward_flops(x_ND: Tensor, weight_VD: Tensor, needs: Needs, logits_budget: int, backend: str, frozen: bool) -> int:
    """FLOPs of the matmuls of the forward; of the tensors only shapes and dtypes are read."""
    (n, d), v = x_ND.shape, weight_VD.shape[0]
    if uses_bins(logits_budget, backend) and needs.any:
        products = v * (1 + needs.hidden + needs.weight)
    elif frozen and needs.hidden:
        # dX at once. In torch it follows the running maximum; Triton recomputes the logits that it has not kept.
        again = 0 if backend == "torch" else v - keeping(x_ND, weight_VD, logits_budget, backend, True).columns
        products = 2 * v + again
    else:
        products = v
    return 2 * n * d * products


def backward_flops(x_ND: Tensor, weight_VD: Tensor, needs: Needs, tiles: int) -> int:
    """FLOPs of `backward_by_strips`, where exponentials of so many row tiles are kept."""
    (n, d), v = x_ND.shape, weight_VD.shape[0]
    return 2 * n * d * (v - kept_columns(n, v, tiles) + v * (needs.hidden + needs.weight))


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
    keep: Keeping,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor | None, Objective, Gradients]:
    """Stages 1 and 2, and stage 3 where it can be done at once: (logp_N, lse_2N, objective, gradients).

    lse_2N is None under a budget of tiles; gradients are complete, for an upstream gradient of 1, unless `recomputes`.
    `kept` is filled with the exponentials that `keep` says.
    """
    if backend.TILES and logits_budget > 0:
        logp_N, gradients = bins.forward(backend, x_ND, rows, head, settings, needs, logits_budget)
        return logp_N, None, backend.objective(logp_N, rows, **settings), gradients
    stats, u_ND = token_stats(backend, x_ND, rows.targets_N, head, needs, head_frozen, strip_bytes, keep, kept)
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
    keep: Keeping,
    kept: Kept | None = None,
) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
    """((logp_N, lse_2N), u_ND): stage 1 by strips, and dlogp/dx before the logit scale where the head is frozen.

    A frozen head goes the same way with and without a gradient, so that both give the same log-probabilities.
    """
    wants_u = head_frozen and needs.hidden
    if wants_u and backend.TILES:
        *stats, u_ND = backend.frozen_head_stats_and_grad(x_ND, targets_N, head, strip_bytes)
        return tuple(stats), u_ND
    parts, n = [], x_ND.shape[0]
    u_ND = x_ND.new_zeros(x_ND.shape, dtype=accumulation_dtype(x_ND, head.weight_VD)) if wants_u else None
    for first, last in strips(n, keep.block or n) if n else ((0, 0),):
        part = x_ND[first:last], targets_N[first:last]
        stats = backend.token_stats(*part, head, strip_bytes, keep.columns, kept)
        parts.append(stats)
        if u_ND is None:
            continue
        for _, _, g_NW, weight_WD in _strips_of_g(backend, *part, *stats, head, strip_bytes, kept):
            add_matmul(u_ND[first:last], g_NW, weight_WD)
            del g_NW, weight_WD
    stats = logp_N, _ = parts[0] if len(parts) == 1 else tuple(torch.cat(t, -1) for t in zip(*parts, strict=True))
    if u_ND is None:
        return stats, None
    dtype = backend.compute_dtype(x_ND.dtype, head.weight_VD.dtype)
    return stats, u_ND.mul_(backend.grad_coefficient(torch.ones_like(logp_N), logp_N, dtype)[:, None])


def _strips_of_g(
    backend: ModuleType,
    x_ND: Tensor,
    targets_N: Tensor,
    logp_N: Tensor,
    lse_2N: Tensor,
    head: Head,
    strip_bytes: int,
    kept: Kept | None,
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(first, last, g_NW, weight_WD) of every strip: from what is kept, then from recomputed logits.

    Delete g_NW before the next one, or two strips are alive.
    """
    n, v = x_ND.shape[0], head.weight_VD.shape[0]
    columns = 0 if kept is None else kept.columns
    if kept is not None:
        for first, last in strips(columns, strip_width(n, columns, kept.exps.dtype.itemsize, strip_bytes)):
            yield first, last, *backend.kept_grad(kept, targets_N, logp_N, lse_2N, head, first, last)
    if columns == v:
        return
    element_bytes = backend.strip_element_bytes(x_ND.dtype, head.weight_VD.dtype)
    for first, last in strips(v - columns, strip_width(n, v - columns, element_bytes, strip_bytes)):
        first, last = columns + first, columns + last
        yield first, last, *backend.logit_grad(x_ND, targets_N, logp_N, lse_2N, head, first, last)


def backward_by_strips(
    backend: ModuleType,
    x_ND: Tensor,
    targets_N: Tensor,
    logp_N: Tensor,
    lse_2N: Tensor,
    coef_N: Tensor,
    head: Head,
    needs: Needs,
    strip_bytes: int,
    kept: Kept | None = None,
) -> Gradients:
    """Stage 3, one strip at a time; coef_N holds the upstream gradient (Eq. 7).

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
    for first, last, g_NK, weight_KD in _strips_of_g(backend, x_ND, targets_N, logp_N, lse_2N, head, strip_bytes, kept):
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
