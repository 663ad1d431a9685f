"""Which hidden states and targets a batch of pairs scores."""

from functools import partial

import pytest
import torch
from orpo_kernels.rows import rows_from_labels

from orpo.layouts.batch import NLLSpan, PairBatch
from orpo.layouts.layout import PackedLayout, PaddedLayout, SharedLayout, make_layout

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


def test_a_skipped_token_is_skipped_in_the_prompt_too():
    """An earlier turn of a dialogue ends with the end-of-sequence token as well."""
    pair = {**PAIRS[0], "chosen_input_ids": [1, 10, 2, 20, 21, 2]}
    batch = PaddedLayout(pad_token_id=0, nll=NLLSpan(skip_token_id=2))([pair])
    assert scored(batch, batch["orpo"].rows.in_nll_N)[0] == [10, 20, 21]
    assert batch["orpo"].num_nll_tokens == 3


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


def test_the_first_pairs_of_a_batch():
    """Those that fill the last batch of an epoch again are left out, both of their answers."""
    first, alone = (PaddedLayout(pad_token_id=0)(pairs)["orpo"] for pairs in (PAIRS, [PAIRS[0]]))
    first = first.first(1)
    assert (first.num_nll_tokens, first.num_pairs) == (alone.num_nll_tokens, alone.num_pairs) == (5, 1)
    assert torch.equal(first.rows.targets_N, alone.rows.targets_N)
    # Rejected ones are numbered after the chosen ones of both pairs.
    assert first.rows.sequence_N.tolist() == [2 * s for s in alone.rows.sequence_N.tolist()]


def test_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="layout is 'woven'; it has to be one of"):
        make_layout("woven", pad_token_id=0)


def read(batch):
    """What each row of the loss reads: (the tokens its sequence has up to there, the target, sequence, spans)."""
    rows, ids, positions = batch["orpo"].rows, batch["input_ids"].flatten(), batch["position_ids"].flatten()
    flags = rows.sequence_N.tolist(), rows.in_response_N.tolist(), rows.in_nll_N.tolist()
    return list(
        zip(ids[rows.rows_N].tolist(), positions[rows.rows_N].tolist(), rows.targets_N.tolist(), *flags, strict=True)
    )


@pytest.mark.parametrize("nll", [NLLSpan(), NLLSpan(prompt=False), NLLSpan(skip_token_id=2)])
@pytest.mark.parametrize(
    "layout", [PackedLayout, SharedLayout, *(partial(of, single_row=True) for of in (PackedLayout, SharedLayout))]
)
@pytest.mark.parametrize("pairs", ["two prompts", "one prompt"])
def test_every_layout_scores_the_same_tokens_at_the_same_positions(layout, nll, pairs):
    pairs = PAIRS if pairs == "two prompts" else SEVERAL
    padded, other = PaddedLayout(0, nll)(pairs), layout(0, nll)(pairs)
    width = padded["input_ids"].shape[1]
    padded["position_ids"] = torch.arange(width).expand(4, -1)
    assert read(other) == read(padded)
    assert (other["orpo"].num_nll_tokens, other["orpo"].num_pairs) == (
        padded["orpo"].num_nll_tokens,
        padded["orpo"].num_pairs,
    )
    assert torch.equal(other["orpo"].pair_ids, padded["orpo"].pair_ids)


def test_shared_has_the_prompt_once_and_both_answers_behind_it():
    batch = SharedLayout(pad_token_id=0)(PAIRS)
    # The second pair's prompts agree on two tokens, of which the chosen side counts only one as its prompt.
    assert batch["input_ids"].tolist() == [
        [1, 12, 2, 12, 13, 31, 32, 33, 2],
        [1, 10, 11, 20, 21, 2, 30, 2, 0],
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 3, 4, 0]]
    assert batch["attention_mask"].branch_BT.tolist() == [[3, 4, 4, 5, 5, 5, 5, 5, 5], [0, 0, 0, 1, 1, 1, 2, 2, 6]]
    assert batch["attention_mask"].longest == 7 and batch["attention_mask"].to("meta").sum() == 17


