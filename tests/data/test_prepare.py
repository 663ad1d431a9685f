"""Token boundaries, BOS and EOS, truncation, and the account of dropped rows."""

import gzip
import json
import os

import datasets
import pytest
from record_trl_trace import SETTINGS, TRACE, trace_pairs, trace_tokenizer
from tiny import CHATML, NO_END, SEVEN, make_tokenizer

from orpo.data.files.sources import load_pairs
from orpo.data.pair_tokens import PairTokenizer, code_version
from orpo.data.prepare import Limits, as_dataset, prepare_dataset
from orpo.data.preview import check_token_ids, describe_example, first_pair
from orpo.layouts.layout import PaddedLayout

UNLIMITED = Limits(max_length=None)


def prepare(data, tokenizer=None, limits=UNLIMITED, **options):
    lines = []
    prepared = prepare_dataset(data, tokenizer or make_tokenizer(), limits, report=lines.append, **options)
    return prepared, lines


def one(prompt, chosen, rejected, **options):
    prepared, _ = prepare([{"prompt": prompt, "chosen": chosen, "rejected": rejected}], **options)
    return prepared[0]


def answer(example, side):
    return example[f"{side}_input_ids"][example[f"{side}_prompt_length"] :]


def test_bos_in_front_and_eos_at_the_end():
    tokenizer = make_tokenizer()
    example = one("hello", " hi", " go", tokenizer=tokenizer)
    assert example["chosen_input_ids"] == [1, *tokenizer.encode("hello hi", add_special_tokens=False), 2]
    assert answer(example, "rejected") == [*tokenizer.encode(" go", add_special_tokens=False), 2]
    assert example["pair_id"] == 0


def test_bos_and_eos_are_not_doubled():
    example = one("<s>hello", " hi</s>", " go")
    assert example["chosen_input_ids"].count(1) == example["chosen_input_ids"].count(2) == 1
    assert example["rejected_input_ids"].count(1) == example["rejected_input_ids"].count(2) == 1


def test_bos_is_not_doubled_where_the_prompt_is_empty():
    example = one("", "<s>hi", "go")
    assert [example[f"{side}_input_ids"].count(1) for side in ("chosen", "rejected")] == [1, 1]
    assert [example[f"{side}_prompt_length"] for side in ("chosen", "rejected")] == [1, 1]


def test_a_tokenizer_without_bos_adds_none():
    example = one("hello", " hi", " go", tokenizer=make_tokenizer(bos_token=None))
    assert 1 not in example["chosen_input_ids"]


def test_a_merge_over_the_boundary_belongs_to_the_answer():
    """ "lan" + "guage" becomes one token; " x" does not merge. Each answer has its own boundary."""
    tokenizer = make_tokenizer()
    prompt, whole = (tokenizer.encode(t, add_special_tokens=False) for t in ("best lan", "best language"))
    assert prompt != whole[: len(prompt)]
    example = one("best lan", "guage", " x", tokenizer=tokenizer)
    assert example["chosen_input_ids"] == [1, *whole, 2]
    assert example["chosen_prompt_length"] < example["rejected_prompt_length"] == 1 + len(prompt)
    assert tokenizer.decode(answer(example, "chosen")) == " language</s>"


def test_chat_turns_end_as_the_template_ends_them():
    tokenizer = make_tokenizer(chat_template=CHATML)
    row = {"prompt": [{"role": "user", "content": "a"}]}
    for side in ("chosen", "rejected"):
        row[side] = [{"role": "assistant", "content": side}]
    example = prepare([row], tokenizer)[0][0]
    assert tokenizer.decode(example["chosen_input_ids"]) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nchosen<|im_end|>\n"
    )
    assert tokenizer.decode(answer(example, "rejected")) == "rejected<|im_end|>\n"


# Its role tags are special tokens, it knows no generation prompt, and nothing ends a turn.
TAGS_ALONE = (
    "{% for m in messages %}{{ '<|im_start|>' if m.role == 'user' else '<|im_end|>' }}{{ m.content }}{% endfor %}"
)
# As Llama-2's and Zephyr's: EOS behind a space, or before a line break.
SPACED_END = "{% for m in messages %}{{ m.role }}: {{ m.content }} {{ eos_token }}\n\n{% endfor %}"


