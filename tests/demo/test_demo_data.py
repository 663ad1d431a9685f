"""orpo/demo: the generated pairs, the tokenizer and the model."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import orpo.demo
from orpo.demo.data import FRAMES, MANNERS, make_pairs, make_questions
from orpo.demo.model import VOCAB_SIZE, build_model, train_tokenizer


def test_the_same_seed_makes_the_same_pairs_in_every_process():
    code = "import json; from orpo.demo.data import make_pairs; print(json.dumps(make_pairs()))"
    # String hashing differs from process to process; an order taken from a set would show here.
    texts = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(texts) == 1
    assert json.loads(texts.pop()) == [*make_pairs()]
    assert make_pairs(seed=1) != make_pairs(seed=2)


def test_middle_answers_are_chosen_and_rejected_equally_often():
    train, heldout = make_pairs()
    for rows in (train, heldout):
        chosen = Counter((row["prompt"], row["chosen"]) for row in rows)
        rejected = Counter((row["prompt"], row["rejected"]) for row in rows)
        assert set(chosen.values()) == set(rejected.values()) == {1}
        both = chosen.keys() & rejected.keys()
        questions = len({row["prompt"] for row in rows})
        assert len(both) == questions * (len(MANNERS) - 2)
        # All but the two ends of each ladder.
        assert len(chosen.keys() | rejected.keys()) == questions * len(MANNERS)


def test_every_pair_is_one_step_of_the_ladder():
    answers = {q["prompt"]: q["answers"] for q in make_questions()}
    train, heldout = make_pairs()
    for row in train + heldout:
        sides = [answers[row["prompt"]].index(row[side]) for side in ("chosen", "rejected")]
        assert sorted(sides) == [row["level"] - 1, row["level"]]
        assert row["fact"] in row["chosen"] and row["fact"] in row["rejected"]
        for side, manner in zip((row["chosen"], row["rejected"]), sides, strict=True):
            openings, closings = FRAMES[MANNERS[manner]]
            assert side.strip().startswith(openings) and side.endswith(closings)


def test_a_tenth_of_the_training_questions_is_reversed_and_no_held_out_one():
    answers = {q["prompt"]: q["answers"] for q in make_questions()}

    def reversed_questions(rows):
        return {r["prompt"] for r in rows if answers[r["prompt"]].index(r["chosen"]) < r["level"]}

    train, heldout = make_pairs()
    questions = len({row["prompt"] for row in train})
    assert len(reversed_questions(train)) == round(0.1 * questions)
    assert len([r for r in train if r["prompt"] in reversed_questions(train)]) == 5 * round(0.1 * questions)
    assert not reversed_questions(heldout)


def test_held_out_prompts_do_not_occur_in_training_and_their_facts_do():
    train, heldout = make_pairs()
    assert len(heldout) >= 200
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}
    assert {row["fact"] for row in heldout} <= {row["fact"] for row in train}


def test_no_phrase_belongs_to_two_manners():
    phrases = Counter(phrase for frames in FRAMES.values() for half in frames for phrase in half)
    assert tuple(FRAMES) == MANNERS
    assert set(phrases.values()) == {1}


def test_manners_are_about_equally_long():
    """What is compared is a mean over tokens: a manner twice as long would be likelier for that alone."""
    train, _ = make_pairs()
    tokenizer = train_tokenizer(sorted({row[side] for row in train for side in ("chosen", "rejected")}))
    lengths = {}
    for question in make_questions():
        for manner, ids in zip(MANNERS, tokenizer(question["answers"])["input_ids"], strict=True):
            lengths.setdefault(manner, []).append(len(ids))
    means = [sum(v) / len(v) for v in lengths.values()]
    assert max(means) / min(means) < 1.5


@pytest.mark.parametrize("held_out", [0, 10, 11])
def test_held_out_must_leave_questions_for_training(held_out):
    with pytest.raises(ValueError, match=f"held_out must be between 1 and 9 for 10 questions, got {held_out}"):
        make_pairs(held_out=held_out, questions=10)


def test_the_generator_writes_json_lines(tmp_path):
    command = [sys.executable, "-m", "orpo.demo.data", "--output", str(tmp_path / "pairs")]
    subprocess.run(command, check=True, capture_output=True)
    train, heldout = make_pairs()
    for name, rows in (("train", train), ("heldout", heldout)):
        lines = (tmp_path / "pairs" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == rows


def test_the_licence_of_the_pairs_is_beside_their_generator():
    text = (Path(orpo.demo.__file__).parent / "LICENSE").read_text()
    assert "SPDX-License-Identifier: CC0-1.0" in text and "Statement of Purpose" in text


def test_the_tokenizer_gives_back_what_it_was_given():
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in make_pairs()[0]])
    assert 300 < len(tokenizer) <= VOCAB_SIZE
    text = "Customer: Où est la 猫?\nDesk: It is here."
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_the_model_has_about_a_million_parameters_and_follows_the_seed():
    tokenizer = train_tokenizer([row["prompt"] + row["chosen"] for row in make_pairs()[0]])
    models = [build_model(tokenizer, seed) for seed in (0, 0, 1)]
    assert 0.8e6 < models[0].num_parameters() < 1.2e6
    weights = [m.model.embed_tokens.weight for m in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
