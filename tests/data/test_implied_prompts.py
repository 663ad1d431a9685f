"""Prompts that both answers begin with, told from the answers alone: what TRL's functions make of the same rows."""

import itertools

import pytest
from tiny import CHATML, make_tokenizer

from orpo.data.forms.formats import IMPLIED, pair_text
from orpo.data.prepare import Limits, prepare_dataset

# Lines of the Zen of Python, of which a preference is made: (prompt, chosen, rejected).
ZEN = (
    ("Beautiful is better than", " ugly.", " the rest of it."),
    ("Explicit is", " better than implicit.", " worse than a good guess."),
    ("Simple is better", " than complex.", " only on Sundays."),
    ("Complex", " is better than complicated.", " things sell best."),
    ("Flat is better than", " nested.", " a mountain."),
    ("Sparse is better than", " dense.", " none."),
    ("Readability", " counts.", " is for readers."),
    ("Special cases aren't special enough", " to break the rules.", " for three exceptions."),
    ("Although practicality beats", " purity.", " drums."),
    ("Errors should never", " pass silently.", " be seen by anyone."),
    ("Unless explicitly", " silenced.", " invited."),
    ("In the face of ambiguity, refuse", " the temptation to guess.", " to answer at all."),
    ("There should be one-- and preferably only one", " --obvious way to do it.", " of each of us."),
    ("Although that way may not be obvious at first unless", " you're Dutch.", " somebody tells."),
    ("Now is better", " than never.", " late at night."),
    ("Although never is often better", " than *right* now.", " for the queue."),
    ("If the implementation is hard to explain,", " it's a bad idea.", " write it twice."),
    ("If the implementation is easy", " to explain, it may be a good idea.", " it was not hard."),
    ("Namespaces are one", " honking great idea -- let's do more of those!", " more thing to name."),
)
# Where a difference falls: within a word, after two spaces, after a newline, behind a text that the other one is.
EDGES = (
    ("the same word: ", "Mary is", "Mark is"),
    ("two  ", "a", "b"),
    ("a line\n", "yes", "no"),
    ("all of it", " and more", ""),
    ("as far as ", "a", "ab"),
    ("no space \u4f60\u597d", "\u5417", "\u5440"),
)
TOKENIZER = make_tokenizer(chat_template=CHATML)


def strings(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def messages(prompt, chosen, rejected):
    answers = {"chosen": chosen, "rejected": rejected}
    row = {side: [{"role": "assistant", "content": text}] for side, text in answers.items()}
    return {"prompt": [{"role": "user", "content": prompt}], **row}


def implicit(row):
    return {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}


def ours(row):
    text = pair_text(row, TOKENIZER)
    assert text.chosen_prompt == text.rejected_prompt
    return {"prompt": text.chosen_prompt, "chosen": text.chosen, "rejected": text.rejected}


ROWS = [
    *(form(*line) for line, form in itertools.product(ZEN, (strings, messages))),
    *(implicit(form(*line)) for line, form in itertools.product(ZEN, (strings, messages))),
    *(implicit(strings(*line)) for line in EDGES),
]


def test_the_texts_are_trls():
    trl = pytest.importorskip("trl")
    for row in ROWS:
        theirs = trl.maybe_apply_chat_template(trl.maybe_extract_prompt(dict(row)), TOKENIZER)
        assert ours(row) == {name: theirs[name] for name in ("prompt", "chosen", "rejected")}


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Flat is better than nested.", "Flat is better than a hill.", ("Flat is better than", " nested.", " a hill.")),
        ("I am Mary", "I am Mark", ("I am Mar", "y", "k")),
        ("Two  a", "Two  b", ("Two ", " a", " b")),
        ("Is it?\nYes", "Is it?\nNo", ("Is it?\n", "Yes", "No")),
        ("All of it", "All of it and more", ("All of i", "t", "t and more")),
        ("\u4f60\u597d\u5417", "\u4f60\u597d\u5440", ("\u4f60\u597d", "\u5417", "\u5440")),
    ],
)
def test_a_prompt_is_what_both_strings_begin_with(chosen, rejected, expected):
    assert tuple(ours({"chosen": chosen, "rejected": rejected}).values()) == expected


@pytest.mark.parametrize("line", ZEN[:4])
def test_an_implied_prompt_trains_the_tokens_of_the_same_prompt_given(line):
    row, lines = strings(*line), []
    given, implied = (
        prepare_dataset([form], make_tokenizer(), Limits(), report=lines.append)[0] for form in (row, implicit(row))
    )
    assert given == implied
    assert [line for line in lines if "there is no column" in line] == [f"train: {IMPLIED}"]