@pytest.mark.parametrize("content", ["a", "a b c d e f g", "Ja", "</s> ends it"])
@pytest.mark.parametrize(
    ("template", "end"), [(TAGS_ALONE, "</s>"), (NO_END, "\n</s>"), (SPACED_END, " </s>\n\n"), (CHATML, "<|im_end|>\n")]
)
def test_an_answer_of_any_length_ends_once(template, end, content):
    """An answer of one token has the tag of its role among its last tokens."""
    tokenizer = make_tokenizer(chat_template=template)
    turn = [{"role": "user", "content": "hello"}]
    row = {"prompt": turn, "chosen": [{"role": "assistant", "content": content}]}
    row["rejected"] = [{"role": "assistant", "content": "b"}]
    example = prepare([row], tokenizer)[0][0]
    assert tokenizer.decode(example["chosen_input_ids"]).endswith(content + end)
    whole = tokenizer.apply_chat_template(turn + row["chosen"], tokenize=False)
    given = tokenizer.encode(whole, add_special_tokens=False)
    added = [2] if template in (TAGS_ALONE, NO_END) else []
    assert example["chosen_input_ids"] == given + added


def test_a_template_without_an_end_gets_eos():
    tokenizer = make_tokenizer(chat_template=NO_END)
    row = {
        side: [{"role": "user", "content": "a"}, {"role": "assistant", "content": side}]
        for side in ("chosen", "rejected")
    }
    example = prepare([row], tokenizer)[0][0]
    assert tokenizer.decode(answer(example, "chosen")).endswith("chosen\n</s>")


WORDS = "a b c d e f g h i j k l m n o p"


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_a_long_prompt_is_cut_and_keeps_its_bos(mode):
    tokenizer = make_tokenizer()
    limits = Limits(max_length=12, max_prompt_length=5, truncation_mode=mode)
    example = one(WORDS, " yes yes", " no", tokenizer=tokenizer, limits=limits)
    assert example["chosen_prompt_length"] == example["rejected_prompt_length"] == 5
    ids = [1, *tokenizer.encode(WORDS, add_special_tokens=False)]
    kept = ids[:5] if mode == "keep_start" else [1, *ids[-4:]]
    assert example["chosen_input_ids"][:5] == kept
    assert len(example["chosen_input_ids"]) <= 12
    assert len(answer(example, "chosen")) >= 1


def test_answers_are_cut_to_what_is_left():
    example = one("hello", " " + WORDS, " no", limits=Limits(max_length=8))
    assert len(example["chosen_input_ids"]) == 8 and 2 not in example["chosen_input_ids"]
    assert example["rejected_input_ids"][-1] == 2


def test_a_pair_that_fits_keeps_a_prompt_longer_than_max_prompt_length():
    example = one(WORDS, " yes", " no", limits=Limits(max_length=64, max_prompt_length=3))
    assert example["chosen_prompt_length"] > 3


def test_a_pair_of_exactly_max_length_is_not_cut():
    whole = one(WORDS, " yes yes", " no")
    limits = Limits(max_length=len(whole["chosen_input_ids"]), max_prompt_length=3)
    assert one(WORDS, " yes yes", " no", limits=limits) == whole
    shorter = Limits(max_length=limits.max_length - 1, max_prompt_length=3)
    assert one(WORDS, " yes yes", " no", limits=shorter)["chosen_prompt_length"] == 3


def test_max_completion_length_cuts_answers():
    example = one("hello", " " + WORDS, " no", limits=Limits(max_length=None, max_completion_length=4))
    assert len(answer(example, "chosen")) == 4


