"""Stages 1 to 3 in torch: the same algorithm as the Triton kernels, for CPU (and for checking them on a GPU).

A strip of logits is one library matmul (logits.py); what is elementwise then runs in place over blocks of rows
that stay in cache.

Letters: N rows, D hidden size, V vocabulary, K columns of a strip.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from orpo_kernels import reference
from orpo_kernels.cpu.logits import LogitStrip, chunk_rows, compute_dtype, row_blocks, target_shift
from orpo_kernels.cpu.running_stats import RunningStats, exp_, finite, stats_of
from orpo_kernels.head import Head, strip_width, strips
from orpo_kernels.matmul import accumulation_dtype, add_matmul, converted_parts, matmul, widened_matmul
from orpo_kernels.rows import Rows
from orpo_kernels.rows import check_rows as check
from orpo_kernels.slices import WHOLE, Slices

__all__ = ["check"]


def _take_target(z: Tensor, targets_N: Tensor, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and logit of the targets inside [first, last); their logits become -inf (Eq. 2 leaves them out)."""
    row = ((targets_N >= first) & (targets_N < last)).nonzero()[:, 0]
    column = targets_N[row] - first
    z_y = z[row, column]
    z[row, column] = -torch.inf
    return row, column, z_y


def _share(log_sum_N: Tensor) -> Tensor:
    """-exp(max - lse), (N, 1): what makes -p of exponentials that are relative to the maximum.

    At most 1 where there is one; without a finite logit but the target's, a factor of infinity would make 0 NaN.
    """
    return -torch.exp(-log_sum_N.clamp(min=0))[:, None]


def _element_bytes(x_ND: Tensor, head: Head) -> int:
    return compute_dtype(x_ND.dtype, head.weight_VD.dtype).itemsize


def token_stats(
    x_ND: Tensor, targets_N: Tensor, head: Head, strip_bytes: int, columns: int = 0, kept: None = None
) -> tuple[Tensor, Tensor]:
    """Stage 1: (logp_N, lse_2N) strip by strip; one strip of logits is alive at a time. No exponentials are kept.

    lse is that of the logits as LogitStrip gives them, and only for what it gives again.
    """
    n, v = x_ND.shape[0], head.weight_VD.shape[0]
    stats = RunningStats(n, x_ND, accumulation_dtype(x_ND, head.weight_VD))
    shift_N1 = target_shift(x_ND, targets_N, head)
    for first, last in strips(v, strip_width(n, v, _element_bytes(x_ND, head), strip_bytes)):
        strip = LogitStrip(x_ND, shift_N1, head, first, last)
        for block in strip.blocks():
            z = strip.read(block)
            row, _, z_y = _take_target(z, targets_N[block], first, last)
            stats.target_N[block][row] = z_y
            stats.add(block, z)
        # z is a view of its memory, which would stand beside the next strip's.
        strip = z = None
    return stats.finish(targets_N, head)


