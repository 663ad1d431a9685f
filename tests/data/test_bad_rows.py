"""One bad row of a file is named and left out; a share of them that no sound file has ends the run in words."""

import datasets
import pytest
from tiny import CHATML, SEVEN, make_tokenizer
from trainers import make_args, make_trainer

from orpo.data.forms.unusable import BAD, REASONS, FileFault
from orpo.data.prepare import Limits, prepare_dataset
from orpo.data.prepared import summary_of
from orpo.data.streams import DropCounter

GOOD = {"prompt": "hello", "chosen": " hi", "rejected": " no"}
TURN = {"role": "user", "content": "hello"}


def say(text):
    return [{"role": "assistant", "content": text}]


TALK = {"prompt": [TURN], "chosen": say("hi"), "rejected": say("no")}
STRICT = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no role ' + m.role) }}"
    "{% endif %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: "
    "{% endif %}"
)


def as_stream(rows):
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


def prepare(rows, template=None, **options):
    lines = []
    tokenizer = make_tokenizer(chat_template=template)
    return prepare_dataset(rows, tokenizer, Limits(max_length=None), report=lines.append, **options), lines


KINDS = [
    (GOOD, {**GOOD, "rejected": None}, None, "row with null where a text belongs", "'rejected' is null"),
    (GOOD, {**GOOD, "prompt": None}, None, "row with null where a text belongs", "'prompt' is null"),
    (GOOD, {**GOOD, "chosen": 3}, None, "malformed row", "have to be two strings or two lists of messages, not int"),
    (GOOD, TALK, None, "malformed row", "no chat template to render them with"),
    (TALK, {**TALK, "prompt": [{"role": "tool", "content": "x"}]}, STRICT, "row that the chat template ref", "no role"),
    (TALK, {**TALK, "chosen": "hi"}, CHATML, "malformed row", "not str and list"),
    (
        TALK,
        {**TALK, "prompt": [{**TURN, "content": [{"type": "image"}]}]},
        CHATML,
        "malformed row",
        "part of type 'image'",
    ),
    (TALK, {**TALK, "prompt": [{"from": "human", "value": "x"}]}, CHATML, "malformed row", "needs 'role'"),
]


@pytest.mark.parametrize(("good", "bad", "template", "reason", "said"), KINDS)
def test_one_row_in_a_hundred_is_named_and_left_out(good, bad, template, reason, said):
    rows = [good] * 60 + [bad] + [good] * 39
    # A stream, whose rows are no table: of a file see test_mixed_forms.py.
    with pytest.warns(UserWarning, match=rf"(?s)train: {reason}.*{said}.*it holds prompt: .* \(row 60\)"):
        kept = [pair["pair_id"] for pair in prepare(as_stream(rows), template)[0]]
    assert kept == [*range(60), *range(61, 100)]


def test_the_line_says_what_the_row_holds_and_the_card_has_it(tmp_path):
    rows = [GOOD] * 99 + [{**GOOD, "rejected": None}]
    trainer = make_trainer(tmp_path, train_dataset=rows, layout="padded")
    line = (
        "kept 99 of 100: 1 row with null where a text belongs (row 99, 'rejected' is null; it holds prompt: "
        "text, chosen: text, rejected: null)"
    )
    assert summary_of(trainer.train_dataset) == line
    assert summary_of(trainer.train_dataset.select(range(9))) is None
    trainer.create_model_card()
    assert "kept 99 of 100" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("at", [0, 4])
def test_one_row_in_ten_is_too_many_by_default(at, tmp_path):
    rows = [GOOD] * 9
    rows.insert(at, {**GOOD, "chosen": None})
    message = (
        rf"train: 1 of 10 rows cannot be read \(10 %; max_bad_rows allows 1 %\), counted from 0:\n  row {at}: row w"
    )
    with pytest.raises(ValueError, match=message) as caught:
        make_trainer(tmp_path, train_dataset=rows)
    assert str(caught.value).endswith("or leave them out: --max_bad_rows 0.1")
    assert len(make_trainer(tmp_path, train_dataset=rows, max_bad_rows=0.1, layout="padded").train_dataset) == 9


def test_the_first_few_of_many_are_named():
    bad = {**GOOD, "chosen": None}
    with pytest.raises(ValueError, match="5 of 6 rows") as caught:
        prepare([GOOD] + [bad] * 5)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:4]] == ["row 1", "row 2", "row 3"]
    assert lines[4] == "  and 2 more" and lines[5].endswith("--max_bad_rows 0.84")


def test_a_file_of_bad_rows_is_not_read_to_its_end(monkeypatch):
    """What is wrong with every row, such as a chat template that is not there, is known by the first."""
    monkeypatch.setattr(datasets.Dataset, "map", None)
    with pytest.raises(ValueError, match=r"train, the first rows: 256 of 256 .*\n.*no chat template"):
        prepare([TALK] * 400)


def test_ordinary_drops_are_left_out_however_many_they_are():
    assert len(prepare([GOOD, *[{**GOOD, "rejected": ""}] * 9])[0]) == 1
    assert BAD < set(REASONS)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_from_0_to_1(share, tmp_path):
    with pytest.raises(ValueError, match=f"max_bad_rows is {share}; it is a share of rows, from 0 to 1"):
        make_args(tmp_path, max_bad_rows=share)


def test_a_misread_file_is_no_matter_of_rows():
    import datetime

    rows = {name: [*column] for name, column in SEVEN.items()}
    rows["chosen"] = [datetime.date(2024, 1, 1)] * 7
    with pytest.raises(FileFault, match="save the rows as parquet"):
        prepare(rows, max_bad_rows=1)


def test_a_stream_stops_once_enough_of_it_is_read():
    rows = ([GOOD] * 98 + [{**GOOD, "chosen": None}] * 2) * 20
    stream, _ = prepare(as_stream(rows))
    read = 0
    with (
        pytest.raises(
            ValueError, match=r"so far as it was read: 2\d of 1,\d+ rows cannot be read .*allows 1 %"
        ) as caught,
        pytest.warns(UserWarning),
    ):
        for _ in stream:
            read += 1
    assert 970 < read < 1100 and "row 98: row with null" in str(caught.value)
    with pytest.warns(UserWarning):
        assert len(list(prepare(as_stream(rows), max_bad_rows=0.02)[0])) == 98 * 20


def test_few_rows_of_a_stream_say_nothing_of_a_share():
    counter = DropCounter("train", REASONS, max_bad_rows=0.01)
    bad = {"dropped": "malformed row", "detail": "", "written_out": "", "pair_id": 0, "cut": 0}
    for _ in range(999):
        counter(bad)
    with pytest.raises(ValueError, match="1,000 of 1,000 rows"):
        counter(bad)
