"""Messages of a conversation: read as chat templates know them, and rendered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orpo.data.forms.unusable import REFUSED, UnusableRow

Messages = list[dict[str, Any]]

# Takes a text's place to show where a template writes it. No text holds it by chance, and trimming leaves it whole.
PROBE = "xq7probe7qx"

# Roles whose turns are no answer. All others are the assistant's, which has many names: gpt, model.
OTHERS = frozenset(
    ("system", "developer", "user", "human", "tool", "ipython", "function", "observation", "environment")
)


def is_conversation(value: Any) -> bool:
    """Whether `value` is a list of messages, which may be empty."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(m, Mapping) for m in value)


def read_messages(messages: Any, tokenizer: Any) -> Messages:
    """`messages` as templates know them: content is a string, or parts of text for a template that takes parts.

    Names without a value are left out, and so are empty ``tool_calls``: a column of dictionaries holds None for names
    that only other rows have, and templates ask whether a message has calls. A ``weight`` of 0 becomes ``train`` False,
    which :func:`render_messages` hides from templates.

    Raises:
        ValueError: a message has no role, its content is not text, or its weight is neither 0 nor 1.
    """
    out = []
    for message in messages:
        read = without_none(message)
        if not isinstance(read.get("role"), str) or not ({"content", "tool_calls"} & set(message)):
            raise ValueError(
                f"a message holds {sorted(message)}, and needs 'role', a string, and 'content'; "
                "ShareGPT's 'from' and 'value' have to be renamed, and its human and gpt to user and assistant"
            )
        if "content" in message:
            read["content"] = _content(message["content"], tokenizer)
        if not read.get("tool_calls", True):
            del read["tool_calls"]
        if not _is_trained(read):
            read["train"] = False
        out.append(read)
    return out


def _is_trained(message: dict[str, Any]) -> bool:
    """Removes ``weight`` and ``train`` from `message`; returns whether it is trained."""
    weight, train = message.pop("weight", 1), message.pop("train", True)
    if weight not in (0, 1) or not isinstance(train, bool):
        raise ValueError(
            f"a message has weight {weight!r} and train {train!r}; a weight has to be 0 (left out) or 1, train true or "
            "false"
        )
    return bool(weight) and train


def without_none(value: Any) -> Any:
    """`value` without names that hold None, at every depth. None in a list stays."""
    if isinstance(value, Mapping):
        return {name: without_none(part) for name, part in value.items() if part is not None}
    return [without_none(part) for part in value] if isinstance(value, list | tuple) else value


def render_messages(messages: Messages, tokenizer: Any, **keywords: Any) -> str:
    """What the chat template makes of `messages`, which :func:`read_messages` has read.

    Raises:
        UnusableRow: the template refuses them, or fails.
    """
    return apply_template(messages, tokenizer, tokenize=False, **keywords)


def apply_template(messages: Messages, tokenizer: Any, **keywords: Any) -> Any:
    """``tokenizer.apply_chat_template`` of `messages` without their ``train``; raises as :func:`render_messages`."""
    shown = [{name: part for name, part in message.items() if name != "train"} for message in messages]
    try:
        return tokenizer.apply_chat_template(shown, **keywords)
    except ImportError:
        raise
    except Exception as error:
        # The template refuses the messages, or one of its expressions raises an error of any type.
        line = f" (line {error.lineno} of the template)" if getattr(error, "lineno", None) else ""
        raise UnusableRow(REFUSED, f"{error}{line}") from error


def _content(content: Any, tokenizer: Any) -> Any:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"a message's content has to be a string or parts of text, not {type(content).__name__}")
    texts = []
    for part in content:
        kind = (
            part.get("type") if isinstance(part, Mapping) else "text" if isinstance(part, str) else type(part).__name__
        )
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind != "text" or not isinstance(text, str):
            raise ValueError(
                f"a message's content holds a part of type {kind!r}: only text is trained on, so leave out such rows, "
                "or their parts that are no text"
            )
        texts.append(text)
    # A template that expects strings would write a list as Python code.
    return _text_parts(*texts) if _takes_parts(tokenizer) else "".join(texts)


def probed(message: dict[str, Any]) -> dict[str, Any]:
    """`message` with :data:`PROBE` as its content, in parts where it has parts."""
    in_parts = isinstance(message.get("content"), list)
    return {**message, "content": _text_parts(PROBE) if in_parts else PROBE}


def _text_parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _takes_parts(tokenizer: Any) -> bool:
    """Whether the chat template renders content that is a list of parts by their text."""
    try:
        text = render_messages([{"role": "user", "content": _text_parts(PROBE)}], tokenizer)
    except UnusableRow:
        return False
    return PROBE in text and "'text'" not in text and '"text"' not in text


def plain(content: Any) -> str:
    """The text of a message's content."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())
