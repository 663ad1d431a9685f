"""Files as AlpacaEval and FastChat's MT-Bench read them, two turns, a temperature for each category."""

import json

import pytest
from tiny import CHATML, make_model, make_tokenizer

from orpo import judges
from orpo.generate import main
from orpo.generation import generate

# Questions of our own, in the form of alpaca_eval.json and of question.jsonl.
ALPACA = [
    {
        "dataset": "ours",
        "instruction": "hello",
        "output": "another model's",
        "generator": "another",
        "datasplit": "eval",
    },
    {"dataset": "ours", "instruction": "how are you", "input": "my dear friend"},
]
MT_BENCH = [
    {"question_id": 7, "category": "writing", "turns": ["hello", "how are you"]},
    {"question_id": 3, "category": "math", "turns": ["What is your name?", "hello"], "reference": ["Mary", "hi"]},
    {"question_id": 5, "category": "stem", "turns": ["hello hello", "how are you"]},
]
SHORT = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def model():
    return make_model("llama")


@pytest.fixture
def tokenizer():
    return make_tokenizer(chat_template=CHATML)


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return str(tmp_path / "m")


def test_alpacaeval_keeps_the_question_and_replaces_the_answer(model, tokenizer):
    records = judges.alpacaeval(model, tokenizer, ALPACA, "mine", **SHORT)
    answers = generate(model, tokenizer, ["hello", "how are you\n\nmy dear friend"], **SHORT)
    assert [r["output"] for r in records] == [a.strip() for a in answers]
    assert [r["instruction"] for r in records] == ["hello", "how are you"]
    assert all(r["generator"] == "mine" and r["dataset"] == "ours" for r in records)
    assert records[0]["datasplit"] == "eval" and ALPACA[0]["generator"] == "another"


def test_mt_bench_asks_the_second_turn_with_the_first_answer(model, tokenizer):
    math = next(row for row in MT_BENCH if row["category"] == "math")
    (record,) = judges.mt_bench(model, tokenizer, [math], "mine", **SHORT)
    talk = [{"role": "user", "content": math["turns"][0]}]
    (first,) = generate(model, tokenizer, [talk], **SHORT)
    talk += [{"role": "assistant", "content": first.strip()}, {"role": "user", "content": math["turns"][1]}]
    (second,) = generate(model, tokenizer, [talk], **SHORT)
    assert record["choices"] == [{"index": 0, "turns": [first.strip(), second.strip()]}]


