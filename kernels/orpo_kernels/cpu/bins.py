"""The schedule that keeps logits alive for their gradient: bins of whole pairs, 6 N*V*D FLOPs.

A token's coefficient depends on its whole pair (Eq. 6), so a tile of logits can be turned into gradients at once when
it holds whole pairs. A pair whose logits exceed the budget goes by strips, at 8.

The bins depend on the rows, the budget and the dtypes alone, not on which gradients are wanted, so that the loss under
no_grad and in training is the same number bit for bit.

Letters: P pairs, S = 2P sequences, N kept rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orpo_kernels import strips
from orpo_kernels.cpu.logits import CHUNK_ROWS
from orpo_kernels.head import Gradients, Head, Needs
from orpo_kernels.matmul import WeightedRows, accumulation_dtype, parts, saved_dtype, widened_matmul
from orpo_kernels.plan import Plan
from orpo_kernels.rows import Rows

# Rows of whole pairs, all chosen ones before all rejected ones: two runs of rows, or one where they meet.
Bin = tuple[slice, ...]


def make_bins(rows: Rows, capacity: int, wanted: float = math.inf) -> list[Bin]:
    """Bins of at most `capacity` rows, and about as few, and as even, as bins of `wanted` rows would be.

    A pair above `wanted`, or above `capacity`, is a bin of its own. Reads row counts on the host.
    """
    p = rows.pairs
    counts = torch.bincount(rows.sequence_N, minlength=2 * p).tolist()
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    bins: list[Bin] = []
    first, left = 0, starts[-1]
    while first < p:
        target = left / max(1, -(-left // wanted))
        last, size = first, 0
        while last < p:
            pair = counts[last] + counts[p + last]
            # A pair that would end further above the target than the bin is below it opens the next bin.
            if last > first and (size + pair > capacity or (size and size + pair / 2 > target)):
                break
            size += pair
            last += 1
        chosen, rejected = slice(starts[first], starts[last]), slice(starts[p + first], starts[p + last])
        # Where both meet, as in one bin of all pairs, rows are a view: two slices would be a copy of them.
        whole = chosen.stop == rejected.start
        bins.append((slice(chosen.start, rejected.stop),) if whole else (chosen, rejected))
        first, left = last, left - size
    return bins


class HeadGradient:
    """Sum over calls of g^T (coef * x) and g^T coef.

    A single product is stored in `dtype`, that of the finished gradient, and needs no accumulator; from the second on
    the sum is kept in float32, since bfloat16 accumulation would be off by 7e-3 after 32 bins. The second of two
    bfloat16 products is added part by part and rounded again: no float32 copy of the head's size exists.
    """

    def __init__(self, needs: Needs, dtype: torch.dtype) -> None:
        self.needs, self.dtype = needs, dtype
        self.weight_VD: Tensor | None = None
        self.bias_V: Tensor | None = None

    def add(self, g_NV: Tensor, x_ND: Tensor, coef_N: Tensor, last: bool = False) -> None:
        rows = WeightedRows(x_ND, coef_N, g_NV.dtype)
        if self.needs.weight and self.weight_VD is None:
            dtype = self.dtype if last else torch.promote_types(self.dtype, g_NV.dtype)
            self.weight_VD = _weight_grad(rows, g_NV, dtype)
        elif self.needs.weight:
            if not last:
                self.weight_VD = self.weight_VD.to(coef_N.dtype)
            if self.weight_VD.dtype == g_NV.dtype == coef_N.dtype:
                self.weight_VD.addmm_(g_NV.T, rows.x_ND)
            else:
                for start, stop in parts(self.weight_VD, coef_N.dtype):
                    product = rows.weight_grad(g_NV[:, start:stop], coef_N.dtype)
                    self.weight_VD[start:stop] = product.add_(self.weight_VD[start:stop])
        if self.needs.bias:
            product_V = rows.bias_grad(g_NV, coef_N.dtype)
            self.bias_V = product_V if self.bias_V is None else self.bias_V.add_(product_V)

    def add_finished(self, gradients: Gradients) -> None:
        """Add what `strips.backward` made of other rows."""
        for name in ("weight_VD", "bias_V"):
            mine, theirs = getattr(self, name), getattr(gradients, name)
            if theirs is not None:
                setattr(self, name, theirs if mine is None else mine.to(accumulation_dtype(mine)).add_(theirs))


def _weight_grad(rows: WeightedRows, g_NV: Tensor, dtype: torch.dtype) -> Tensor:
    """g^T (coef * x) in `dtype`; without a copy of it in g's dtype where that is wider."""
    if g_NV.dtype.itemsize <= dtype.itemsize:
        return rows.weight_grad(g_NV, dtype)
    out_VD = g_NV.new_empty((g_NV.shape[1], rows.x_ND.shape[1]), dtype=dtype)
    for start, stop in parts(out_VD, g_NV.dtype):
        out_VD[start:stop] = rows.weight_grad(g_NV[:, start:stop], g_NV.dtype)
    return out_VD