def _chunk_size(n: int, dtype: torch.dtype) -> int:
    """Rows to one matmul of a tile of n rows: as few matmuls as `chunk_rows` allow, as even as can be."""
    return -(-n // max(1, -(-n // chunk_rows(dtype))))


def tile_memory(tile_rows: Iterable[int], x_ND: Tensor, head: Head, with_grad: bool) -> Tensor:
    """Memory for tiles of so many rows each, one after the other: their logits, or those of one chunk of rows.

    Without it every tile's is fresh, and the first touch of fresh memory costs a tenth of the matmul.
    """
    dtype = compute_dtype(x_ND.dtype, head.weight_VD.dtype)
    rows = max((n if with_grad else _chunk_size(n, dtype) for n in tile_rows), default=0)
    return x_ND.new_empty(rows, head.weight_VD.shape[0], dtype=dtype)


def _tile_blocks(
    x_ND: Tensor, targets_N: Tensor, head: Head, memory_NV: Tensor, keep: bool
) -> Iterator[tuple[slice, LogitStrip, slice]]:
    """(rows, tile, the rows within the tile) of a tile over the whole vocabulary, to `keep` in memory_NV or not.

    The same matmuls either way: their shapes decide how they round.
    """
    (n, _), v = x_ND.shape, head.weight_VD.shape[0]
    size = _chunk_size(n, memory_NV.dtype)
    for start in range(0, n, size or 1):
        chunk = slice(start, min(start + size, n))
        out = memory_NV[chunk] if keep else memory_NV[: chunk.stop - start]
        tile = LogitStrip(x_ND[chunk], target_shift(x_ND[chunk], targets_N[chunk], head), head, 0, v, out)
        for block in tile.blocks():
            yield slice(start + block.start, start + block.stop), tile, block


def _whole_rows(z: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Stage 1 on rows of all logits: (logp_N, lse_2N); z becomes exp(z - lse_2N[0]), the target's 0."""
    targets_N1 = targets_N[:, None]
    z_y = z.gather(1, targets_N1)[:, 0]
    # Eq. 2 leaves it out.
    max_N = z.scatter_(1, targets_N1, -torch.inf).amax(1)
    sum_N = exp_(z.sub_(finite(max_N)[:, None])).sum(1)
    return stats_of(max_N, sum_N, z_y)


def tile_stats(x_ND: Tensor, targets_N: Tensor, head: Head, memory_NV: Tensor) -> Tensor:
    """Stage 1 on a tile over the whole vocabulary: logp_N, bit for bit that of `tile_stats_and_grad`."""
    logp_N = x_ND.new_empty(len(x_ND), dtype=accumulation_dtype(x_ND, head.weight_VD))
    for rows, tile, block in _tile_blocks(x_ND, targets_N, head, memory_NV, keep=False):
        # The same rows together as with gradients: the last few of a vectorised function round otherwise.
        logp_N[rows], _ = _whole_rows(tile.read(block), targets_N[rows])
    return logp_N


def frozen_head_stats_and_grad(
    x_ND: Tensor, targets_N: Tensor, head: Head, strip_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Stages 1 and 3 in one pass for a frozen head: (logp_N, lse_2N, u_ND), u = sum_v g_v W_v before its coefficient.

    The sum over v != y of exp(z - running maximum) * cap' * W_v follows the maximum as it rises, so no logit is
    computed twice; the target's own term is added at the end from its exact 1 - p_y. u is of the head's own columns.
    """
    n, v = x_ND.shape[0], head.weight_VD.shape[0]
    dtype = accumulation_dtype(x_ND, head.weight_VD)
    stats = RunningStats(n, x_ND, dtype)
    u_ND = x_ND.new_zeros(x_ND.shape, dtype=dtype)
    slope_y_N = x_ND.new_ones(n, dtype=dtype)
    shift_N1 = target_shift(x_ND, targets_N, head)
    for first, last in strips(v, strip_width(n, v, _element_bytes(x_ND, head), strip_bytes)):
        strip = LogitStrip(x_ND, shift_N1, head, first, last)
        for block in strip.blocks():
            z, slope = strip.read_with_slope(block)
            row, column, z_y = _take_target(z, targets_N[block], first, last)
            stats.target_N[block][row] = z_y
            u_ND[block] *= stats.add(block, z)[:, None]
            if slope is not None:
                slope_y_N[block][row] = slope[row, column]
                z.mul_(slope)
                slope = None
            strip.write(block, z)
        exps_NK = strip.z_NK
        # The memory of blocks is given back before the product takes some.
        strip = z = None
        add_matmul(u_ND, exps_NK, head.weight_VD[first:last])
        del exps_NK
    logp_N, lse_2N = stats.finish(targets_N, head)
    # Here u is relative to the largest logit of this rank's columns.
    u_ND.mul_(_share(lse_2N[1]) * torch.exp(stats.max_N - lse_2N[0])[:, None])
    target_grad_N = (-torch.expm1(logp_N) * slope_y_N).masked_fill_(targets_N < 0, 0)
    u_ND.addcmul_(head.weight_VD[targets_N.clamp(min=0)].to(dtype), target_grad_N[:, None])
    return logp_N, lse_2N, u_ND


def tile_stats_and_grad(x_ND: Tensor, targets_N: Tensor, head: Head, memory_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Stages 1 and 3 on a tile over the whole vocabulary: (logp_N, g_NV), g in the matmul's dtype."""
    g_NV = memory_NV[: x_ND.shape[0]]
    logp_N = x_ND.new_empty(len(x_ND), dtype=accumulation_dtype(x_ND, head.weight_VD))
    for rows, tile, block in _tile_blocks(x_ND, targets_N, head, g_NV, keep=True):
        z, slope = tile.read_with_slope(block)
        logp, (_, log_sum) = _whole_rows(z, targets_N[rows])
        z.mul_(_share(log_sum))
        z.scatter_(1, targets_N[rows, None], -torch.expm1(logp)[:, None])
        if slope is not None:
            z.mul_(slope)
            slope = None
        tile.write(block, z)
        logp_N[rows] = logp
    return logp_N, g_NV


def logit_grad(
    x_ND: Tensor,
    targets_N: Tensor,
    logp_N: Tensor,
    lse_2N: Tensor,
    head: Head,
    first: int,
    last: int,
    shift_N1: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Stage 3: (g_NK, weight_KD) for columns [first, last), logits recomputed (Eq. 8); g in the matmul's dtype.

    shift_N1 is `target_shift` of all columns.
    """
    strip, (max_N, log_sum_N) = LogitStrip(x_ND, shift_N1, head, first, last), lse_2N
    factor_N1 = _share(log_sum_N)
    for block in strip.blocks():
        z, slope = strip.read_with_slope(block)
        row, column, _ = _take_target(z, targets_N[block], first, last)
        exp_(z.sub_(max_N[block, None])).mul_(factor_N1[block])
        z[row, column] = -torch.expm1(logp_N[block][row])
        if slope is not None:
            z.mul_(slope)
            slope = None
        strip.write(block, z)
    return strip.z_NK, head.weight_VD[first:last]


def objective(
    logp_N: Tensor, rows: Rows, slices: Slices = WHOLE, **settings: float | Tensor | None
) -> reference.Objective:
    """Stage 2 (Eqs. 3-7), in float64: it is O(N), and a mean of thousands of terms gains the most from it."""
    sums_4S = slices.sum_(reference.answer_sums(logp_N.double(), rows))
    result = reference.objective_of_sums(sums_4S, rows, **settings)
    return reference.Objective(*(t if t.dtype == torch.bool else t.to(logp_N.dtype) for t in result))


def row_terms(
    logp_N: Tensor,
    lse_2N: Tensor,
    head: Head,
    dtype: torch.dtype,
    coef_N: Tensor | None = None,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(logp_N, which is all that `logit_grad` needs, scale * upstream * coef_N)."""
    if coef_N is not None:
        coef_N = head.scale * (coef_N if upstream is None else coef_N * upstream)
    return logp_N, coef_N


def weighted(x_ND: Tensor, coef_N: Tensor, dtype: torch.dtype) -> Tensor:
    """coef_n x_n in `dtype`; uses x_ND up, which is of coef_N's."""
    return x_ND.mul_(coef_N[:, None]).to(dtype)


def placed(dx_ND: Tensor, coef_N: Tensor | None, rows_N: Tensor, hidden_RD: Tensor, dtype: torch.dtype) -> Tensor:
    """dX_RD in `dtype`: coef_n dx_n at the places of their rows; uses dx_ND up."""
    if coef_N is not None:
        dx_ND.mul_(coef_N[:, None])
    # An index occurs at most twice, and x + y == y + x: no order to depend on.
    return torch.zeros_like(hidden_RD, dtype=dtype, memory_format=torch.contiguous_format).index_add_(
        0, rows_N, dx_ND.to(dtype)
    )


def mean_hidden(x_ND: Tensor, rows: Rows, dtype: torch.dtype, slices: Slices = WHOLE) -> Tensor:
    """(2, D) in `dtype`: the mean hidden state of the chosen and of the rejected rows that count."""
    chosen_N = rows.sequence_N < rows.pairs
    picks_2N = torch.stack([chosen_N, ~chosen_N])
    if not rows.all_count:
        picks_2N &= rows.in_response_N | rows.in_nll_N
    picks_2N = picks_2N.to(dtype)
    # Divided at the end: 1 / n is not a number of bfloat16, and would be off by 2^-9 in every term.
    if x_ND.is_cuda:
        sums_2D = matmul(picks_2N.to(x_ND.dtype), x_ND, dtype)
    else:
        # A CPU's narrow matmul would round its sums, or be emulated.
        sums_2D = widened_matmul(picks_2N, x_ND, dtype)
    return slices.whole_mean(sums_2D, picks_2N.sum(1, keepdim=True).clamp(min=0 if slices.name else 1))


def head_grad_operand(x_ND: Tensor, coef_N: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    """What `strip_head_grad` needs for every strip of one backward pass."""
    return x_ND, coef_N


def strip_head_grad(g_NK: Tensor, operand: tuple[Tensor, Tensor], dw_KD: Tensor | None, db_K: Tensor | None) -> None:
    """dW = g^T (coef * x), db = g^T coef for one strip, written once. Uses g_NK up.

    The coefficient goes onto g, in place: onto x, it would make one more copy of all hidden states.
    """
    x_ND, coef_N = operand
    for block in row_blocks(*g_NK.shape):
        # All rows at once, a bfloat16 strip would be copied whole to meet float32 coefficients.
        g_NK[block].mul_(coef_N[block, None])
    if dw_KD is not None:
        x_ND = x_ND.to(g_NK.dtype)
        if dw_KD.dtype == g_NK.dtype:
            torch.mm(g_NK.T, x_ND, out=dw_KD)
        else:
            # Whole, the product of few rows would be larger than the strip.
            for first, last in converted_parts(dw_KD, g_NK.dtype):
                dw_KD[first:last] = torch.mm(g_NK[:, first:last].T, x_ND)
    if db_K is not None:
        # Summed whole, a bfloat16 strip would be copied into float32.
        sum_K = g_NK.new_zeros(g_NK.shape[1], dtype=coef_N.dtype)
        for block in row_blocks(*g_NK.shape):
            sum_K += g_NK[block].sum(0, dtype=coef_N.dtype)
        db_K.copy_(sum_K)
