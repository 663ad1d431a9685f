"""What any text is written as, and that a file is whole or as it was."""

import json
import os

import pytest
from tiny import make_model, make_tokenizer

from orpo import judges
from orpo.files import as_json, write_whole
from orpo.generate import main

HALF = "half \ud83d a pair"


@pytest.mark.parametrize("text", [HALF, "\udfff", "ä \u2028 😀", '"\\ud83d" \\', ""])
def test_any_text_is_json_that_gives_it_back(text):
    written = as_json({"text": text, text: [1]})
    assert json.loads(written.encode("utf-8")) == {"text": text, text: [1]}
    assert "\\u" not in as_json("ä 😀")


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("before")
    path.chmod(0o600)
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, HALF)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["answers.jsonl"]
    (tmp_path / "link").symlink_to(path)
    write_whole(tmp_path / "link", "after")
    assert path.read_text() == "after" and path.stat().st_mode & 0o777 == 0o600 and (tmp_path / "link").is_symlink()
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through"


@pytest.mark.parametrize("form", ["alpacaeval", "mt-bench"])
def test_half_a_pair_in_a_judges_file_loses_no_answer(form, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "m")
    make_tokenizer(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}").save_pretrained(tmp_path / "m")
    question = {"instruction": HALF, "dataset": HALF}
    if form == "mt-bench":
        question = {"question_id": 1, "category": "math", "turns": ["hello", HALF]}
    (tmp_path / "questions").write_text(json.dumps(question))
    files = ["--prompts", str(tmp_path / "questions"), "--output", str(tmp_path / "answers")]
    main([str(tmp_path / "m"), *files, "--format", form, "--device", "cpu", "--max_new_tokens", "3"])
    written = (tmp_path / "answers").read_bytes().decode("utf-8")
    (record,) = json.loads(written) if form == "alpacaeval" else [json.loads(written)]
    assert form == "mt-bench" or record["dataset"] == HALF


def test_records_of_half_pairs(tmp_path):
    for form in ("alpacaeval", "mt-bench"):
        judges.write([{"a": HALF}, {"a": "b"}], tmp_path / form, form)
    assert json.loads((tmp_path / "alpacaeval").read_text())[0] == {"a": HALF}
    assert [json.loads(line)["a"] for line in (tmp_path / "mt-bench").read_text().splitlines()] == [HALF, "b"]
