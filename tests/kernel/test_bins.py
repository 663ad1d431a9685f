"""Which rows stand in one tile: bins of whole pairs."""

import math

import pytest
import torch
from orpo_kernels.cpu.bins import make_bins
from orpo_kernels.rows import Rows
from problems import make_problem


@pytest.mark.parametrize("pairs", [1, 2, 7, 30, 400])
@pytest.mark.parametrize("capacity", [40, 150, 1000, 10**6])
@pytest.mark.parametrize("wanted", [60, 300, math.inf])
def test_bins_hold_whole_pairs_in_order(pairs, capacity, wanted):
    problem = make_problem(pairs, 40, 4, 11)
    counts = torch.bincount(problem.rows.sequence_N, minlength=2 * pairs)
    sizes = (counts[:pairs] + counts[pairs:]).tolist()
    seen, bins = torch.zeros(problem.rows.rows_N.numel(), dtype=torch.int64), make_bins(problem.rows, capacity, wanted)
    firsts = []
    for bin_ in bins:
        held = sum(part.stop - part.start for part in bin_)
        of_pairs = {int(s) % pairs for part in bin_ for s in problem.rows.sequence_N[part]}
        assert held == sum(sizes[i] for i in of_pairs)
        if len(of_pairs) > 1:
            assert held <= min(capacity, wanted + max(sizes[i] for i in of_pairs) / 2)
        firsts.append(min(of_pairs, default=-1))
        for part in bin_:
            seen[part] += 1
    assert seen.eq(1).all() and firsts == sorted(firsts)
    # A single bin takes its rows as they lie, without a copy.
    assert len(bins) > 1 or bins[0] == (slice(0, len(seen)),)
    if capacity > 2 * wanted and max(sizes) <= wanted / 2:
        assert len(bins) <= 1.1 * sum(sizes) / wanted + 1


@pytest.mark.parametrize(
    "pairs, size, wanted, expected",
    [
        (4, 319, 1024, [638, 638]),  # filled up to 1,024, the second bin would hold one pair
        (7, 340, 1024, [680, 1020, 680]),  # an average taken once would leave a fourth bin
        (2, 1500, 1024, [1500, 1500]),
        (4, 319, math.inf, [1276]),
        (2, 0, 1024, [0]),
    ],
)
def test_bins_are_few_and_even(pairs, size, wanted, expected):
    counts = torch.tensor([size // 2] * pairs + [size - size // 2] * pairs)
    sequence_N = torch.arange(2 * pairs).repeat_interleave(counts)
    masks = torch.ones_like(sequence_N, dtype=torch.bool)
    rows = Rows(sequence_N, sequence_N, sequence_N, masks, masks, pairs)
    bins = make_bins(rows, 2000, wanted)
    assert [sum(part.stop - part.start for part in bin_) for bin_ in bins] == expected
