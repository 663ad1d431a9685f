"""Every form of preference data, reduced to prompt and answer text."""

import json
from datetime import date, time

import pytest
from tiny import CHATML, make_tokenizer

from orpo.data.forms.formats import PairText, UnusableRow, pair_text

USER = {"role": "user", "content": "hello"}
GOOD = {"role": "assistant", "content": "hi"}
BAD = {"role": "assistant", "content": "go away"}
PAIR = {"chosen": GOOD, "rejected": BAD}
PROMPT = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
CHAT = PairText(PROMPT, "hi<|im_end|>\n", PROMPT, "go away<|im_end|>\n", templated=True)


SYSTEM = {"role": "system", "content": "be kind"}
MORE = {"role": "user", "content": "and?"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": None}]}


@pytest.fixture(scope="module")
def chat_tokenizer():
    return make_tokenizer(chat_template=CHATML, eos_token="<|im_end|>", bos_token=None)


def test_strings_are_taken_as_they_are():
    row = {"prompt": "hello", "chosen": " hi", "rejected": " go away", "score": 3}
    assert pair_text(row, None) == PairText("hello", " hi", "hello", " go away", templated=False)


def test_dialogues_split_after_the_last_assistant_turn():
    head = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    # Both answers begin alike: a split by common characters would reach into them.
    text = pair_text({"chosen": head + " Yes, do.", "rejected": head + " Yes, don't."}, None)
    assert text == PairText(head, " Yes, do.", head, " Yes, don't.", templated=False)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "hello", "chosen": [USER, GOOD], "rejected": [USER, BAD], "prompt_id": "x", "messages": [USER]},
        {"prompt": "hello", "chosen": [GOOD], "rejected": [BAD]},
    ],
    ids=["explicit", "explicit, repeated in the answers", "implicit", "UltraFeedback-binarized", "string prompt"],
)
def test_conversations(row, chat_tokenizer):
    assert pair_text(row, chat_tokenizer) == CHAT


