"""Which rows stand in one tile: bins of whole pairs, and the runs of a pair too large for one."""

import math

import pytest
import torch
from orpo_kernels.bins import make_bins
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
        slices = bin_.slices or tuple(slice(run.first, run.last) for runs in bin_.answers for run in runs)
        held = [s.stop - s.start for s in slices]
        of_pairs = {int(s) % pairs for part in slices for s in problem.rows.sequence_N[part]}
        assert sum(held) == sum(sizes[i] for i in of_pairs)
        assert sum(held) <= capacity if bin_.slices else max(held) <= min(capacity, wanted)
        assert bin_.slices or len(of_pairs) == 1
        if bin_.slices and len(of_pairs) > 1:
            assert sum(held) <= wanted + max(sizes[i] for i in of_pairs) / 2
        firsts.append(min(of_pairs, default=-1))
        for part in slices:
            seen[part] += 1
    assert seen.eq(1).all() and firsts == sorted(firsts)
    # A single bin takes its rows as they lie, without a copy.
    assert len(bins) > 1 or not bins[0].slices or bins[0].slices == (slice(0, len(seen)),)
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
    assert [sum(part.stop - part.start for part in bin_.slices) for bin_ in bins] == expected


@pytest.mark.parametrize(
    "wanted, expected",
    [
        (1024, [[601, 601], [600, 600]]),
        (400, [[301, 301, 301, 299], [400, 400, 400]]),
        (math.inf, [[601, 601], [600, 600]]),
    ],
)
def test_an_oversized_pair_is_cut_into_even_runs(wanted, expected):
    # Answers of 1,202 and 1,200 tokens: with one run of the most rows, the other would be short.
    problem = make_problem(1, 1203, 4, 11, prompt_in_nll=False)
    (bin_,) = make_bins(problem.rows, 1100, wanted)
    assert [[run.last - run.first for run in answer] for answer in bin_.answers] == expected
