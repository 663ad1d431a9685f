"""Columns of other names and forms of other projects: each trains the tokens of the same pair in our own form."""

import json
import re
from pathlib import Path

import datasets
import pytest
from chat_templates import family_tokenizer
from tiny import CHATML, SEVEN, make_model, make_tokenizer
from trainers import make_args

from orpo.cli.arguments import parse
from orpo.data.first_rows import read_first
from orpo.data.forms.columns import read_columns
from orpo.data.prepare import Limits, prepare_dataset
from orpo.trainer.trainer import ORPOTrainer

SYSTEM, USER = {"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}
GOOD, BAD = {"role": "assistant", "content": "hi"}, {"role": "assistant", "content": "go away"}
PAIR = {"chosen": [GOOD], "rejected": [BAD]}
STRINGS = {"chosen": "hi", "rejected": "go away"}
TALK = {"prompt": [SYSTEM, USER], **PAIR}
CONTAINERS = {
    "list": lambda row: [row],
    "dict": lambda row: {name: [value] for name, value in row.items()},
    "Dataset": lambda row: datasets.Dataset.from_list([row]),
    "stream": lambda row: datasets.Dataset.from_list([row]).to_iterable_dataset(),
}


def prepare(data, template=CHATML, **options):
    lines = []
    tokenizer = make_tokenizer(chat_template=template)
    return list(prepare_dataset(data, tokenizer, Limits(), report=lines.append, **options)), lines


def share(role, text):
    return {"from": role, "value": text}


# name: (row, the same in our own form, what is said of it, chat template)
FORMS = {
    "sharegpt": (
        {
            "conversations": [share("system", "be kind"), share("human", "hello")],
            "chosen": share("gpt", "hi"),
            "rejected": share("assistant", "go away"),
        },
        TALK,
        "ShareGPT pairs",
        CHATML,
    ),
    "sharegpt, system beside": (
        {
            "conversations": [share("user", "hello")],
            "system": "be kind",
            "chosen": share("gpt", "hi"),
            "rejected": share("gpt", "go away"),
        },
        TALK,
        "ShareGPT pairs.*; the column 'system' is the system message",
        CHATML,
    ),
    "openai": (
        {"input": {"messages": [SYSTEM, USER], "tools": []}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        TALK,
        "OpenAI's preference form",
        CHATML,
    ),
    "orca, template": ({"system": "be kind", "question": "hello", **STRINGS}, TALK, "Orca's form", CHATML),
    "orca, template, no system": (
        {"system": "", "question": "hello", **STRINGS},
        {"prompt": [USER], **PAIR},
        "Orca's form",
        CHATML,
    ),
    "orca, strings": (
        {"system": "be kind", "question": "hello", **STRINGS},
        {"prompt": "be kind\n\nhello", **STRINGS},
        "Orca's form",
        None,
    ),
    "alpaca": (
        {"instruction": "say", "input": "hello", **STRINGS},
        {"prompt": "say\n\nhello", **STRINGS},
        "Alpaca's form",
        None,
    ),
    "alpaca, no input": (
        {"instruction": "hello", "input": "", **STRINGS},
        {"prompt": "hello", **STRINGS},
        "Alpaca's form",
        CHATML,
    ),
    "messages": (
        {"messages": [SYSTEM, USER], "chosen": GOOD, "rejected": BAD},
        TALK,
        "the prompt is 'messages', each",
        CHATML,
    ),
    "one message": ({"prompt": "hello", "chosen": GOOD, "rejected": BAD}, {"prompt": [USER], **PAIR}, "each", CHATML),
    "system, strings": ({"prompt": "hello", "system": "be kind", **STRINGS}, TALK, "the column 'system'", CHATML),
    "system, prompt": ({"prompt": [USER], "system": "be kind", **PAIR}, TALK, "the column 'system'", CHATML),
    "system, twice the same": ({**TALK, "system": "be kind"}, TALK, "the column 'system'", CHATML),
    "system, UltraFeedback's": (
        {"prompt": "hello", "system": "be kind", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        TALK,
        "the column 'system'",
        CHATML,
    ),
    "system, implicit": (
        {"system": "be kind", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        TALK,
        "the column 'system'",
        CHATML,
    ),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", FORMS)
def test_a_form_trains_the_tokens_of_the_same_pair_in_ours(form, container):
    row, own, said, template = FORMS[form]
    theirs, lines = prepare(CONTAINERS[container](row), template)
    ours, plain = prepare([own], template)
    assert theirs == ours and len(ours) == 1
    added = [line for line in lines if line not in plain and "a stream" not in line]
    assert len(added) == 1 and re.match(f"train: {said}", added[0]), added


@pytest.mark.parametrize("form", FORMS)
def test_special_tokens_in_a_form_can_stay_text(form):
    row, own, _, template = FORMS[form]
    row, own = (json.loads(json.dumps(part).replace("go away", "go </s> away")) for part in (row, own))
    theirs, _ = prepare([row], template, escape_special_tokens=True)
    assert theirs == prepare([own], template, escape_special_tokens=True)[0]
    assert theirs != prepare([own], template)[0]


@pytest.mark.parametrize("container", CONTAINERS)
def test_columns_of_other_names_are_read_by_ours(container):
    row = {"chosen": "a score", "good": "hi", "bad": "go away", "question": "hello", "sys": "be kind"}
    columns = {"chosen": "good", "rejected": "bad", "prompt": "question", "system": "sys"}
    theirs, lines = prepare(CONTAINERS[container](row), columns=columns)
    assert theirs == prepare([TALK])[0]
    assert not any("Orca" in line for line in lines)


def test_columns_can_change_places():
    columns = {"chosen": "rejected", "rejected": "chosen"}
    swapped, _ = prepare([{"prompt": "hello", **STRINGS}], columns=columns)
    given, _ = prepare([{"prompt": "hello", "chosen": "go away", "rejected": "hi"}])
    assert swapped == given


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_column_that_is_not_there_is_refused_with_those_that_are(container):
    with pytest.raises(
        ValueError, match=r"'chosen' is the column 'good', which the train set does not have; .*'answer'"
    ):
        prepare(CONTAINERS[container]({"answer": "hi", "bad": "no"}), columns={"chosen": "good", "rejected": "bad"})


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (None, None),
        ("chosen=good, rejected = bad", {"chosen": "good", "rejected": "bad"}),
        ('{"chosen": "a,b=c"}', {"chosen": "a,b=c"}),
        ({"prompt": "q"}, {"prompt": "q"}),
    ],
)
def test_the_setting_is_text_or_a_mapping(given, read):
    assert read_columns(given) == read


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("chosen", "it has to be OURS=THEIRS"),
        ("chosen=", "it has to be OURS=THEIRS"),
        ("chosen=a=b", "are given as JSON"),
        ("chosen=a,chosen=b", "gives one name two columns"),
        ("{chosen", "columns is no JSON: .*; it is '{chosen'"),
        ({"chosen": 1}, "has to be a mapping of names"),
        ("good=chosen", "gives a column for 'good'; what is read is prompt, chosen"),
    ],
)
def test_a_setting_that_names_no_columns_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        read_columns(given)


@pytest.mark.parametrize(
    ("row", "said", "template"),
    [
        ({"prompt": "hello", "system": "be kind", **STRINGS}, "strings have no place for it: write it in front", None),
        ({"system": "be kind", "chosen": "a b", "rejected": "a c"}, "strings have no place for it", CHATML),
        ({**TALK, "system": "be rude"}, "two system messages, 'be rude' .* and 'be kind'", CHATML),
        (
            {"conversations": [share("tool", "x")], "chosen": share("gpt", "a"), "rejected": share("gpt", "b")},
            "a message of ShareGPT's form holds .*'tool'.* one of human, gpt",
            CHATML,
        ),
        (
            {"input": "x", "preferred_output": [GOOD], "non_preferred_output": [BAD]},
            "'input' holds 'x'; beside",
            CHATML,
        ),
    ],
)
@pytest.mark.parametrize("container", ["list", "stream"])
def test_what_has_no_place_is_refused_with_its_row(row, said, template, container):
    with pytest.raises(ValueError, match=f"row 0: malformed row: .*{said}.*; it holds {next(iter(row))}: "):
        prepare(CONTAINERS[container](row), template)


@pytest.mark.parametrize("name", ["question", "instruction"])
def test_a_row_without_its_question_is_dropped(name):
    rows = [{name: text, "chosen": "the hi", "rejected": "the no"} for text in ("hello", None)]
    kept, lines = prepare(rows, max_bad_rows=0.5)
    assert [row["pair_id"] for row in kept] == [0]
    assert f"1 row with null where a text belongs (row 1, 'prompt' is null; it holds {name}: null" in lines[0]


def test_the_option_reaches_the_settings(tmp_path):
    (tmp_path / "run.yaml").write_text("columns:\n  chosen: good\n  prompt: question\n")
    line = ["--output_dir", str(tmp_path), "--use_cpu"]
    for words in (["--columns", "chosen=good,prompt=question"], ["--config", str(tmp_path / "run.yaml")]):
        assert parse([*line, *words])[2].columns == {"chosen": "good", "prompt": "question"}
    with pytest.raises(ValueError, match="columns gives a column for 'good'"):
        parse([*line, "--columns", "good=chosen"])


def test_a_run_reads_columns_of_other_names(tmp_path):
    rows = {"question": SEVEN["prompt"], "good": SEVEN["chosen"], "bad": SEVEN["rejected"]}
    args = make_args(tmp_path, columns={"prompt": "question", "chosen": "good", "rejected": "bad"})
    theirs, ours = (
        ORPOTrainer(make_model(), part, train_dataset=data, eval_dataset=data, processing_class=make_tokenizer())
        for part, data in ((args, rows), (make_args(tmp_path), SEVEN))
    )
    for name in ("train_dataset", "eval_dataset"):
        assert list(getattr(theirs, name)) == list(getattr(ours, name))
    assert theirs.evaluate(rows)["eval_loss"] == ours.evaluate(SEVEN)["eval_loss"]


def test_tools_of_openais_form_reach_the_template():
    template = "{% for t in tools or [] %}[{{ t.name }}{{ ' None' if 'x' in t }}]{% endfor %}" + CHATML
    row = {"input": {"messages": [USER], "tools": [{"name": "look", "x": None}]}}
    row |= {"preferred_output": [GOOD], "non_preferred_output": [BAD]}
    ((pair,), _) = prepare([row], template)
    assert make_tokenizer().decode(pair["chosen_input_ids"]).startswith("[look]<|im_start|>user")


def test_the_first_row_is_read_as_all_are():
    """By it generation is told whether a model was trained with its chat template."""
    tokenizer = make_tokenizer(chat_template=CHATML)
    row = {"system": None, "q": "hello", **STRINGS}
    for make in CONTAINERS.values():
        assert read_first(make(row), tokenizer, {"question": "q"})["chosen"] == [GOOD]
    assert read_first(None, tokenizer) == read_first([], tokenizer) == {}
    prepared, _ = prepare([TALK])
    assert read_first(prepared, tokenizer, {"chosen": "good"}) == prepared[0]


def test_the_rows_with_tools_and_turns_of_the_page_train():
    page = Path(__file__).resolve().parents[2] / "docs/data.md"
    tools, turns = (json.loads(row) for row in re.findall(r"```json\n(.*?)\n```", page.read_text(), re.DOTALL))
    tokenizer = family_tokenizer("Hermes")
    for row, scored in (
        (tools, [("add", "It is 4."), ("It is 5.",)]),
        (turns, [("4", "6"), ("7",)]),
    ):
        (pair,) = prepare_dataset([row], tokenizer, Limits(), report=lambda _: None)
        for side, texts in zip(("chosen", "rejected"), scored, strict=True):
            ids, first = pair[f"{side}_input_ids"], pair[f"{side}_prompt_length"]
            mask = pair.get(f"{side}_mask") or [0] * first + [1] * (len(ids) - first)
            text = tokenizer.decode([token for token, value in zip(ids, mask, strict=True) if value == 1])
            turns_scored = text.removesuffix("<|im_end|>\n").split("<|im_end|>\n")
            assert len(turns_scored) == len(texts) and all(map(str.__contains__, turns_scored, texts)), text


def test_the_rows_of_the_page_train():
    page = Path(__file__).resolve().parents[2] / "docs/data.md"
    rows = [json.loads(row) for row in re.findall(r"\| `(\{.*\})` \|", page.read_text())]
    assert len(rows) == 14
    for row in rows:
        other = [{**row, "completion": " 5", "label": False}] if "label" in row else []
        pairs, _ = prepare([row, *other], pair_answers=bool(other))
        assert len(pairs) == (
            2 if isinstance(row.get("rejected"), list) and not isinstance(row["rejected"][0], dict) else 1
        )
        text = make_tokenizer().decode(pairs[0]["chosen_input_ids"])
        assert "2 + 2" in text and text.rstrip("\n").removesuffix("</s>").removesuffix("<|im_end|>").endswith("4"), text
