"""Tools: the schemas in a row, and calls in the form that the chat template takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

from orpo.data.forms.messages import PROBE, Messages, render_messages, without_none
from orpo.data.forms.unusable import UnusableRow


def read_tools(given: Any) -> list[dict[str, Any]] | None:
    """The schemas in a row's ``tools``, a list of dictionaries or its JSON text; None where there are none.

    Names without a value are left out at every depth: Arrow gives each dictionary of a column the names of all others.

    Raises:
        ValueError: it holds something else.
    """
    tools = without_none(given)
    if isinstance(tools, str):
        tools = _parsed(tools) if tools.strip() else None
    if not tools:
        return None
    tools = [tools] if not isinstance(tools, list) else [_parsed(t) if isinstance(t, str) else t for t in tools]
    if not all(map(_is_dict, tools)):
        raise ValueError(f"'tools' holds {given!r:.80}; it has to be a list of schemas, or JSON text of one")
    return tools


def refuse_tools(tools: Any) -> None:
    """Refuses tools beside text that no chat template renders.

    Raises:
        ValueError: there are some.
    """
    if read_tools(tools):
        raise ValueError(
            "'tools' is given beside strings, and a chat template alone has a place for them: give the texts as "
            "messages, with a tokenizer that has a chat template (--chat_template), or leave the column out"
        )


def unread_tools(tools: Any, tokenizer: Any) -> str | None:
    """A warning where the chat template of `tokenizer` does not show a row's `tools`; or None."""
    schemas = read_tools(tools)
    if not schemas or not getattr(tokenizer, "chat_template", None):
        return None
    turn = [{"role": "user", "content": PROBE}]
    try:
        shown = render_messages(turn, tokenizer, tools=schemas) != render_messages(turn, tokenizer)
    except UnusableRow:
        return None
    return None if shown else "the chat template does not show the column 'tools': the prompts hold no tool"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"'tools' holds {text!r:.80}, which is no JSON: {error}") from error


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping)


def _calls(messages: Messages) -> Iterator[dict[str, Any]]:
    for message in messages:
        for call in message.get("tool_calls") or ():
            if _is_dict(call):
                yield call.get("function", call) if _is_dict(call.get("function", call)) else call


def calls_as_taken(messages: Messages, tokenizer: Any, keywords: Mapping[str, Any]) -> Callable[[Messages], Messages]:
    """A function that brings the calls in messages into the form that the chat template takes, tried on `messages`.

    transformers documents ``arguments`` as a dictionary, and most templates would put OpenAI's JSON text in quotes;
    some (DeepSeek's) take text only. Some want an empty ``content`` beside a call, some none. The first form in which
    the template shows the calls is taken, beginning with dictionaries and the content as it is.
    """
    if not any(True for _ in _calls(messages)):
        return lambda messages: messages
    for form in product((False, True), (False, True)):
        if _shows_calls(_in_form(messages, *form), tokenizer, keywords):
            return lambda messages: _in_form(messages, *form)
    # No form works: the template's own error, or the check that calls are shown, says why.
    return lambda messages: _in_form(messages, False, False)


def _shows_calls(messages: Messages, tokenizer: Any, keywords: Mapping[str, Any]) -> bool:
    probed = _mapped(messages, lambda function: {**function, "name": PROBE})
    try:
        whole = render_messages(messages, tokenizer, **keywords)
        names = render_messages(probed, tokenizer, **keywords)
    except UnusableRow:
        return False
    # A template that expects text would write the dictionary as Python code.
    written = (repr(f["arguments"]) for f in _calls(messages) if _is_dict(f.get("arguments")) and f["arguments"])
    return PROBE in names and not any(text in whole for text in written)


def _in_form(messages: Messages, as_text: bool, with_content: bool) -> Messages:
    def change(function: dict[str, Any]) -> dict[str, Any]:
        arguments = function.get("arguments")
        if as_text and _is_dict(arguments):
            return {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
        if not as_text and isinstance(arguments, str):
            try:
                parsed = json.loads(arguments or "{}")
            except json.JSONDecodeError:
                # A rejected answer may be a call that is not JSON.
                return function
            return {**function, "arguments": parsed} if _is_dict(parsed) else function
        return function

    out = _mapped(messages, change)
    if with_content:
        return [{**m, "content": m.get("content") or ""} if m.get("tool_calls") else m for m in out]
    return out


def _mapped(messages: Messages, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Messages:
    """`messages` with `change` made to the function of each call."""

    def call(given: Any) -> Any:
        if not _is_dict(given):
            return given
        return {**given, "function": change(given["function"])} if _is_dict(given.get("function")) else change(given)

    return [
        {**m, "tool_calls": [call(given) for given in m["tool_calls"]]} if isinstance(m.get("tool_calls"), list) else m
        for m in messages
    ]