def test_conversation_prompt_is_all_that_both_sides_share(chat_tokenizer):
    turns = [USER, GOOD, {"role": "user", "content": "and?"}]
    text = pair_text({"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}, chat_tokenizer)
    assert text.chosen_prompt.endswith("and?<|im_end|>\n<|im_start|>assistant\n")
    assert text.chosen == CHAT.chosen and text.rejected == CHAT.rejected


def test_equal_conversations_keep_their_last_message_as_the_answer(chat_tokenizer):
    text = pair_text({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, chat_tokenizer)
    assert text == PairText(PROMPT, CHAT.chosen, PROMPT, CHAT.chosen, templated=True)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "p", "chosen": " ", "rejected": "b"}, "empty answer"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "row with null where a text belongs: 'rejected' is null"),
        ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant:"}, "empty answer"),
        ({"chosen": "x\n\nAssistant: a", "rejected": "y\n\nAssistant: b"}, "pair whose prompts differ"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [{**BAD, "content": ""}]}, "empty answer"),
        ({"chosen": [], "rejected": [USER, BAD]}, "empty answer"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [USER, BAD]}, "empty answer"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "where a text belongs: 'prompt' is null"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "pair without a prompt"),
        ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, "pair without a prompt"),
        ({"chosen": "a b", "rejected": "b b"}, "pair without a prompt: .* 'a b' and 'b b' begin with nothing alike"),
        ({"chosen": " a", "rejected": " b"}, "pair without a prompt: .* begin with nothing alike"),
        ({"chosen": "hi ", "rejected": "hi you"}, "empty answer"),
        ({"prompt": None, "chosen": "hi a", "rejected": "hi b"}, "where a text belongs: 'prompt' is null"),
        (
            {"chosen": "\n\nAssistant: a", "rejected": "b"},
            "dialogue without .*Assistant:': .*nothing to split 'b' after",
        ),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "bye"}, BAD]}, "pair whose prompts differ"),
        ({"prompt": [SYSTEM], "chosen": [USER, GOOD], "rejected": [MORE, BAD]}, "pair whose prompts differ"),
        ({"prompt": "hi", "chosen": [USER, GOOD], "rejected": [MORE, BAD]}, "pair whose prompts differ"),
        (
            {"chosen": [USER, GOOD, MORE], "rejected": [USER, BAD, MORE]},
            "last turn is not the assistant's: role 'user'",
        ),
        ({"prompt": [USER], "chosen": [{**GOOD, "role": "gpt"}], "rejected": [BAD]}, "another role .* role 'gpt'"),
        ({"prompt": [USER], "chosen": [CALL], "rejected": [BAD]}, "the chat template leaves out: role 'assistant'"),
        ({"prompt": [{**USER, "content": None}], "chosen": [GOOD], "rejected": [BAD]}, "holds nothing: role 'user'"),
    ],
)
def test_rows_that_cannot_train_say_why(row, reason, chat_tokenizer):
    with pytest.raises(UnusableRow, match=reason):
        pair_text(row, chat_tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, r"needs the columns .*; this one has \['chosen', 'prompt'\]: rename"),
        (
            {"prompt": "p", "completion": "a", "label": True},
            "as KTO trains on.*--pair_by_prompt true makes pairs of the prompts that have both",
        ),
        ({"messages": [USER, GOOD]}, "as fine-tuning .* trains on.*add a worse one"),
        ({"prompt": "p", "completion": "a"}, "as fine-tuning .* trains on.*add a worse one"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' has to be a string .* not int"),
        ({"prompt": "p", "chosen": "a", "rejected": [GOOD]}, "not str and list"),
        ({"prompt": "p", "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])}, r"messages written out, '\[{"),
        ({"prompt": "p", "chosen": f" {[USER, GOOD]}\n", "rejected": str(BAD)}, r"json\.loads \(ast\.literal_eval"),
        ({"chosen": json.dumps([USER, GOOD]), "rejected": json.dumps([USER, BAD], indent=1)}, "messages written out"),
        ({"prompt": str([{"from": "human", "value": "a"}]), "chosen": "a", "rejected": "b"}, "messages written out"),
        ({"prompt": json.dumps([USER]), "chosen": [GOOD], "rejected": [BAD]}, "messages written out"),
        (
            {"prompt": "p", "chosen": date(2024, 1, 1), "rejected": "b"},
            r"holds datetime\.date\(2024, 1, 1\) where text",
        ),
        (
            {
                "prompt": "p",
                "chosen": [{**CALL, "tool_calls": [{"arguments": {"d": date(2024, 1, 1)}}]}],
                "rejected": [BAD],
            },
            "save the rows as parquet or CSV",
        ),
        (
            {"prompt": "p", **{s: [m] for s, m in PAIR.items()}, "chat_template_kwargs": {"d": time(1)}},
            "text stays text",
        ),
    ],
)
def test_other_forms_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        pair_text(row, None)


def test_conversations_need_a_chat_template():
    with pytest.raises(ValueError, match="no chat template"):
        pair_text({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, make_tokenizer())


def test_a_prompt_repeated_on_one_side_only_is_no_answer(chat_tokenizer):
    row = {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]}
    assert pair_text(row, chat_tokenizer) == CHAT


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "hello", "chosen": [SYSTEM, GOOD], "rejected": [SYSTEM, BAD]},
        {"prompt": [SYSTEM, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
    ],
    ids=["the user's turn in the answers", "the system's", "both", "on one side", "the system's in the answers alone"],
)
def test_turns_that_answer_nothing_belong_to_the_prompt(row, chat_tokenizer):
    system = "<|im_start|>system\nbe kind<|im_end|>\n"
    text = pair_text(row, chat_tokenizer)
    assert text == CHAT._replace(chosen_prompt=system + PROMPT, rejected_prompt=system + PROMPT)


