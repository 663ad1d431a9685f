"""Conversations as text: which messages are the prompt, and what the chat template makes of prompt and answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orpo.data.unusable import (
    EMPTY_ANSWER,
    LEFT_OUT,
    NO_CONTENT,
    NO_PROMPT,
    OTHER_ROLE,
    PROMPTS_DIFFER,
    REFUSED,
    USERS_TURN,
    UnusableRow,
)

Messages = list[dict[str, Any]]

# Stands in a message's place to see what a template makes of it; trimmed or not, no text holds it by chance.
PROBE = "xq7probe7qx"


def is_conversation(value: Any) -> bool:
    """Whether `value` is a list of messages, which may be empty."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(m, Mapping) for m in value)


def conversation_text(
    prompt: Any, chosen: Any, rejected: Any, tokenizer: Any, keywords: Mapping[str, Any]
) -> tuple[str, str, str, str]:
    """(prompt, chosen answer, prompt, rejected answer) as `tokenizer`'s chat template renders them.

    Args:
        prompt: messages, a string that is the user's turn, or None where both answers begin with the prompt.
        chosen, rejected: messages.
        tokenizer: a tokenizer with a chat template.
        keywords: for the template.

    Raises:
        UnusableRow: the row has no prompt or no answer in it, or the template refuses it.
        ValueError: what is given are no messages of text.
    """
    chosen, rejected = read_messages(chosen, tokenizer), read_messages(rejected, tokenizer)
    if is_conversation(prompt):
        prompt = read_messages(prompt, tokenizer)
    elif prompt is not None and not isinstance(prompt, str):
        raise ValueError(
            f"'prompt' has to be a string or a list of messages, not {type(prompt).__name__}: {prompt!r:.80}"
        )
    messages, chosen, rejected = _split(prompt, chosen, rejected)
    for answer in (chosen, rejected):
        last = answer[-1]
        if not _plain(last.get("content")).strip() and not last.get("tool_calls"):
            raise UnusableRow(EMPTY_ANSWER)
    if any(answer[0]["role"] in ("user", "system") for answer in (chosen, rejected)):
        raise UnusableRow(PROMPTS_DIFFER)
    if any(message["role"] == "user" for answer in (chosen, rejected) for message in answer):
        raise UnusableRow(USERS_TURN)
    if not messages:
        raise UnusableRow(NO_PROMPT)
    for message in (*messages, *chosen, *rejected):
        if message.get("content") is None and not message.get("tool_calls"):
            raise UnusableRow(NO_CONTENT, f"role {message['role']!r}")
    turn_open = messages[-1]["role"] == "assistant"
    opening = render_messages(
        messages, tokenizer, add_generation_prompt=not turn_open, continue_final_message=turn_open, **keywords
    )
    sides = (_side(messages, answer, opening, tokenizer, keywords) for answer in (chosen, rejected))
    return tuple(text for side in sides for text in side)


def _side(
    prompt: Messages, answer: Messages, opening: str, tokenizer: Any, keywords: Mapping[str, Any]
) -> tuple[str, str]:
    """(prompt, answer) text. Templates may render a prompt otherwise once an answer follows; the answer decides."""
    whole = render_messages([*prompt, *answer], tokenizer, **keywords)
    if not _is_rendered(prompt, answer, whole, tokenizer, keywords):
        raise UnusableRow(LEFT_OUT, f"role {answer[-1]['role']!r}")
    if answer[0]["role"] != "assistant" and not whole.startswith(opening):
        # Roles of other names, gpt for instance: what follows the generation prompt would be learned as another turn.
        raise UnusableRow(OTHER_ROLE, f"role {answer[0]['role']!r}")
    split = 0
    while split < min(len(opening), len(whole)) and opening[split] == whole[split]:
        split += 1
    return whole[:split], whole[split:]


def _is_rendered(prompt: Messages, answer: Messages, whole: str, tokenizer: Any, keywords: Mapping[str, Any]) -> bool:
    """Whether `whole`, the conversation as rendered, shows what the last message of `answer` says or calls."""
    before, last = [*prompt, *answer[:-1]], answer[-1]
    if _plain(last.get("content")).strip():
        probe = PROBE if isinstance(last["content"], str) else _part(PROBE)
        return PROBE in render_messages([*before, {**last, "content": probe}], tokenizer, **keywords)
    try:
        return whole != render_messages([*before, {"role": last["role"], "content": ""}], tokenizer, **keywords)
    except UnusableRow:
        # A template that refuses a turn without content and calls has read the calls.
        return True


def render_messages(messages: Messages, tokenizer: Any, **keywords: Any) -> str:
    """What the chat template makes of `messages`, which :func:`read_messages` has read.

    Raises:
        UnusableRow: the template refuses them, or fails.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **keywords)
    except ImportError:
        raise
    except Exception as error:
        # The template's own refusal, or whatever its expressions raise, of any type.
        line = f" (line {error.lineno} of the template)" if getattr(error, "lineno", None) else ""
        raise UnusableRow(REFUSED, f"{error}{line}") from error


def _split(prompt: Any, chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """(prompt, chosen answer, rejected answer); answers hold a message at least."""
    messages = list(prompt) if isinstance(prompt, list) else []
    # Data sets repeat the prompt in the answers, or do not, or leave its system message out there.
    for repeated in (messages, messages[1:] if messages and messages[0]["role"] == "system" else []):
        chosen, rejected = (
            side[len(repeated) :] if side[: len(repeated)] == repeated else side for side in (chosen, rejected)
        )
    if not chosen or not rejected:
        raise UnusableRow(EMPTY_ANSWER)
    if isinstance(prompt, str) and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        messages = [{"role": "user", "content": prompt}]
    # The last message is the answer even where both sides give the same one.
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if messages:
        # With a prompt of its own, an answer may well begin like the other one; a user's turn answers nothing.
        while shared and chosen[shared - 1]["role"] not in ("user", "system"):
            shared -= 1
    # Or the answers alone have the system message, in front of the prompt.
    repeats = chosen[0]["role"] == "system" and shared > len(messages) and chosen[1 : 1 + len(messages)] == messages
    messages = [*([] if repeats else messages), *chosen[:shared]]
    if isinstance(prompt, str) and prompt and all(message["role"] == "system" for message in messages):
        messages = [*messages, {"role": "user", "content": prompt}]
    return messages, chosen[shared:], rejected[shared:]


def read_messages(messages: Any, tokenizer: Any) -> Messages:
    """`messages` as templates know them: content a string (or parts of text, for a template that takes them).

    A column of dictionaries holds None for the names that a row does not have, and templates ask whether a message has
    ``tool_calls``: names without a value are left out.

    Raises:
        ValueError: a message has no role, or its content is no text.
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
        out.append(read)
    return out


def without_none(value: Any) -> Any:
    """`value` without the names that hold None, in it and in what it is made of."""
    if isinstance(value, Mapping):
        return {name: without_none(part) for name, part in value.items() if part is not None}
    return [without_none(part) for part in value] if isinstance(value, list) else value


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
    # A template that knows strings only would write the list as Python does.
    return _part(*texts) if _takes_parts(tokenizer) else "".join(texts)


def _part(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _takes_parts(tokenizer: Any) -> bool:
    """Whether the chat template renders content that is a list of parts by their text."""
    try:
        text = render_messages([{"role": "user", "content": _part(PROBE)}], tokenizer)
    except UnusableRow:
        return False
    return PROBE in text and "'text'" not in text and '"text"' not in text


def _plain(content: Any) -> str:
    """The text of a message's content."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())