def test_mt_bench_has_a_temperature_for_each_category(monkeypatch, tokenizer):
    calls = []

    def spy(model, tokenizer, prompts, *, temperature, seed):
        calls.append((temperature, seed, [talk[0]["content"] for talk in prompts]))
        return [" yes "] * len(prompts)

    monkeypatch.setattr(judges, "generate", spy)
    questions = [
        {"question_id": i, "category": c, "turns": [c, "b"]} for i, c in enumerate([*judges.TEMPERATURES, "other"])
    ]
    records = judges.mt_bench(None, tokenizer, questions, "mine", seed=4)
    assert all(record["choices"][0]["turns"] == ["yes", "yes"] for record in records)
    asked = {category: (t, seed) for t, seed, talks in calls[: len(calls) // 2] for category in talks}
    expected = {0.7: ["writing", "roleplay", "other"], 0.1: ["stem", "humanities"]}
    expected[0.0] = ["extraction", "math", "coding", "reasoning"]
    assert asked == {category: (t, 4) for t, categories in expected.items() for category in categories}
    assert {seed for _, seed, _ in calls} == {4, 5}


def test_the_alpacaeval_file_of_the_command(folder, tmp_path, capsys):
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(ALPACA))
    output = tmp_path / "answers.json"
    arguments = ["--prompts", str(tmp_path / "alpaca_eval.json"), "--format", "alpacaeval", "--output", str(output)]
    main([folder, *arguments, "--max_new_tokens", "3"])
    assert "2 of 2 answers reached --max_new_tokens (3) or the model's last position\n" in capsys.readouterr().err
    records = json.loads(output.read_text())
    assert isinstance(records, list) and len(records) == 2
    for record in records:
        assert {"instruction", "output", "generator", "dataset"} <= set(record)
        assert all(isinstance(value, str) for value in record.values())
        assert record["generator"] == "m" and record["output"] != "another model's"
    main([folder, *arguments, "--max_new_tokens", "3", "--model_id", "named"])
    assert json.loads(output.read_text())[0]["generator"] == "named"


def test_the_mt_bench_file_of_the_command(folder, tmp_path, capsys):
    questions, output = tmp_path / "question.jsonl", tmp_path / "my-model.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in MT_BENCH))
    main(
        [folder, "--prompts", str(questions), "--format", "mt-bench", "--output", str(output), "--max_new_tokens", "3"]
    )
    assert "6 of 6 answers reached --max_new_tokens (3) or the model's last position\n" in capsys.readouterr().err
    # As fastchat/llm_judge/common.py loads them: the file's name is the model's.
    answers = {(r := json.loads(line))["question_id"]: r for line in output.read_text().splitlines()}
    assert list(answers) == [3, 5, 7]
    assert len({record["answer_id"] for record in answers.values()}) == 3
    for record in answers.values():
        assert set(record) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert record["model_id"] == output.stem and isinstance(record["tstamp"], float)
        (choice,) = record["choices"]
        assert choice["index"] == 0 and len(choice["turns"]) == 2
        assert all(isinstance(turn, str) for turn in choice["turns"])


@pytest.mark.parametrize(
    ("form", "text", "words"),
    [
        ("alpacaeval", "[]", "holds no question"),
        ("alpacaeval", '[{"instruction": "a"}, {"prompt": "b"}]', "row 2 .* 'instruction' is no text"),
        ("alpacaeval", '[{"instruction": "a", "input": 5}]', "'input' is 5, no text"),
        ("alpacaeval", "hello", "neither a JSON list"),
        ("mt-bench", '{"question_id": 1, "turns": ["a", "b"]}', "it has no category"),
        ("mt-bench", '{"question_id": 1, "category": "math", "turns": ["a"]}', "not two texts"),
        ("mt-bench", '{"question_id": true, "category": "math", "turns": ["a", "b"]}', "no integer"),
        (
            "mt-bench",
            '{"question_id": 1, "category": ["math"], "turns": ["a", "b"]}',
            "category is \\['math'\\], no text",
        ),
        ("mt-bench", '{"question_id": "x", "category": "math", "turns": ["a", "b"]}', "no integer"),
        ("mt-bench", '{"question_id": 1, "category": "math", "turns": ["a", "b"]}\n' * 2, "question_id 1 stands twice"),
    ],
)
def test_files_of_another_form_are_refused(form, text, words, tmp_path):
    (tmp_path / "q").write_text(text)
    with pytest.raises(ValueError, match=words):
        judges.read_questions(tmp_path / "q", form)


def test_what_cannot_be_asked_is_refused(model, tokenizer, tmp_path, capsys):
    with pytest.raises(ValueError, match="no chat template"):
        judges.mt_bench(model, make_tokenizer(), MT_BENCH, "mine")
    with pytest.raises(ValueError, match=r"temperature is 1\.0"):
        judges.mt_bench(model, tokenizer, MT_BENCH, "mine", temperature=1.0)
    with pytest.raises(ValueError, match="no file"):
        judges.read_questions(tmp_path / "none", "mt-bench")
    with pytest.raises(SystemExit):
        main(["m", "--prompt", "hello", "--format", "mt-bench"])
    assert "needs --prompts" in capsys.readouterr().err
    # Before the model is loaded: there is none called m.
    files = ["--prompts", str(tmp_path / "none"), "--output", str(tmp_path / "answers.jsonl")]
    with pytest.raises(SystemExit):
        main(["m", *files, "--format", "mt-bench", "--temperature", "0.5"])
    assert "--temperature is 0.5; MT-Bench has one for each category" in capsys.readouterr().err


def test_a_question_may_hold_a_line_separator(tmp_path):
    """str.splitlines would end the line there."""
    row = {**MT_BENCH[0], "turns": ["one\u2028still one", "two\x85still two"]}
    (tmp_path / "q").write_text(json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert judges.read_questions(tmp_path / "q", "mt-bench") == [row]
