"""Held-out pairs that are trained on are counted."""

import datasets
from tiny import ROWS, make_tokenizer
from trainers import make_trainer

from orpo.data.overlap import report_overlap
from orpo.data.prepare import Limits, prepare_dataset


def prepared(rows):
    return prepare_dataset(rows, make_tokenizer(), Limits(), report=lambda _: None)


def overlap(train, held_out):
    lines = []
    report_overlap(train, held_out, lines.append)
    return lines


def test_pairs_of_both_sets_are_counted():
    train = prepared([*ROWS[:4], {"prompt": "a", "chosen": "", "rejected": "b"}])
    # The same prompt and chosen answer with another rejected one is another pair, and so is the pair turned round.
    turned = {"prompt": ROWS[0]["prompt"], "chosen": ROWS[0]["rejected"], "rejected": ROWS[0]["chosen"]}
    held_out = prepared([{**ROWS[0], "rejected": "no"}, turned, ROWS[5], ROWS[3], ROWS[0]])
    said = "2 of 5 held-out pairs are in the train set too: figures on them say nothing of new pairs"
    assert overlap(train, held_out) == [f"eval: {said}"]
    assert overlap(train, {"a": held_out, "b": prepared(ROWS[4:])}) == [f"eval (a): {said}"]
    shuffled = train.shuffle(seed=0).select([2, 0])
    assert overlap(shuffled, shuffled)[0].startswith("eval: 2 of 2 ")


def test_tokens_moved_over_the_boundary_of_the_sequences_are_another_pair():
    columns = ("chosen_input_ids", "rejected_input_ids")
    one, other = (
        datasets.Dataset.from_dict(dict(zip(columns, ([a], [b]), strict=True)))
        for a, b in (([1, 2], [3]), ([1], [2, 3]))
    )
    assert overlap(one, one) and not overlap(one, other)


def test_of_a_stream_nothing_is_said():
    stream = prepared(datasets.Dataset.from_list(ROWS).to_iterable_dataset())
    assert not overlap(stream, prepared(ROWS)) and not overlap(prepared(ROWS), stream)
    assert not overlap(prepared(ROWS), None)


def test_the_trainer_says_so_in_one_line(tmp_path, capsys):
    make_trainer(tmp_path, eval_dataset=ROWS[2:3])
    assert capsys.readouterr().out.count("eval: 1 of 1 held-out pairs are in the train set too") == 1


def test_tokens_in_lists_of_one_length():
    columns = {name: [[1, 2, 3]] * 2 for name in ("chosen_input_ids", "rejected_input_ids")}
    features = datasets.Features({name: datasets.List(datasets.Value("int64"), length=3) for name in columns})
    said = []
    report_overlap(*(datasets.Dataset.from_dict(columns, features=features) for _ in range(2)), report=said.append)
    assert said and "2 of 2 held-out pairs" in said[0]