def forward(plan: Plan, x_ND: Tensor, rows: Rows, head: Head, settings: dict) -> tuple[Tensor, Gradients]:
    """(logp_N, gradients of the loss), tiles of logits never above the plan's `tile_rows`.

    `settings` are the keyword arguments of the objective, with both denominators given.
    """
    stages, needs = plan.stages, plan.needs
    dtype = accumulation_dtype(x_ND, head.weight_VD)
    logp_N = x_ND.new_zeros(x_ND.shape[0], dtype=dtype)
    dx_ND = x_ND.new_zeros(x_ND.shape, dtype=dtype) if needs.hidden else None
    total = HeadGradient(needs, saved_dtype(head.weight_VD))

    # Larger tiles only take longer to touch. But a sum in a wider dtype than the head's gradient, as bfloat16 needs it
    # from the third bin on, would be larger than the logits that smaller tiles save.
    wanted = CHUNK_ROWS if saved_dtype(head.weight_VD) == dtype else math.inf
    bins = make_bins(rows, plan.tile_rows, wanted)
    sizes = [sum(part.stop - part.start for part in bin_) for bin_ in bins]
    fitting = [size for size in sizes if size <= plan.tile_rows]
    memory = stages.tile_memory(fitting, x_ND, head, with_grad=needs.any)
    for bin_, size in zip(bins, sizes, strict=True):
        x, part = _take(x_ND, bin_), rows.map(lambda array, bin_=bin_: _take(array, bin_))
        if size > plan.tile_rows:
            logp, gradients = _by_strips(plan, x, part, head, settings)
            _put(logp_N, bin_, logp)
            if dx_ND is not None:
                _put(dx_ND, bin_, gradients.x_ND.mul_(gradients.x_coef_N[:, None]))
            total.add_finished(gradients)
        elif not needs.any:
            _put(logp_N, bin_, stages.tile_stats(x, part.targets_N, head, memory))
        else:
            logp, g_NV = stages.tile_stats_and_grad(x, part.targets_N, head, memory)
            _put(logp_N, bin_, logp)
            coef = head.scale * stages.objective(logp, part, **settings).coef_N
            if dx_ND is not None:
                _put(dx_ND, bin_, widened_matmul(g_NV, head.weight_VD, dtype).mul_(coef[:, None]))
            if needs.head:
                total.add(g_NV, x, coef, last=bin_ is bins[-1])
            del g_NV
    return logp_N, Gradients(dx_ND, total.weight_VD, total.bias_V)


def _by_strips(plan: Plan, x_ND: Tensor, rows: Rows, head: Head, settings: dict) -> tuple[Tensor, Gradients]:
    """`forward` of one pair whose logits would not fit."""
    logp_N, lse_2N = plan.stages.token_stats(x_ND, rows.targets_N, head, plan.strip_bytes)
    if not plan.needs.any:
        return logp_N, Gradients()
    coef_N = plan.stages.objective(logp_N, rows, **settings).coef_N
    dtype = saved_dtype(head.weight_VD)
    return logp_N, strips.backward(plan, x_ND, rows.targets_N, logp_N, lse_2N, coef_N, head, head_dtype=dtype)


def _take(t: Tensor, tiles: Bin) -> Tensor:
    return t[tiles[0]] if len(tiles) == 1 else torch.cat([t[tile] for tile in tiles])


def _put(t: Tensor, tiles: Bin, values: Tensor) -> None:
    first = 0
    for tile in tiles:
        t[tile] = values[first : first + tile.stop - tile.start]
        first += tile.stop - tile.start
