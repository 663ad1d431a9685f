"""Columns of other names, and forms of other projects: each row as :mod:`orpo.data.forms.formats` knows it.

=============  ===========================================================================================
OpenAI         ``input`` (``{"messages": [...]}``), ``preferred_output``, ``non_preferred_output``
ShareGPT       ``conversations``, and one message a side, of ``from`` and ``value``
messages       ``messages``, and one message a side
Orca           ``question``, often ``system``, and two strings
Alpaca         ``instruction``, often ``input``, and two strings
one message    ``chosen`` and ``rejected`` are a message each, not a list of messages
=============  ===========================================================================================

A column ``system`` beside any of them, or beside our own forms, is the conversation's system message.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, NamedTuple

from orpo.data.forms.messages import is_conversation, without_none
from orpo.data.forms.unusable import FileFault

Row = Mapping[str, Any]

OPENAI = ("input", "preferred_output", "non_preferred_output")
SIDES = ("chosen", "rejected")
# All columns that some form reads.
NAMES = (
    *("prompt", *SIDES, "system", "tools", "chat_template_kwargs"),
    *(*OPENAI, "conversations", "messages", "question", "instruction", "completion", "label"),
)
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


def read_columns(given: Mapping[str, str] | str | None) -> dict[str, str] | None:
    """The setting ``columns``: our name -> the column's.

    Args:
        given: a mapping, or text: ``"chosen=good,rejected=bad"`` or JSON.

    Raises:
        ValueError: it is no such text, or names no column that some form reads.
    """
    if given is None:
        return None
    columns = _from_text(given) if isinstance(given, str) else given
    if not isinstance(columns, Mapping) or not all(isinstance(part, str) for pair in columns.items() for part in pair):
        raise ValueError(f"columns is {given!r}; it has to be a mapping of names, such as chosen=good,rejected=bad")
    if unknown := [name for name in columns if name not in NAMES]:
        raise ValueError(f"columns gives a column for {unknown[0]!r}; what is read is {', '.join(NAMES)}")
    return dict(columns)


def _from_text(text: str) -> Any:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"columns is no JSON: {error}; it is {text!r}") from error
    pairs = [tuple(part.strip() for part in pair.split("=")) for pair in text.split(",")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise ValueError(
            f"columns is {text!r}; it has to be OURS=THEIRS with commas between, such as chosen=good,rejected=bad; "
            "names with a comma or = in them are given as JSON"
        )
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"columns is {text!r}; it gives one name two columns")
    return dict(pairs)


def renamed(row: Row, columns: Mapping[str, str] | None, what: str = "a row") -> Row:
    """`row` by our names, as `columns` maps them. A column that has one of these names already is left out.

    Raises:
        FileFault: `row`, called `what`, has no such column.
    """
    if not columns:
        return row
    for ours, theirs in columns.items():
        if theirs not in row:
            raise FileFault(
                f"columns says that {ours!r} is the column {theirs!r}, which {what} does not have; it has "
                f"{', '.join(map(repr, row))}"
            )
    left = {name: value for name, value in row.items() if name not in columns and name not in columns.values()}
    return left | {ours: row[theirs] for ours, theirs in columns.items()}


def with_our_names(data: Any, columns: Mapping[str, str] | None) -> Any:
    """A ``datasets.Dataset`` whose columns have the names that :func:`renamed` gives a row of it."""
    if not columns:
        return data
    taken = [name for name in columns if name in data.column_names and name not in columns.values()]
    return data.remove_columns(taken).rename_columns({theirs: ours for ours, theirs in columns.items()})


def each_pair(row: Row) -> list[Row]:
    """`row`, by our names, once for each pair in it: ``chosen`` or ``rejected`` may be a list of answers, strings or
    conversations, and each better one is paired with each worse one."""
    if not any(_are_several(row.get(side)) for side in SIDES):
        return [row]
    answers = [value if _are_several(value := row.get(side)) else [value] for side in SIDES]
    return [{**row, **dict(zip(SIDES, pair, strict=True))} for pair in product(*answers)]


def _are_several(answers: Any) -> bool:
    return isinstance(answers, list) and any(isinstance(answer, str | list) for answer in answers)


def read_row(row: Row, tokenizer: Any, columns: Mapping[str, str] | None = None) -> Row:
    """`row` in a form of :mod:`orpo.data.forms.formats`. A row of such a form or of an unknown one stays as it is.

    Args:
        row: of a data set.
        tokenizer: whose chat template decides whether Orca's rows, and strings beside a system message, are
            conversations.
        columns: our name -> the column's.

    Raises:
        ValueError: a column is missing, or what the row holds has no place among the texts that are trained.
    """
    row = renamed(row, columns)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    form = known_form(row)
    return _with_system(row if form is None else form.read(row, has_template), has_template)


class Form(NamedTuple):
    """A form of another project: its description, how to recognize a row of it, and how to read one."""

    said: str
    fits: Callable[[Row], bool]
    read: Callable[[Row, bool], Row]


def known_form(row: Row) -> Form | None:
    """Which of :data:`FORMS` the row has, by our names; None for our own and for unknown ones."""
    return next((form for form in FORMS if form.fits(row)), None)


def describe_forms(row: Row) -> str | None:
    """A sentence about the form of a data set whose first row, by our names, is `row`; None for our own forms."""
    form = known_form(row)
    said = [] if form is None else [form.said]
    if isinstance(row.get("system"), str) and not (form and "system" in form.said):
        said.append("the column 'system' is the system message of each row's conversation")
    return "; ".join(said) or None


def _without(row: Row, *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _one_message(row: Row, key: str) -> bool:
    """Whether an answer is a single message, not a list, and has `key`."""
    return any(isinstance(row.get(side), Mapping) and key in row[side] for side in SIDES)


def _two_strings(row: Row, name: str) -> bool:
    """Whether the column `name` is text, the answers are strings, and there is no ``prompt``."""
    # A row may lack one of them, and still has this form: such a row is refused when it is read.
    texts = [row.get(side) for side in SIDES]
    whole = all(isinstance(text, str | None) for text in (row.get(name), *texts)) and any(texts)
    return whole and name in row and "prompt" not in row


def _in_lists(row: Row, read: Callable[[Row], Row] = dict) -> dict[str, Any]:
    return {side: [read(row[side])] if isinstance(row.get(side), Mapping) else row.get(side) for side in SIDES}


def _openai(row: Row, _: bool) -> Row:
    given = row["input"]
    if not isinstance(given, Mapping) or "messages" not in given:
        raise ValueError(f"'input' holds {given!r:.80}; beside 'preferred_output' it has to hold {{'messages': [...]}}")
    out = _without(row, *OPENAI) | {"prompt": given["messages"]}
    out |= dict(zip(SIDES, (row["preferred_output"], row["non_preferred_output"]), strict=True))
    if given.get("tools"):
        out["tools"] = given["tools"]
    return out


def _sharegpt_message(message: Row) -> Row:
    role = SHAREGPT_ROLES.get(message.get("from"))
    if role is None or "value" not in message:
        raise ValueError(
            f"a message of ShareGPT's form holds {without_none(message)!r:.80}; it has to have 'value', and 'from' as "
            f"one of {', '.join(SHAREGPT_ROLES)}"
        )
    return {"role": role, "content": message["value"]}


def _sharegpt(row: Row, _: bool) -> Row:
    turns = row["conversations"]
    if turns is not None:
        if not is_conversation(turns):
            raise ValueError(f"'conversations' has to be a list of messages, not {turns!r:.80}")
        turns = [_sharegpt_message(message) for message in turns]
    return {**_without(row, "conversations"), "prompt": turns, **_in_lists(row, _sharegpt_message)}


def _messages(row: Row, _: bool) -> Row:
    return {**_without(row, "messages"), "prompt": row["messages"], **_in_lists(row)}


def _one_message_each(row: Row, _: bool) -> Row:
    return {**row, **_in_lists(row)}


def _orca(row: Row, has_template: bool) -> Row:
    question, system = row["question"], row.get("system")
    if has_template or question is None or not isinstance(system, str):
        out = _without(row, "question") | {"prompt": question}
        return {**out, "system": system} if has_template else out
    prompt = "\n\n".join(text for text in (system, question) if text.strip())
    return _without(row, "question", "system") | {"prompt": prompt}


def _alpaca(row: Row, _: bool) -> Row:
    instruction, given = row["instruction"], row.get("input")
    out = _without(row, "instruction", "input") | {"prompt": instruction}
    if instruction is not None and isinstance(given, str) and given.strip():
        out["prompt"] = f"{instruction}\n\n{given}"
    return out


FORMS = (
    Form(
        "OpenAI's preference form: the prompt is 'messages' of 'input', the answers are 'preferred_output' and "
        "'non_preferred_output'",
        lambda row: set(OPENAI) <= row.keys(),
        _openai,
    ),
    Form(
        "ShareGPT pairs: the prompt is 'conversations', human and gpt are user and assistant",
        lambda row: "conversations" in row and "prompt" not in row and _one_message(row, "from"),
        _sharegpt,
    ),
    Form(
        "the prompt is 'messages', each answer is one message",
        lambda row: "messages" in row and "prompt" not in row and _one_message(row, "role"),
        _messages,
    ),
    Form("each answer is one message", lambda row: _one_message(row, "role"), _one_message_each),
    Form(
        "Orca's form: the prompt is 'question', after 'system' where that holds something (with a chat template a "
        "conversation, else joined by a blank line)",
        lambda row: _two_strings(row, "question"),
        _orca,
    ),
    Form(
        "Alpaca's form: the prompt is 'instruction', a blank line and 'input' where that holds something",
        lambda row: _two_strings(row, "instruction"),
        _alpaca,
    ),
)


def _with_system(row: Row, has_template: bool) -> Row:
    """`row` with its column ``system`` as a message of its conversation."""
    if not isinstance(row.get("system", 0), str | None):
        return row
    prompt, answers, out = row.get("prompt"), [row.get(side) for side in SIDES], _without(row, "system")
    message = [{"role": "system", "content": row["system"]}] if (row["system"] or "").strip() else []
    if any(answer is None for answer in answers):
        return out
    if all(isinstance(answer, str) for answer in answers):
        if isinstance(prompt, str) and has_template:
            # Rows without a system message become conversations too, so that all prompts have one form.
            out["prompt"] = [*message, {"role": "user", "content": prompt}]
            return out | {side: [{"role": "assistant", "content": row[side]}] for side in SIDES}
        if message and not ("prompt" in row and prompt is None):
            raise ValueError(
                f"the column 'system' holds {row['system']!r:.60}, and strings have no place for it: write it in front "
                "of 'prompt', or give the texts 'prompt', 'chosen', 'rejected' and a chat template (--chat_template)"
            )
        return out
    if not message:
        return out
    names = ("prompt",) if prompt and not isinstance(prompt, str) else SIDES
    return out | {name: _in_front(message, row[name]) for name in names}


def _in_front(system: list[dict[str, Any]], messages: Any) -> Any:
    if not is_conversation(messages):
        # Reading the messages refuses them.
        return messages
    if not messages or messages[0].get("role") != "system":
        return [*system, *messages]
    if messages[0].get("content") != system[0]["content"]:
        raise ValueError(
            f"a row has two system messages, {system[0]['content']!r:.60} in its column 'system' and "
            f"{messages[0].get('content')!r:.60} among its messages: leave one out"
        )
    return messages
