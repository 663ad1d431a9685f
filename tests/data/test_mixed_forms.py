"""Rows that do not agree on what a column holds: each is read as it stands."""

import gzip
import json

import datasets
import pytest
from tiny import make_tokenizer

from orpo.data.files.mixed_forms import mixed_columns
from orpo.data.files.sources import as_dataset, load_pairs
from orpo.data.prepare import Limits, prepare_dataset

pytestmark = pytest.mark.usefixtures("own_cache")

# Texts that are JSON too, which a reader of mixed columns takes for what they would mean.
TEXTS = [" 4", "007", "true", '"quoted"', "[1, 2]", "null", "plain"]
ROWS = [{"prompt": "2 + 2?", "chosen": text, "rejected": " no"} for text in TEXTS]
TALK = {side: [{"role": "assistant", "content": "4"}] for side in ("prompt", "chosen", "rejected")}
ODD = [TALK, {**ROWS[0], "chosen": 3}, {**ROWS[0], "chosen": ["a", "b"]}, {**ROWS[0], "chosen": True}]


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize("odd", ODD, ids=["a conversation", "a number", "a list", "true"])
@pytest.mark.parametrize("kind", ["pairs.jsonl", "pairs.json", "pairs.jsonl.gz", "folder", "list", "dict", "stream"])
def test_every_row_is_read_as_it_stands(kind, odd, tmp_path):
    rows = [*ROWS, odd, *ROWS]
    if kind == "list":
        data = as_dataset(rows)
    elif kind == "dict":
        data = as_dataset({name: [row[name] for row in rows] for name in ROWS[0]})
    elif kind == "folder":
        (tmp_path / "folder").mkdir()
        write(tmp_path / "folder" / "train.jsonl", rows)
        write(tmp_path / "folder" / "test.jsonl", ROWS)
        assert list(load_pairs(str(tmp_path / "folder"), "test")) == ROWS
        data = load_pairs(str(tmp_path / "folder"))
    elif kind == "stream":
        data = load_pairs(write(tmp_path / "pairs.jsonl", rows), streaming=True)
    else:
        data = load_pairs(write(tmp_path / kind, rows))
    assert list(data) == rows


def test_a_part_of_a_mixed_file_is_read(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [*ROWS, TALK])
    assert list(load_pairs(path, "train[5:]")) == [*ROWS[5:], TALK]


@pytest.mark.parametrize("beside", ["one list", "a README.md"])
def test_no_file_of_a_folder_is_lost_to_a_copy(beside, tmp_path):
    odd = {**ROWS[0], "chosen": "other", "rejected": ["a", "b"]}
    write(tmp_path / "first.jsonl", [ROWS[0], odd])
    if beside == "one list":
        (tmp_path / "second.json").write_text(json.dumps([ROWS[0], odd, odd]))
        rows = 5
    else:
        write(tmp_path / "second.jsonl", [ROWS[0], odd])
        (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: second.jsonl\n---\n")
        rows = 2
    assert len(load_pairs(str(tmp_path))) == rows


def test_texts_beside_an_odd_row_late_in_a_file_get_no_quotes(tmp_path):
    """The reader takes 10 MB at a time, and has decided for text by the first."""
    rows = [{**ROWS[0], "chosen": f"answer {i} {'x' * 1000}"} for i in range(11_000)]
    path = write(tmp_path / "pairs.jsonl", [*rows, {**ROWS[0], "chosen": 3}])
    assert load_pairs(path)[10_999]["chosen"] == rows[-1]["chosen"]
    *_, before, last = load_pairs(path, streaming=True)
    assert (before, last["chosen"]) == (rows[-1], 3)


def test_one_row_of_another_form_is_named_and_left_out(tmp_path):
    lines = []
    data = load_pairs(write(tmp_path / "pairs.jsonl", [*ROWS, TALK]))
    prepared = prepare_dataset(data, make_tokenizer(), Limits(), max_bad_rows=0.2, report=lines.append)
    assert prepared["pair_id"] == [0, 1, 2, 3, 4, 5, 6]
    ids = prepared[0]["chosen_input_ids"]
    assert make_tokenizer().decode(ids) == "<s>2 + 2? 4</s>"
    assert lines[0].startswith("train: kept 7 of 8: 1 malformed row (row 7, the data set holds conversations, and the ")
    assert lines[0].endswith("; it holds prompt: messages, chosen: messages, rejected: messages)")


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([{"a": 1, "b": "x"}, {"a": 1.5, "b": None}, {"c": []}], []),
        ([{"a": [{"b": 1}]}, {"a": [{"b": "1"}]}], ["a"]),
        ([{"a": [{"b": 1}, {"b": {"c": 1}}]}], ["a"]),
        ([{"a": True, "b": []}, {"a": 1, "b": {}}], ["a", "b"]),
    ],
)
def test_kinds_are_told_apart_at_any_depth(rows, names, tmp_path):
    write(tmp_path / "rows.jsonl", rows)
    assert mixed_columns([tmp_path / "rows.jsonl"]) == names


def test_a_stream_may_lack_a_column_in_its_first_row(tmp_path):
    rows = [{"prompt": "a", "chosen": "b"}, *[{"prompt": "a", "chosen": " b", "rejected": " c"}] * 9]
    stream = load_pairs(write(tmp_path / "pairs.jsonl", rows), streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    prepared = prepare_dataset(stream, make_tokenizer(), Limits(), report=lambda _: None)
    with pytest.warns(UserWarning, match="'rejected' is null"):
        assert [pair["pair_id"] for pair in prepared] == [*range(1, 10)]


def test_a_broken_line_of_a_stream_is_named(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{\n")
    with pytest.raises(ValueError, match=r"pairs\.jsonl could not be read as json: line 2 is no JSON"):
        list(load_pairs(str(path), streaming=True))
