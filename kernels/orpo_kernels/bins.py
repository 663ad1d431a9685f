"""The schedule that keeps logits alive for their gradient: bins of whole pairs, 6 N*V*D FLOPs.

A token's coefficient depends on its whole pair (Eq. 6), so a tile of logits can be turned into gradients at once when
it holds whole pairs. A pair too large for the budget is cut into runs of rows. All response rows of one answer share
one unknown factor, so their g^T x is summed without it and scaled when the pair is complete: two more (V, D)
accumulators instead of a second computation of the logits.

The bins depend on the rows, the budget and the dtypes alone, not on which gradients are wanted, so that the loss under
no_grad and in training is the same number bit for bit.

Letters: P pairs, S = 2P sequences, N kept rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .head import Gradients, Head, Needs
from .matmul import WeightedRows, accumulation_dtype, parts, saved_dtype, widened_matmul
from .rows import Rows


@dataclass(frozen=True)
class Run:
    """Rows [first, last) of one sequence that share their masks."""

    first: int
    last: int
    in_response: bool
    in_nll: bool


@dataclass(frozen=True)
class Bin:
    """Slices of rows of whole pairs whose logits fit the budget together; or the runs of one oversized pair."""

    slices: tuple[slice, ...] = ()
    answers: tuple[tuple[Run, ...], ...] = ()


def make_bins(rows: Rows, capacity: int, wanted: float = math.inf) -> list[Bin]:
    """Bins of at most `capacity` rows, and about as few, and as even, as bins of `wanted` rows would be.

    A pair above `wanted` is a bin of its own. One above `capacity` is cut into runs, each within both.

    Reads row counts and, for oversized pairs, masks on the host.
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
            if size + pair > capacity or (size and size + pair / 2 > target):
                break
            size += pair
            last += 1
        if last > first:
            chosen, rejected = slice(starts[first], starts[last]), slice(starts[p + first], starts[p + last])
            # Where both meet, as in one bin of all pairs, rows are a view: two slices would be a copy of them.
            whole = chosen.stop == rejected.start
            bins.append(Bin(slices=(slice(chosen.start, rejected.stop),) if whole else (chosen, rejected)))
        else:
            most = min(capacity, wanted)
            answers = (tuple(_runs(rows, starts[s], starts[s + 1], most)) for s in (first, p + first))
            bins.append(Bin(answers=tuple(answers)))
            last, size = first + 1, counts[first] + counts[p + first]
        first, left = last, left - size
    return bins