def test_a_turn_that_the_user_says_twice_stays_twice(chat_tokenizer):
    row = {"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [GOOD, USER, BAD]}
    text = pair_text(row, chat_tokenizer)
    assert text.chosen_prompt == f"{PROMPT}hi<|im_end|>\n{PROMPT}" and text.rejected == CHAT.rejected


def test_parts_of_text_are_rendered_as_text():
    """As the template takes them: as parts, or as one string where it knows strings only."""
    parts = [{"type": "text", "text": "hel", "image": None}, {"type": "text", "text": "lo", "image": None}]
    row = {"prompt": [{"role": "user", "content": parts}]}
    row |= {side: [{**m, "content": [{"type": "text", "text": m["content"]}]}] for side, m in PAIR.items()}
    in_parts = CHATML.replace(
        "{{ m['content'] }}", "{% for p in m.content %}{{ 'IMAGE' if 'image' in p }}{{ p.text }}{% endfor %}"
    )
    assert in_parts != CHATML
    for template in (CHATML, in_parts):
        assert pair_text(row, make_tokenizer(chat_template=template)) == CHAT


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "a part of type 'image_url'"),
        ({"role": "user", "content": [3]}, "a part of type 'int'"),
        ({"role": "user", "content": 3}, "a string or parts of text, not int"),
        ({"role": "user", "content": {"text": "a"}}, "a string or parts of text, not dict"),
        ([USER], "has to be a string or a list of messages, not list"),
        ({"from": "human", "value": "a"}, r"a message holds \['from', 'value'\], and needs 'role'"),
    ],
)
def test_messages_that_are_no_text_are_refused(message, said, chat_tokenizer):
    with pytest.raises(ValueError, match=said):
        pair_text({"prompt": [message], "chosen": [GOOD], "rejected": [BAD]}, chat_tokenizer)


def test_names_that_a_message_does_not_have_stay_out_of_the_template():
    """Arrow gives every message the names of all."""
    tokenizer = make_tokenizer(
        chat_template=CHATML.replace("<|im_end|>", "{{ 'TOOL' if 'tool_calls' in m }}<|im_end|>")
    )
    row = {"prompt": [{**USER, "tool_calls": None}], "chosen": [{**GOOD, "name": None}], "rejected": [BAD]}
    assert pair_text(row, tokenizer) == CHAT


def test_a_call_of_a_tool_is_an_answer():
    template = CHATML.replace("{{ m['content'] }}", "{{ m.content or (m.tool_calls | tojson) }}")
    text = pair_text({"prompt": [USER], "chosen": [CALL], "rejected": [BAD]}, make_tokenizer(chat_template=template))
    assert text == CHAT._replace(chosen='[{"name": "f"}]<|im_end|>\n')


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("x", "has to be a dictionary, not str"),
        ({"add_generation_prompt": True}, "sets add_generation_prompt, which is"),
    ],
)
def test_what_a_row_may_not_say_to_the_template(given, said, chat_tokenizer):
    with pytest.raises(ValueError, match=said):
        pair_text(
            {"prompt": [USER], **{s: [m] for s, m in PAIR.items()}, "chat_template_kwargs": given}, chat_tokenizer
        )


def test_what_a_row_says_to_the_template_reaches_it():
    told = "{% if loud %}LOUD {% endif %}{% if absent is defined %}NONE {% endif %}"
    template = told + "{% for m in messages %}{{ m.content }};{% endfor %}"
    tokenizer = make_tokenizer(chat_template=template)
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    row = {"prompt": [{"role": "user", "content": "hi"}], **sides}
    assert pair_text(row, tokenizer).chosen_prompt == "hi;"
    text = pair_text({**row, "chat_template_kwargs": {"loud": True, "absent": None}}, tokenizer)
    assert (text.chosen_prompt, text.rejected_prompt, text.chosen) == ("LOUD hi;", "LOUD hi;", "chosen;")


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ('[{"a": 1}]', '[{"role": "user", "content": "a"}]'),
        ('[{"role": "user", "content": "a"}] is one.', '{"role": "user", "content": "a"'),
        ('{"role": "admin"}', '{"role": "guest"}'),
    ],
)
def test_answers_that_are_json_are_text(chosen, rejected):
    text = pair_text({"prompt": "[p", "chosen": chosen, "rejected": rejected}, None)
    assert (text.chosen, text.rejected) == (chosen, rejected)
