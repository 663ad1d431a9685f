"""orpo.formats: every form of preference data, reduced to prompt and answer text."""

import pytest
from tiny import CHATML, make_tokenizer

from orpo.formats import PairText, UnusableRow, pair_text

USER = {"role": "user", "content": "hello"}
GOOD = {"role": "assistant", "content": "hi"}
BAD = {"role": "assistant", "content": "go away"}
PROMPT = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
CHAT = PairText(PROMPT, "hi<|im_end|>\n", PROMPT, "go away<|im_end|>\n", templated=True)


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
        ({"prompt": "p", "chosen": "a", "rejected": None}, "empty answer"),
        ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant:"}, "empty answer"),
        ({"chosen": "x\n\nAssistant: a", "rejected": "y\n\nAssistant: b"}, "pair whose prompts differ"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [{**BAD, "content": ""}]}, "empty answer"),
        ({"chosen": [], "rejected": [USER, BAD]}, "empty answer"),
    ],
)
def test_rows_that_cannot_train_say_why(row, reason, chat_tokenizer):
    with pytest.raises(UnusableRow, match=reason):
        pair_text(row, chat_tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, r"needs the columns .*; this one has \['chosen', 'prompt'\]"),
        ({"chosen": "a", "rejected": "b"}, "split after the last .*does not hold: 'a'"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "'prompt' has to be a string .* not int"),
        ({"prompt": "p", "chosen": "a", "rejected": [GOOD]}, "not str and list"),
    ],
)
def test_other_forms_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        pair_text(row, None)


def test_conversations_need_a_chat_template():
    with pytest.raises(ValueError, match="no chat template"):
        pair_text({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, make_tokenizer())


def test_what_a_row_says_to_the_template_reaches_it():
    told = "{% if loud %}LOUD {% endif %}{% if absent is defined %}NONE {% endif %}"
    template = told + "{% for m in messages %}{{ m.content }};{% endfor %}"
    tokenizer = make_tokenizer(chat_template=template)
    sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    row = {"prompt": [{"role": "user", "content": "hi"}], **sides}
    assert pair_text(row, tokenizer).chosen_prompt == "hi;"
    text = pair_text({**row, "chat_template_kwargs": {"loud": True, "absent": None}}, tokenizer)
    assert (text.chosen_prompt, text.rejected_prompt, text.chosen) == ("LOUD hi;", "LOUD hi;", "chosen;")