def _runs(rows: Rows, first: int, last: int, most: int) -> Iterator[Run]:
    """Rows [first, last) cut where a mask changes, and each such stretch into as few even runs as `most` rows allow."""
    masks = list(zip(rows.in_response_N[first:last].tolist(), rows.in_nll_N[first:last].tolist(), strict=True))
    for (response, nll), stretch in itertools.groupby(range(first, last), key=lambda i: masks[i - first]):
        held = list(stretch)
        size = -(-len(held) // -(-len(held) // most))
        for start in range(held[0], held[-1] + 1, size):
            yield Run(start, min(start + size, held[-1] + 1), response, nll)


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

    def take(self, other: HeadGradient, factor: Tensor) -> None:
        """Add factor * other and empty `other`."""
        for name in ("weight_VD", "bias_V"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if theirs is None:
                continue
            if mine is not None and mine.dtype == theirs.dtype == factor.dtype:
                mine.addcmul_(theirs, factor)
            else:
                theirs = theirs.to(factor.dtype).mul_(factor)
                setattr(self, name, theirs if mine is None else theirs.add_(mine))
            setattr(other, name, None)


def _weight_grad(rows: WeightedRows, g_NV: Tensor, dtype: torch.dtype) -> Tensor:
    """g^T (coef * x) in `dtype`; without a copy of it in g's dtype where that is wider."""
    if g_NV.dtype.itemsize <= dtype.itemsize:
        return rows.weight_grad(g_NV, dtype)
    out_VD = g_NV.new_empty((g_NV.shape[1], rows.x_ND.shape[1]), dtype=dtype)
    for start, stop in parts(out_VD, g_NV.dtype):
        out_VD[start:stop] = rows.weight_grad(g_NV[:, start:stop], g_NV.dtype)
    return out_VD


def forward(
    backend: ModuleType, x_ND: Tensor, rows: Rows, head: Head, settings: dict, needs: Needs, logits_budget: int
) -> tuple[Tensor, Gradients]:
    """(logp_N, gradients of the loss), tiles of logits never above `logits_budget` bytes.

    `settings` are the keyword arguments of the objective, with both denominators given.
    """
    v = head.weight_VD.shape[0]
    dtype = accumulation_dtype(x_ND, head.weight_VD)
    capacity = logits_budget // (v * backend.tile_element_bytes(x_ND.dtype, head.weight_VD.dtype))
    assert capacity >= 1
    logp_N = x_ND.new_zeros(x_ND.shape[0], dtype=dtype)
    dx_ND = x_ND.new_zeros(x_ND.shape, dtype=dtype) if needs.hidden else None
    total = HeadGradient(needs, saved_dtype(head.weight_VD))

    # Larger tiles only take longer to touch. But a sum in a wider dtype than the head's gradient, as bfloat16 needs it
    # from the third bin on, would be larger than the logits that smaller tiles save.
    wanted = backend.CHUNK_ROWS if saved_dtype(head.weight_VD) == dtype else math.inf
    bins = make_bins(rows, capacity, wanted)
    memory = backend.tile_memory([n for bin_ in bins for n in _tile_rows(bin_)], x_ND, head, with_grad=needs.any)
    for bin_ in bins:
        if not needs.any:
            tiles = [bin_.slices] if bin_.slices else [(slice(r.first, r.last),) for runs in bin_.answers for r in runs]
            for tile in tiles:
                logp = backend.tile_stats(_take(x_ND, tile), _take(rows.targets_N, tile), head, memory)
                _put(logp_N, tile, logp)
        elif bin_.slices:
            x, part = _take(x_ND, bin_.slices), _take_rows(rows, bin_.slices)
            logp, g_NV = backend.tile_stats_and_grad(x, part.targets_N, head, memory)
            _put(logp_N, bin_.slices, logp)
            coef = head.scale * backend.objective(logp, part, **settings).coef_N
            coef = backend.grad_coefficient(coef, logp, g_NV.dtype)
            if dx_ND is not None:
                _put(dx_ND, bin_.slices, widened_matmul(g_NV, head.weight_VD, dtype).mul_(coef[:, None]))
            if needs.head:
                total.add(g_NV, x, coef, last=bin_ is bins[-1])
            del g_NV
        else:
            _oversized_pair(backend, x_ND, rows, head, settings, bin_, logp_N, dx_ND, total, memory)
    return logp_N, Gradients(dx_ND, total.weight_VD, total.bias_V)


def _oversized_pair(
    backend: ModuleType,
    x_ND: Tensor,
    rows: Rows,
    head: Head,
    settings: dict,
    bin_: Bin,
    logp_N: Tensor,
    dx_ND: Tensor | None,
    total: HeadGradient,
    memory: Tensor | None,
) -> None:
    """One pair, run by run: an answer's response rows are summed without their common factor, known at the end."""
    nll_coef = -head.scale * settings["nll_weight"] / settings["num_nll_tokens"]
    needs, sums = total.needs, []
    for runs in bin_.answers:
        answer = HeadGradient(needs, total.dtype)
        # The factor that most response rows share; the rest of a row's coefficient is known from its masks alone.
        main = max((r for r in runs if r.in_response), key=lambda r: r.last - r.first, default=None)
        sums.append((answer, main))
        for run in runs:
            here = slice(run.first, run.last)
            logp, g_NV = backend.tile_stats_and_grad(x_ND[here], rows.targets_N[here], head, memory)
            logp_N[here] = logp
            one = backend.grad_coefficient(torch.ones_like(logp), logp, g_NV.dtype)
            if dx_ND is not None:
                dx_ND[here] = widened_matmul(g_NV, head.weight_VD, dx_ND.dtype).mul_(one[:, None])
            if run.in_response:
                answer.add(g_NV, x_ND[here], one)
            known = run.in_nll - (main.in_nll if run.in_response else 0)
            if known:
                total.add(g_NV, x_ND[here], one * (known * nll_coef))
            del g_NV
    tiles = tuple(slice(r.first, r.last) for runs in bin_.answers for r in runs)
    coef = head.scale * backend.objective(_take(logp_N, tiles), _take_rows(rows, tiles), **settings).coef_N
    coef_N = torch.zeros_like(logp_N)
    _put(coef_N, tiles, coef)
    if dx_ND is not None:
        for tile in tiles:
            dx_ND[tile].mul_(coef_N[tile, None])
    for answer, main in sums:
        if main is not None:
            total.take(answer, coef_N[main.first])


def _tile_rows(bin_: Bin) -> list[int]:
    """Rows of each of the bin's tiles."""
    if bin_.slices:
        return [sum(s.stop - s.start for s in bin_.slices)]
    return [run.last - run.first for runs in bin_.answers for run in runs]


def _take(t: Tensor, tiles: tuple[slice, ...]) -> Tensor:
    return t[tiles[0]] if len(tiles) == 1 else torch.cat([t[tile] for tile in tiles])


def _take_rows(rows: Rows, tiles: tuple[slice, ...]) -> Rows:
    arrays = (rows.rows_N, rows.targets_N, rows.sequence_N, rows.in_response_N, rows.in_nll_N)
    return Rows(*(_take(a, tiles) for a in arrays), pairs=rows.pairs)


def _put(t: Tensor, tiles: tuple[slice, ...], values: Tensor) -> None:
    first = 0
    for tile in tiles:
        t[tile] = values[first : first + tile.stop - tile.start]
        first += tile.stop - tile.start