@pytest.mark.parametrize("length", range(2, 24))
def test_truncation_never_leaves_an_empty_answer(length):
    rows = [{"prompt": WORDS[:n], "chosen": " yes", "rejected": " no no"} for n in range(0, len(WORDS), 3)]
    try:
        prepared, _ = prepare(rows, limits=Limits(max_length=length))
    except ValueError:
        assert length == 2, "the shortest prompt has one token, BOS"
        return
    for example in prepared:
        for side in ("chosen", "rejected"):
            assert len(answer(example, side)) >= 1 and len(example[f"{side}_input_ids"]) <= length


def test_dropped_rows_are_counted_by_reason_and_the_rest_keep_their_numbers():
    rows = [
        {"prompt": "hello", "chosen": " hi", "rejected": " "},
        {"prompt": WORDS, "chosen": " hi", "rejected": " no"},
        {"prompt": "hello", "chosen": " hi", "rejected": " no"},
        {"prompt": "hello", "chosen": "", "rejected": " no"},
        {"prompt": "how", "chosen": " hi", "rejected": " no"},
    ]
    prepared, lines = prepare(rows, limits=Limits(max_length=12))
    assert lines == ["train: kept 2 of 5: 2 empty answers (first: row 0), 1 prompt of 12 tokens or more (row 1)"]
    assert prepared["pair_id"] == [2, 4]


def test_the_summary_of_real_dialogues(shared):
    import gzip

    with gzip.open(shared / "data/hh-rlhf-harmless/pairs.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    _, lines = prepare(rows, limits=Limits(max_length=4096))
    assert lines == [
        "train: kept 1,794 of 1,800: 4 empty answers (first: row 86), 2 pairs whose prompts differ (first: row 1254)"
    ]


def test_pairs_of_equal_answers_are_dropped_also_where_a_cut_makes_them_equal():
    rows = [
        {"prompt": "hello", "chosen": " hi", "rejected": " hi"},
        {"prompt": "hello", "chosen": f" {WORDS} yes", "rejected": f" {WORDS} no"},
        {"prompt": "hello", "chosen": " hi", "rejected": " no"},
    ]
    prepared, lines = prepare(rows, limits=Limits(max_length=12))
    assert prepared["pair_id"] == [2]
    assert lines == [
        "train: kept 1 of 3: 1 pair of equal answers (row 0), 1 pair whose answers are equal once cut (row 1)"
    ]
    assert prepare(rows)[0]["pair_id"] == [1, 2]
    with pytest.raises(
        ValueError, match=r"no row of the train set can train: .* 2 pairs of equal answers \(first: row 0"
    ):
        prepare(rows[:1] * 2)


MUTE = "{% for m in messages if m.role == 'user' %}{{ m.content }}{{ eos_token }}{% endfor %}"
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
)


def chat(*contents, first="user"):
    roles = {"user": ("user", "assistant"), "system": ("system", "user", "assistant")}[first]
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


def test_what_the_template_refuses_is_dropped_with_its_own_words():
    rows = [
        {"chosen": chat("q", "a"), "rejected": chat("q", "b")},
        {"chosen": chat("be kind", "q", "a", first="system"), "rejected": chat("be kind", "q", "b", first="system")},
    ]
    prepared, lines = prepare(rows, make_tokenizer(chat_template=STRICT), max_bad_rows=0.5)
    assert prepared["pair_id"] == [0]
    assert lines == [
        "train: kept 1 of 2: 1 row that the chat template refuses (row 1, System role not supported; it holds "
        "chosen: messages, rejected: messages)"
    ]
    with pytest.raises(ValueError, match=r"no row .* System role not supported"):
        prepare(rows[1:], make_tokenizer(chat_template=STRICT), max_bad_rows=1)
    stream, _ = prepare(datasets.Dataset.from_list(rows).to_iterable_dataset(), make_tokenizer(chat_template=STRICT))
    with pytest.warns(UserWarning, match="train: row that the chat template refuses: System role not supported"):
        assert [example["pair_id"] for example in stream] == [0]


def test_a_template_that_leaves_answers_out_trains_nothing():
    with pytest.raises(
        ValueError, match=r"row 0: answer that the chat template leaves out: role 'assistant'; it holds chosen: mess"
    ):
        prepare([{"chosen": chat("q", "a"), "rejected": chat("q", "b")}], make_tokenizer(chat_template=MUTE))


