"""orpo.layout: which hidden states and targets a batch of pairs scores."""

import pytest
import torch
from orpo_kernels.rows import rows_from_labels

from orpo.layout import NLLSpan, PaddedLayout, PairBatch, make_layout

PAIRS = [
    {
        "chosen_input_ids": [1, 10, 11, 20, 21, 2],
        "rejected_input_ids": [1, 10, 11, 30, 2],
        "chosen_prompt_length": 3,
        "rejected_prompt_length": 3,
        "pair_id": 7,
    },
    {
        # The answers' first tokens merge with the prompt's last, in one of them only.
        "chosen_input_ids": [1, 12, 2],
        "rejected_input_ids": [1, 12, 13, 31, 32, 33, 2],
        "chosen_prompt_length": 1,
        "rejected_prompt_length": 3,
    },
]


def scored(batch, mask):
    """Sequence -> the targets under `mask`, and a check that each comes from the position before it."""
    rows, ids = batch["orpo"].rows, batch["input_ids"].flatten()
    assert torch.equal(ids[rows.rows_N + 1], rows.targets_N)
    return {s: rows.targets_N[mask & (rows.sequence_N == s)].tolist() for s in range(2 * rows.pairs)}


def test_padded_puts_the_chosen_half_first_and_pads_on_the_right():
    batch = PaddedLayout(pad_token_id=0)(PAIRS)
    assert batch["input_ids"].tolist() == [
        [1, 10, 11, 20, 21, 2, 0],
        [1, 12, 2, 0, 0, 0, 0],
        [1, 10, 11, 30, 2, 0, 0],
        [1, 12, 13, 31, 32, 33, 2],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [6, 3, 5, 7]


def test_each_term_scores_its_tokens():
    batch = PaddedLayout(pad_token_id=0)(PAIRS)
    rows = batch["orpo"].rows
    assert scored(batch, rows.in_response_N) == {0: [20, 21, 2], 1: [12, 2], 2: [30, 2], 3: [31, 32, 33, 2]}
    assert scored(batch, rows.in_nll_N) == {0: [10, 11, 20, 21, 2], 1: [12, 2], 2: [], 3: []}
    assert (rows.in_response_N | rows.in_nll_N).all()
    assert rows.sequence_N.diff().min() >= 0
    assert (batch["orpo"].num_nll_tokens, batch["orpo"].num_pairs) == (7, 2)
    assert batch["orpo"].pair_ids.tolist() == [7, -1]


@pytest.mark.parametrize(
    ("nll", "expected"),
    [
        (NLLSpan(prompt=False), {0: [20, 21, 2], 1: [12, 2]}),
        (NLLSpan(skip_token_id=2), {0: [10, 11, 20, 21], 1: [12]}),
        (NLLSpan(prompt=False, skip_token_id=2), {0: [20, 21], 1: [12]}),
    ],
    ids=["response only", "without EOS", "both"],
)
def test_nll_span(nll, expected):
    batch = PaddedLayout(pad_token_id=0, nll=nll)(PAIRS)
    rows = batch["orpo"].rows
    assert scored(batch, rows.in_nll_N) == {**expected, 2: [], 3: []}
    assert batch["orpo"].num_nll_tokens == sum(map(len, expected.values()))
    # The odds ratio keeps the EOS whatever the NLL does.
    assert scored(batch, rows.in_response_N)[0] == [20, 21, 2]


def test_rows_equal_those_made_from_labels():
    """The same five arrays as orpo_loss makes from TRL's padded labels."""
    batch = PaddedLayout(pad_token_id=0)(PAIRS)
    nll_labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels = nll_labels.clone()
    for row, pair in enumerate([*PAIRS, *PAIRS]):
        labels[row, : pair["chosen_prompt_length" if row < 2 else "rejected_prompt_length"]] = -100
    expected, rows = rows_from_labels(labels, nll_labels, -100, True), batch["orpo"].rows
    kept = expected.in_response_N | expected.in_nll_N
    for name in ("rows_N", "targets_N", "sequence_N", "in_response_N", "in_nll_N"):
        assert torch.equal(getattr(rows, name), getattr(expected, name)[kept]), name


def test_answer_without_a_predecessor_is_not_counted_as_scored():
    lonely = {**PAIRS[0], "chosen_input_ids": [20], "chosen_prompt_length": 0}
    batch = PaddedLayout(pad_token_id=0)([lonely, PAIRS[1]])["orpo"]
    assert batch.num_pairs == 1
    assert (batch.rows.sequence_N != 0).all()


def test_width_rounds_up():
    assert PaddedLayout(pad_token_id=0, pad_to_multiple_of=8)(PAIRS)["input_ids"].shape == (4, 8)


def test_batch_moves_with_its_counts():
    batch = PaddedLayout(pad_token_id=0)(PAIRS)["orpo"]
    moved = batch.to("meta")
    assert isinstance(moved, PairBatch) and moved.rows.rows_N.is_meta
    assert moved.pair_ids.tolist() == [7, -1] and moved.num_nll_tokens == 7


def test_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layout is 'woven'; it has to be one of"):
        make_layout("woven", pad_token_id=0)