def test_short_pairs_fill_a_row_together():
    short = {**PAIRS[0], "chosen_input_ids": [1, 10, 5], "rejected_input_ids": [1, 10, 6], "rejected_prompt_length": 2}
    short["chosen_prompt_length"] = 2
    other = {**short, "chosen_input_ids": [1, 12, 5], "rejected_input_ids": [1, 12, 6]}
    batch = SharedLayout(pad_token_id=0)([short, PAIRS[0], other])
    assert batch["input_ids"].tolist() == [[1, 10, 11, 20, 21, 2, 30, 2], [1, 10, 5, 6, 1, 12, 5, 6]]
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 2, 0, 1, 2, 2]


def pairs_of_one_prompt(prompt, chosen, *rejected):
    """A pair of `chosen` with each of `rejected`."""
    lengths = dict.fromkeys(("chosen_prompt_length", "rejected_prompt_length"), len(prompt))
    return [{"chosen_input_ids": prompt + chosen, "rejected_input_ids": prompt + r, **lengths} for r in rejected]


SEVERAL = pairs_of_one_prompt([1, 10, 11, 12, 13, 14], [20, 2], [30, 2], [31, 2])


def test_pairs_of_one_prompt_have_it_once_and_an_answer_of_several_pairs_too():
    batch = SharedLayout(pad_token_id=0)(SEVERAL)
    assert batch["input_ids"].tolist() == [[1, 10, 11, 12, 13, 14, 20, 2, 30, 2, 31, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 6, 7]]
    assert batch["attention_mask"].branch_BT.tolist() == [[0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3]]
    rows = batch["orpo"].rows
    answers = {s: rows.rows_N[rows.in_response_N & (rows.sequence_N == s)].tolist() for s in range(4)}
    assert answers == {0: [5, 6], 1: [5, 6], 2: [5, 8], 3: [5, 10]}


def test_a_group_stays_within_two_sequences():
    """What the probe tries. The third pair would make 12 tokens of 10, and begins a group of its own."""
    batch = SharedLayout(pad_token_id=0)(pairs_of_one_prompt([1, 10, 11], [20, 2], [30, 2], [31, 2], [32, 2]))
    assert batch["input_ids"].tolist() == [[1, 10, 11, 20, 2, 30, 2, 31, 2], [1, 10, 11, 20, 2, 32, 2, 0, 0]]


def test_pairs_of_one_prompt_stay_apart_where_a_wide_row_would_cost_more():
    """Together they would be 8 tokens wide, beside four pairs of which each is 6 wide and none shares a row."""
    others = [pair for n in (40, 50, 60, 70) for pair in pairs_of_one_prompt([1, n], [20, 2], [30, 2])]
    together = pairs_of_one_prompt([1, 10], [20, 2], [30, 2], [31, 2])
    batch = SharedLayout(pad_token_id=0)([*together, *others])
    assert batch["input_ids"].shape == (6, 6) and batch["attention_mask"].sum() == 36


def test_prompts_that_differ_share_what_comes_before():
    """The second tokens differ; the third, equal again, comes after different ones and cannot be shared."""
    pair = {**PAIRS[0], "rejected_input_ids": [1, 13, 11, 30, 2]}
    batch = SharedLayout(pad_token_id=0)([pair])
    assert batch["input_ids"].tolist() == [[1, 10, 11, 20, 21, 2, 13, 11, 30, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 1, 2, 3, 4]]
    assert batch["attention_mask"].branch_BT.tolist() == [[0, 1, 1, 1, 1, 1, 2, 2, 2, 2]]
    assert batch["orpo"].rows.rows_N.tolist() == [0, 1, 2, 3, 4, 7, 8]
    assert batch["orpo"].rows.targets_N.tolist() == [10, 11, 20, 21, 2, 30, 2]


def test_packed_restarts_positions_and_has_no_mask():
    batch = PackedLayout(pad_token_id=0)(PAIRS)
    assert set(batch) == {"input_ids", "position_ids", "orpo"}
    assert batch["input_ids"].tolist() == [
        [1, 12, 13, 31, 32, 33, 2],
        [1, 10, 11, 20, 21, 2, 0],
        [1, 10, 11, 30, 2, 0, 0],
        [1, 12, 2, 0, 0, 0, 0],
    ]
    assert batch["position_ids"][3].tolist() == [0, 1, 2, 0, 1, 2, 3]
    single = PackedLayout(pad_token_id=0, single_row=True)(PAIRS)
    assert single["input_ids"].shape == (1, 21)
    assert (single["position_ids"] == 0).sum() == 4