def test_a_row_that_is_no_pair_is_named():
    image = [{"type": "image"}, {"type": "text", "text": "what is this?"}]
    row = {side: chat(image, [{"type": "text", "text": side}]) for side in ("chosen", "rejected")}
    tokenizer = make_tokenizer(chat_template=CHATML)
    with pytest.raises(
        ValueError, match=r"row 0: malformed row: .*part of type 'image': only text.*; it holds chosen: mess"
    ):
        prepare([row], tokenizer)


def test_a_stream_of_which_no_row_can_train_says_so():
    rows = [{"prompt": "a", "chosen": "", "rejected": "b"}] * 3
    stream, _ = prepare(datasets.Dataset.from_list(rows).to_iterable_dataset())
    with pytest.raises(ValueError, match="no row of the stream can train: train: kept 0 of 3: 3 empty answers"):
        first_pair(stream)
    with pytest.raises(ValueError, match="the train set holds no rows"):
        prepare([])


def test_no_row_left_is_an_error():
    with pytest.raises(ValueError, match="no row of the train set can train: train: kept 0 of 1: 1 empty answer"):
        prepare([{"prompt": "a", "chosen": "", "rejected": "b"}])


@pytest.mark.parametrize("num_proc", [None, 2])
def test_containers_and_processes_agree(num_proc):
    rows = [dict(zip(SEVEN, values, strict=True)) for values in zip(*SEVEN.values(), strict=True)]
    expected = prepare(rows)[0].to_list()
    for data in (SEVEN, datasets.Dataset.from_dict(SEVEN)):
        assert prepare(data, num_proc=num_proc)[0].to_list() == expected
    for kind in ("numpy", "pandas"):
        assert prepare(datasets.Dataset.from_dict(SEVEN).with_format(kind), num_proc=num_proc)[0].to_list() == expected
    # Prepared once is prepared for good.
    assert prepare(prepare(SEVEN)[0])[0].to_list() == expected


def test_streams_are_prepared_as_they_come():
    rows = [
        {"prompt": "hello", "chosen": " hi", "rejected": ""},
        {"prompt": "hello", "chosen": " hi", "rejected": " no"},
    ]
    stream, lines = prepare(datasets.Dataset.from_list(rows).to_iterable_dataset())
    assert list(stream) == [one("hello", " hi", " no") | {"pair_id": 1}]
    assert lines == ["train: a stream; rows that cannot train are left out as they come, and counted after each epoch"]


def test_example_shows_what_each_term_scores():
    tokenizer = make_tokenizer()
    text = describe_example(one("hello", " hi", " go"), PaddedLayout(pad_token_id=0), tokenizer)
    assert text.splitlines()[1].endswith("'hello hi</s>'")
    assert text.splitlines()[2].endswith("' hi</s>'") and text.splitlines()[3].endswith("' go</s>'")


def test_tokens_without_an_embedding_are_refused():
    prepared, _ = prepare(SEVEN)
    largest = max(max(e["chosen_input_ids"] + e["rejected_input_ids"]) for e in prepared)
    check_token_ids(prepared, largest + 1)
    check_token_ids(prepare(datasets.Dataset.from_dict(SEVEN).to_iterable_dataset())[0], 1)
    with pytest.raises(ValueError, match=f"token id {largest}, and the model has {largest} embeddings"):
        check_token_ids(prepared, largest)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length is 1; it has to be at least 2"),
        ({"max_completion_length": 0}, "max_completion_length is 0; it has to be at least 1"),
        ({"max_length": 8, "max_prompt_length": 8}, "max_prompt_length is 8 and max_length 8"),
        ({"truncation_mode": "middle"}, "truncation_mode is 'middle'"),
    ],
)
def test_limits_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Limits(**options)


def test_other_containers_are_refused():
    with pytest.raises(ValueError, match="a dict of lists or a list of dicts, not int"):
        as_dataset(3)
    with pytest.raises(ValueError, match="row 1 of the list, counted from 0, is of type NoneType; a row is a dict"):
        as_dataset([{"chosen": "a"}, None])


