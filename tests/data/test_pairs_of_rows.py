"""Rows that are not one pair each: several answers, answers marked one by one, ratings, and several splits."""

import json

import datasets
import pytest
from tiny import CHATML, ROWS, SEVEN, make_model, make_tokenizer
from trainers import logged, make_args, make_trainer

from orpo.cli.arguments import parse
from orpo.data.files.sources import NoSuchSplit, load_pairs
from orpo.data.prepare import Limits, prepare_dataset

USER = [{"role": "user", "content": "hello"}]


def say(text):
    return [{"role": "assistant", "content": text}]


def prepare(rows, template=None, limits=None, **options):
    lines = []
    tokenizer = make_tokenizer(chat_template=template)
    return prepare_dataset(rows, tokenizer, limits or Limits(), report=lines.append, **options), lines


def without_id(pairs):
    return [{name: value for name, value in pair.items() if name != "pair_id"} for pair in pairs]


@pytest.mark.parametrize("container", ["list", "stream"])
def test_several_rejected_answers_make_a_pair_each(container):
    rows = [
        {"prompt": "hello", "chosen": " hi", "rejected": [" no", " go", ""]},
        {"prompt": "how", "chosen": " I", "rejected": [" you"]},
    ]
    single = [("hello", " hi", " no"), ("hello", " hi", " go"), ("how", " I", " you")]
    expected = without_id(prepare([dict(zip(ROWS[0], row, strict=True)) for row in single])[0])
    data = datasets.Dataset.from_list(rows)
    pairs, lines = prepare(data.to_iterable_dataset() if container == "stream" else rows)
    pairs = list(pairs)
    assert without_id(pairs) == expected
    # Each names the row that it was made of.
    assert [pair["pair_id"] for pair in pairs] == [0, 0, 1]
    if container == "list":
        assert lines == ["train: kept 3 of 4 pairs, made of 2 rows: 1 empty answer (row 0)"]


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_pairs_that_share_a_prompt_train_as_in_the_padded_layout(architecture, tmp_path):
    """Whole batches of one row's pairs, and batches of two rows'; a window that is shorter than the prompt."""
    window = {"sliding_window": 4} if architecture == "mistral" else {}
    data = {
        "prompt": ["how are you today hello how are you", "hello"],
        "chosen": [[" fine", " I am fine"], [" hi"]],
        "rejected": [[" no", " go away"], [" no", " go", " leave me alone"]],
    }
    losses = []
    for layout in ("padded", "shared"):
        settings = {"layout": layout, "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
        model = make_model(architecture, **window)
        trainer = make_trainer(tmp_path, model, data, max_steps=4, learning_rate=1e-2, **settings)
        tokens = [trainer.data_collator(trainer.train_dataset.to_list()[i : i + 4])["input_ids"] for i in (0, 4)]
        trainer.train()
        losses.append((logged(trainer, "loss"), sum(batch.numel() for batch in tokens)))
    (padded, most), (shared, fewer) = losses
    assert shared == pytest.approx(padded, rel=2e-5) and fewer < most / 2


@pytest.mark.parametrize("empty", [{"rejected": []}, {"chosen": [], "rejected": [" no"]}])
def test_a_list_without_an_answer_is_an_empty_answer(empty):
    """No fault of the file: such rows are left out however many there are."""
    row = {"prompt": "hello", "chosen": [" hi"], "rejected": [" no"]}
    pairs, lines = prepare([row, {**row, **empty}])
    assert len(pairs) == 1 and "1 empty answer (row 1)" in lines[0]


def test_several_conversations_on_either_side_are_paired_each_with_each():
    row = {"prompt": USER, "chosen": [say("a"), say("b")], "rejected": [say("c"), say("d")]}
    pairs, lines = prepare([row], CHATML)
    single = [{"prompt": USER, "chosen": say(x), "rejected": say(y)} for x in "ab" for y in "cd"]
    assert without_id(pairs) == without_id(prepare(single, CHATML)[0])
    assert lines == ["train: kept 4 of 4 pairs, made of 1 rows"]


def test_a_list_of_messages_is_one_answer_still():
    pairs, lines = prepare([{"prompt": USER, "chosen": say("a"), "rejected": [*say("b"), *say("c")]}], CHATML)
    assert len(pairs) == 1 and lines == ["train: kept 1 of 1"]


KTO = [
    {"prompt": "hello", "completion": " hi", "label": True},
    {"prompt": "hello", "completion": " no", "label": False},
    {"prompt": "how", "completion": " fine", "label": True},
    {"prompt": "hello", "completion": " hey", "label": True},
    {"prompt": "hello", "completion": " go", "label": False},
    {"prompt": "hello", "completion": " away", "label": False},
]
PAIRED = [("hello", " hi", " no"), ("hello", " hey", " go")]
KTO_LINE = "train: 6 answers to 2 prompts make 2 pairs; left out: 1 good and 1 bad answers have no other beside them"


def test_answers_marked_one_by_one_are_paired_by_prompt():
    expected = without_id(prepare([dict(zip(ROWS[0], row, strict=True)) for row in PAIRED])[0])
    pairs, lines = prepare(KTO, pair_answers=True)
    assert without_id(pairs) == expected and lines == [KTO_LINE, "train: kept 2 of 2"]
    renamed = [{"q": r["prompt"], "a": r["completion"], "good": int(r["label"]), "prompt": "other"} for r in KTO]
    names = {"prompt": "q", "completion": "a", "label": "good"}
    assert without_id(prepare(renamed, pair_answers=True, columns=names)[0]) == expected


def test_conversations_marked_one_by_one_are_paired_with_their_other_columns():
    rows = [{"prompt": USER, "completion": say(x), "label": x == "a", "system": "be kind"} for x in "ab"]
    pairs, _ = prepare(rows, CHATML, pair_answers=True)
    single = {"prompt": USER, "chosen": say("a"), "rejected": say("b"), "system": "be kind"}
    assert without_id(pairs) == without_id(prepare([single], CHATML)[0])


@pytest.mark.parametrize("column", ["system", "tools"])
def test_answers_to_one_prompt_under_other_instructions_are_no_pair(column):
    """Of a good answer under one system message and a bad one under another nobody said which is better."""
    said = {"system": ["be kind", "be rude"], "tools": [[{"name": "f"}], [{"name": "g"}]]}[column]
    good, bad = ({"prompt": USER, "completion": say(x), "label": x == "a"} for x in "ab")
    with pytest.raises(ValueError, match="train: 2 answers to 2 prompts make 0 pairs"):
        prepare([{**good, column: said[0]}, {**bad, column: said[1]}], CHATML, pair_answers=True)
    assert len(prepare([{**row, column: said[0]} for row in (good, bad)], CHATML, pair_answers=True)[0]) == 1


@pytest.mark.parametrize("words", [("True", "False"), ("true", "false"), ("1", "0")])
def test_labels_of_a_file_of_text_are_read(tmp_path, own_cache, words):
    lines = [f"{row['prompt']},{row['completion']},{words[not row['label']]}\n" for row in KTO]
    (tmp_path / "kto.csv").write_text("prompt,completion,label\n" + "".join(lines))
    pairs, said = prepare(load_pairs(str(tmp_path / "kto.csv")), pair_answers=True)
    assert without_id(pairs) == without_id(prepare(KTO, pair_answers=True)[0]) and said[0] == KTO_LINE


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(ValueError, match=r"--pair_by_prompt true makes pairs"):
        prepare(KTO)
    with pytest.raises(ValueError, match="no prompt of the train set has both a good and a bad answer: train: 1 answ"):
        prepare(KTO[:1], pair_answers=True)
    with pytest.raises(ValueError, match="pair_by_prompt is set, and the train set is a stream"):
        prepare(datasets.Dataset.from_list(KTO).to_iterable_dataset(), pair_answers=True)
    with pytest.raises(ValueError, match="the train set has no column 'prompt'"):
        prepare([{"completion": "a", "label": True}], pair_answers=True)
    with pytest.raises(ValueError, match=r"row 0: a prompt, .* are wanted; it holds prompt: text, completion: text, l"):
        prepare([{**row, "label": "yes"} for row in KTO], pair_answers=True)
    # Pairs stay pairs.
    assert len(prepare(ROWS, pair_answers=True)[0]) == 7


def test_a_run_pairs_by_prompt(tmp_path, capsys):
    (tmp_path / "kto.jsonl").write_text("".join(json.dumps(row) + "\n" for row in KTO))
    line = ["--dataset_name", str(tmp_path / "kto.jsonl"), "--output_dir", str(tmp_path), "--use_cpu"]
    _, data, args = parse([*line, "--pair_by_prompt", "true"])
    assert args.pair_by_prompt
    trainer = make_trainer(
        tmp_path, train_dataset=data.train_pairs(), pair_by_prompt=True, layout="padded", max_steps=1
    )
    assert KTO_LINE in capsys.readouterr().out
    trainer.train()
    assert trainer.evaluate({name: [row[name] for row in KTO] for name in KTO[0]})["eval_loss"] > 0
    assert trainer.processing_class.init_kwargs["orpo_prompts"] == "plain"


@pytest.mark.parametrize(
    ("names", "ratings", "said"),
    [
        (("chosen-rating", "rejected-rating"), [(5.0, 3.0), (4.0, 4.0), (1.0, 2.0), (2.0, 2.0)], "of 4 rows 2 are "
         "rated equal (first: row 1) and 1 is rated the other way round (first: row 2); data.filter"),
        (("chosen_rating", "rejected_rating"), [(5, 3), (None, 4)], "which training does not read"),
        (("chosen_rating", "rejected_rating"), [(float("nan"), 3.0), (1.0, 2.0)], "of 2 rows 1 is rated the other way"),
        (("score_chosen", "score_rejected"), [(1, 3)], "of 1 rows 1 is rated the other way round (first: row 0)"),
    ],
)  # fmt: skip
def test_ratings_are_compared_and_nothing_is_left_out_for_them(names, ratings, said):
    rows = [{**ROWS[0], **dict(zip(names, pair, strict=True))} for pair in ratings]
    pairs, lines = prepare(rows)
    assert len(pairs) == len(rows)
    assert lines[1].startswith(f"train: {names[0]!r} and {names[1]!r} are ratings") and said in lines[1]
    _, lines = prepare(datasets.Dataset.from_list(rows).to_iterable_dataset())
    assert lines[1] == f"train: {names[0]!r} and {names[1]!r} are ratings, which training does not read"


def test_a_dict_of_splits_is_no_data_set(tmp_path):
    splits = datasets.DatasetDict(train=datasets.Dataset.from_dict(SEVEN), test=datasets.Dataset.from_list(ROWS[:2]))
    message = (
        r"a dict of 2 is given, the splits 'train' \(7 rows\), 'test' \(2 rows\): give one of them, data\['train'\]"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, train_dataset=splits)
    trainer = make_trainer(tmp_path, train_dataset=splits["train"], eval_dataset=splits, layout="padded")
    assert {"eval_train_loss", "eval_test_loss"} <= trainer.evaluate().keys()


def test_a_split_that_is_not_there_is_answered_with_those_that_are(tmp_path, own_cache):
    folder = tmp_path / "data"
    datasets.DatasetDict(
        train_prefs=datasets.Dataset.from_list(ROWS), test_prefs=datasets.Dataset.from_list(ROWS[:1])
    ).save_to_disk(tmp_path / "saved")
    folder.mkdir()
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(
        NoSuchSplit, match=r"has no split 'test'; it has 'train', 'validation': --dataset_train_split s"
    ):
        load_pairs(str(folder), "test")
    with pytest.raises(NoSuchSplit, match=r"has no split 'train'; it has 'train_prefs', 'test_prefs': .*'train_prefs'"):
        load_pairs(str(tmp_path / "saved"))
    assert len(load_pairs(str(tmp_path / "saved"), "train_prefs")) == 7
    assert [row["prompt"] for row in load_pairs(str(tmp_path / "saved"), "train_prefs[:2]")] == SEVEN["prompt"][:2]
    assert len(load_pairs(str(tmp_path / "saved"), "train_prefs[50%:]")) == 3
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert list(load_pairs(str(tmp_path / "one"), streaming=True)) == ROWS
    with pytest.raises(ValueError, match="has no row in 'train"):
        load_pairs(str(tmp_path / "one"), "train[:1%]")


def test_the_settings_have_their_defaults(tmp_path):
    args = make_args(tmp_path)
    assert (args.pair_by_prompt, args.max_bad_rows, args.truncation) == (False, 0.01, "cut")
