"""Rows made of labels on their device, beside those that torch makes, and the checks of rows that a caller made."""

import pytest
import torch
from orpo_kernels.rows import Rows, rows_from_labels
from problems import make_problem

from orpo import orpo_loss, orpo_loss_from_rows

pytestmark = pytest.mark.kernels


def labels_of(pairs: int, positions: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and labels of the NLL, of which a third each counts nowhere, and half of the rest agree."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 50, (2 * pairs, positions), generator=g)
    nll_labels = torch.where(torch.rand(labels.shape, generator=g) < 0.5, labels, labels + 1)
    for t in (labels, nll_labels):
        t[torch.rand(t.shape, generator=g) < 0.3] = -100
    return labels, nll_labels


def assert_same(labels, nll_labels, ignore_index, shift, device):
    expected = rows_from_labels(labels, nll_labels, ignore_index, shift)
    moved = labels.to(device), None if nll_labels is None else nll_labels.to(device)
    found = rows_from_labels(*moved, ignore_index, shift, backend="triton")
    for a, b in zip(found.arrays, expected.arrays, strict=True):
        assert a.dtype == b.dtype and torch.equal(a.cpu(), b)
    assert (found.pairs, found.all_count) == (expected.pairs, expected.all_count)
    targets = expected.targets_N
    # What is below -1 is told as -1.
    bounds = (max(int(targets.min()), -1), int(targets.max())) if len(targets) else (0, 0)
    assert found.bounds == bounds


@pytest.mark.parametrize("shift", [True, False], ids=["shifted", "not shifted"])
@pytest.mark.parametrize("nll", ["none", "chosen", "all"])
# One block of positions, a few of a second one, none at all.
@pytest.mark.parametrize("positions", [7, 1030, 1, 0])
def test_the_same_rows_as_torch(positions, nll, shift, kernel_device):
    labels, nll_labels = labels_of(3, positions)
    nll_labels = {"none": None, "chosen": nll_labels[:3], "all": nll_labels}[nll]
    assert_same(labels, nll_labels, -100, shift, kernel_device)


def test_any_dtype_stride_and_ignored_label(kernel_device):
    labels, nll_labels = labels_of(2, 9)
    assert_same(labels.int(), nll_labels, -100, True, kernel_device)
    assert_same(labels.T.contiguous().T, nll_labels[:, ::2].repeat_interleave(2, 1)[:, :9], -100, True, kernel_device)
    assert_same(labels, nll_labels.int(), 3, True, kernel_device)


def test_where_nothing_counts_there_are_no_rows(kernel_device):
    labels = torch.full((4, 9), -100)
    assert_same(labels, None, -100, True, kernel_device)
    assert_same(labels, labels, -100, True, kernel_device)


@pytest.mark.parametrize("token", [2**31, 2**40 + 5, -(2**33) + 5])
def test_a_token_beyond_int32_is_outside_too(token, kernel_device):
    problem = make_problem(device=kernel_device)
    problem.labels[0, 9] = token
    with pytest.raises(ValueError, match=f"labels holds the token {token}, but lm_head_weight has 203 rows"):
        orpo_loss(problem.hidden, problem.weight, problem.labels, backend="triton")


def test_a_token_outside_the_vocabulary_is_named(kernel_device):
    """On a GPU too: the host waits for the number of rows, and gets the largest token with it."""
    for of_nll, name in ((False, "labels"), (True, "nll_labels")):
        problem = make_problem(device=kernel_device)
        # The first position of a chosen sequence is prompt: its own label counts nowhere.
        (problem.nll_labels if of_nll else problem.labels)[0, 1 if of_nll else 9] = 1000
        problem.labels[0, 1] = -100
        keywords = problem.keywords | dict(backend="triton")
        with pytest.raises(ValueError, match=f"^{name} holds the token 1000, but lm_head_weight has 203 rows"):
            orpo_loss(problem.hidden, problem.weight, problem.labels, **keywords)


@pytest.mark.kernels(modes=("interpret", "simt"))
@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("targets_N", 5, 203, "rows.targets_N holds the token 203"),
        ("targets_N", 5, -1, "rows.targets_N holds the token -1"),
        ("rows_N", -1, 6 * 17, r"rows.rows_N has to be in \[0, 102\)"),
        ("rows_N", 0, -1, r"rows.rows_N has to be in \[0, 102\)"),
        ("sequence_N", -1, 6, "rows.sequence_N has to be sorted, from 0 to at most 5"),
        ("sequence_N", 5, 5, "rows.sequence_N has to be sorted"),
        ("sequence_N", 0, -1, "rows.sequence_N has to be sorted"),
    ],
)
def test_rows_that_cannot_be_read_are_refused(name, at, value, message, kernel_device):
    """A GPU stops with the same words, without the token, by an assertion on the device."""
    problem = make_problem(device=kernel_device)
    rows = problem.rows
    good = Rows(*rows.arrays, pairs=rows.pairs)
    orpo_loss_from_rows(problem.hidden, problem.weight, good, backend="triton")
    getattr(rows, name)[at] = value
    with pytest.raises(ValueError, match=message):
        orpo_loss_from_rows(problem.hidden, problem.weight, good, backend="triton")