def test_tokenization_is_trls():
    """Token for token what TRL's trainer made of its recorded run's pairs."""
    ours, _ = prepare(trace_pairs(), trace_tokenizer(), Limits(max_length=SETTINGS["max_length"]))
    tokens = [
        {side: [pair[f"{side}_input_ids"], pair[f"{side}_prompt_length"]] for side in ("chosen", "rejected")}
        for pair in ours
    ]
    assert tokens == json.loads(TRACE.read_text())["tokens"]
    # Some of them are cut, and a merge over the boundary gives one pair two prompts.
    assert max(len(ids) for pair in tokens for ids, _ in pair.values()) == SETTINGS["max_length"]
    assert tokens[-1]["chosen"][1] < tokens[-1]["rejected"][1]


def test_tokens_that_an_older_version_made_are_not_taken_for_ours(own_cache, tmp_path, monkeypatch):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    calls = []
    monkeypatch.setattr(PairTokenizer, "_fit", lambda self, sides: calls.append(1) or sides)
    for version, expected in (("old", 2), ("old", 3), ("new", 5)):
        monkeypatch.setattr("orpo.data.pair_tokens.code_version", lambda version=version: version)
        prepare(load_pairs(str(tmp_path / "pairs.jsonl")))
        # Once for the first row, which is looked at each time.
        assert len(calls) == expected, version
    monkeypatch.undo()
    assert PairTokenizer(make_tokenizer(), UNLIMITED).code == code_version() and len(code_version()) == 64


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "folder"])
def test_other_rows_in_a_file_of_the_same_name_size_and_time_are_read(name, own_cache, tmp_path):
    path = file = tmp_path / name
    if name == "folder":
        path.mkdir()
        file = path / "train.jsonl"
    for answer in ("yes", "no!"):
        line = json.dumps({"prompt": "a", "chosen": answer, "rejected": "c"}).encode()
        file.write_bytes(gzip.compress(line, mtime=0) if name.endswith("gz") else line)
        os.utime(file, ns=(10**18, 10**18))
        pairs = load_pairs(str(path))
        assert pairs["chosen"] == [answer]
        example = prepare(pairs)[0][0]
        assert make_tokenizer().decode(example["chosen_input_ids"]) == f"<s>a{answer}</s>"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("Q: a", "Q: a b", "Q: a c")], "chosen and rejected"),
        ([("Q: a ", " Q: a b", "no")] * 2, "chosen"),
        ([("", "a", "b"), ("Q", "a", "Q b"), *[("Q", "a", f"Q {i}") for i in range(9)]], "rejected"),
        ([("Q", "a", "b"), ("Q", "Q a", "Q b")], None),
        ([("", "a", "b")], None),
    ],
)
def test_answers_that_repeat_their_prompt_are_told(rows, said, stream):
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
    data = datasets.Dataset.from_list(rows)
    lines = [line for line in prepare(data.to_iterable_dataset() if stream else data)[1] if "row's prompt" in line]
    first = 1 if said == "rejected" else 0
    start = f"train: the texts of {said} begin with their own row's prompt (first: row {first}), which is put in front"
    assert [line.startswith(start) for line in lines] == ([True] if said else [])


def test_messages_that_repeat_their_prompt_are_trained_once():
    turn = [{"role": "user", "content": "q"}]
    row = {"prompt": turn, **{s: [*turn, {"role": "assistant", "content": s}] for s in ("chosen", "rejected")}}
    assert len(prepare([row], make_tokenizer(chat_template=CHATML))[1]) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_columns_of_a_prompt_that_are_not_read_are_told(stream):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "system_prompt": "be kind", "history": [], "input": "x"}
    data = datasets.Dataset.from_list([row])
    lines = prepare(data.to_iterable_dataset() if stream else data)[1]
    assert [
        line for line in lines if line.startswith("train: the columns system_prompt, input are not read: ")
    ] == lines[1:]
