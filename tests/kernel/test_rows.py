"""From labels to rows: what counts, what it predicts, and in which order."""

import torch
from orpo_kernels.rows import Rows, rows_from_labels, without_others

LABELS = torch.tensor([[-100, -100, 5, 6], [-100, 7, 8, -100], [-100, -100, 5, 9], [-100, 4, -100, -100]])


def kept(rows):
    assert rows.all_count and (rows.in_response_N | rows.in_nll_N).all()
    return [tuple(map(int, row)) for row in zip(*rows.arrays, strict=True)]


def test_shifted_labels_score_the_chosen_response():
    # (row, token, sequence, in response, in NLL); position t predicts label t + 1.
    assert kept(rows_from_labels(LABELS, None, -100, shift=True)) == [
        (1, 5, 0, 1, 1),
        (2, 6, 0, 1, 1),
        (4, 7, 1, 1, 1),
        (5, 8, 1, 1, 1),
        (9, 5, 2, 1, 0),
        (10, 9, 2, 1, 0),
        (12, 4, 3, 1, 0),
    ]


def test_unshifted_labels_score_their_own_position():
    rows = kept(rows_from_labels(LABELS[:, 1:], None, -100, shift=False))
    assert [r[1] for r in rows] == [5, 6, 7, 8, 5, 9, 4] and rows[0][0] == 1


def test_nll_labels_add_the_prompt_and_ignore_the_rejected_half():
    nll = LABELS.clone()
    nll[0, 1] = 3
    nll[2, 1] = 3
    for nll_labels in (nll, nll[:2]):
        rows = kept(rows_from_labels(LABELS, nll_labels, -100, shift=True))
        assert (0, 3, 0, 0, 1) in rows and len(rows) == 8


def test_a_position_with_two_tokens_gets_two_rows():
    nll = LABELS.clone()
    nll[0, 2] = 1
    rows = kept(rows_from_labels(LABELS, nll, -100, shift=True))
    assert (1, 5, 0, 1, 0) in rows and (1, 1, 0, 0, 1) in rows


def test_rows_are_sorted_by_sequence():
    nll = torch.randint(0, 9, LABELS.shape, generator=torch.Generator().manual_seed(0))
    sequence = rows_from_labels(LABELS, nll, -100, shift=True).sequence_N
    assert (sequence[1:] >= sequence[:-1]).all()


def test_where_nothing_can_be_counted_every_position_is_a_row():
    rows = rows_from_labels(LABELS.to("meta"), None, -100, shift=True)
    assert not rows.all_count and rows.rows_N.shape == (16,)


def test_hidden_states_that_no_row_reads_are_zeroed():
    """Padding may hold NaN, which a coefficient of 0 would let through to the gradients."""
    hidden = torch.tensor([[1.0], [torch.nan], [2.0], [torch.inf]])
    arrays = (torch.tensor([0, 1, 2, 2, 3]), *torch.zeros(2, 5, dtype=torch.int64))
    response, nll = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 1, 0]]).bool()
    rows = Rows(*arrays, response, nll, pairs=1, all_count=False)
    assert without_others(hidden, rows).tolist() == [[1], [0], [2], [0]]
