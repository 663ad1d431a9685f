"""Conversations as text: which messages are the prompt, and what the chat template makes of prompt and answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from orpo.data.forms.messages import (
    OTHERS,
    PROBE,
    Messages,
    is_conversation,
    plain,
    probed,
    read_messages,
    render_messages,
)
from orpo.data.forms.tools import calls_as_taken
from orpo.data.forms.turns import Turns, opened, scored_turns, shared
from orpo.data.forms.unusable import (
    EMPTY_ANSWER,
    ENDS_OTHERWISE,
    LEFT_OUT,
    NO_CONTENT,
    NO_PROMPT,
    OTHER_ROLE,
    PROMPTS_DIFFER,
    UnusableRow,
)


class SideText(NamedTuple):
    """One side of a pair as text. `turns` are the spans that count; None where all of the answer does."""

    prompt: str
    answer: str
    turns: Turns | None


def conversation_text(
    prompt: Any, chosen: Any, rejected: Any, tokenizer: Any, keywords: Mapping[str, Any], score_turns: str = "all"
) -> tuple[SideText, SideText]:
    """The chosen and the rejected side as `tokenizer`'s chat template renders them.

    Args:
        prompt: messages, a string that is the user's turn, or None where both answers begin with the prompt.
        chosen, rejected: messages.
        tokenizer: a tokenizer with a chat template.
        keywords: for the template.
        score_turns: which turns of the assistant count, "all" in an answer or its "last".

    Raises:
        UnusableRow: the row lacks a prompt or an answer, or the template refuses it.
        ValueError: what is given is not messages of text.
    """
    chosen, rejected = read_messages(chosen, tokenizer), read_messages(rejected, tokenizer)
    if is_conversation(prompt):
        prompt = read_messages(prompt, tokenizer)
    elif prompt is not None and not isinstance(prompt, str):
        raise ValueError(
            f"'prompt' has to be a string or a list of messages, not {type(prompt).__name__}: {prompt!r:.80}"
        )
    messages, *answers = _split(prompt, chosen, rejected)
    for answer in answers:
        if not plain(answer[-1].get("content")).strip() and not answer[-1].get("tool_calls"):
            raise UnusableRow(EMPTY_ANSWER)
    if any(answer[0]["role"] in ("user", "system") for answer in answers):
        raise UnusableRow(PROMPTS_DIFFER)
    for role in (answer[-1]["role"] for answer in answers):
        if role in OTHERS:
            raise UnusableRow(ENDS_OTHERWISE, f"role {role!r}")
    if not messages:
        raise UnusableRow(NO_PROMPT)
    for message in (*messages, *answers[0], *answers[1]):
        if message.get("content") is None and not message.get("tool_calls"):
            raise UnusableRow(NO_CONTENT, f"role {message['role']!r}")
    longest = max(answers, key=lambda answer: sum("tool_calls" in message for message in answer))
    as_taken = calls_as_taken([*messages, *longest], tokenizer, keywords)
    messages, *answers = map(as_taken, (messages, *answers))
    # The two answers may need prompts that end differently: a tool's result does not follow the generation prompt.
    openings: dict[bool, str] = {}
    sides = []
    for answer in answers:
        answers_itself = answer[0]["role"] not in OTHERS
        if answers_itself not in openings:
            turn_open = answers_itself and messages[-1]["role"] == "assistant"
            options = {"add_generation_prompt": answers_itself and not turn_open, "continue_final_message": turn_open}
            openings[answers_itself] = render_messages(messages, tokenizer, **options, **keywords)
        sides.append(_side(messages, answer, openings[answers_itself], tokenizer, keywords, score_turns))
    return tuple(sides)


def _side(
    prompt: Messages, answer: Messages, opening: str, tokenizer: Any, keywords: Mapping[str, Any], score_turns: str
) -> SideText:
    """One side as text. Where a template renders the prompt otherwise before an answer, that rendering holds."""
    messages = [*prompt, *answer]
    whole = render_messages(messages, tokenizer, **keywords)
    for k in range(len(prompt), len(messages)):
        if not _is_rendered(messages, k, whole, tokenizer, keywords):
            raise UnusableRow(LEFT_OUT, f"role {messages[k]['role']!r}")
    if answer[0]["role"] != "assistant" and not whole.startswith(opening):
        # A role such as gpt would be rendered as a turn of its own, after the generation prompt.
        raise UnusableRow(OTHER_ROLE, f"role {answer[0]['role']!r}")
    split = opened(opening, whole, messages, len(prompt), tokenizer, keywords)
    turns = scored_turns(messages, len(prompt), whole, opening, tokenizer, keywords, score_turns)
    return SideText(whole[:split], whole[split:], turns)


def _is_rendered(messages: Messages, k: int, whole: str, tokenizer: Any, keywords: Mapping[str, Any]) -> bool:
    """Whether `whole`, the conversation as rendered, shows what message `k` says and calls."""
    message = messages[k]

    def changed(to: dict[str, Any]) -> str:
        return render_messages([*messages[:k], to, *messages[k + 1 :]], tokenizer, **keywords)

    if plain(message.get("content")).strip() and PROBE not in changed(probed(message)):
        return False
    if not message.get("tool_calls"):
        return True
    silent = {"content": "", **{name: part for name, part in message.items() if name != "tool_calls"}}
    try:
        return whole != changed(silent)
    except UnusableRow:
        # A template that refuses a turn without its calls, or a result without its call, has read the calls.
        return True


def _split(prompt: Any, chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """(prompt, chosen answer, rejected answer); each answer has at least one message."""
    messages = list(prompt) if isinstance(prompt, list) else []
    # Answers may repeat the prompt, with or without its system message.
    for repeated in (messages, messages[1:] if messages and messages[0]["role"] == "system" else []):
        chosen, rejected = (
            side[len(repeated) :] if _begins_with(side, repeated) else side for side in (chosen, rejected)
        )
    if not chosen or not rejected:
        raise UnusableRow(EMPTY_ANSWER)
    if isinstance(prompt, str) and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        messages = [{"role": "user", "content": prompt}]
    # The last message is the answer, even if both sides have the same one.
    alike = min(shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if messages:
        # The row has a prompt, so that turns which both answers share may be answer. A user's turn is not.
        while alike and chosen[alike - 1]["role"] not in ("user", "system"):
            alike -= 1
    # Only the answers may have the system message, before the prompt that they repeat.
    repeats = chosen[0]["role"] == "system" and alike > len(messages) and _begins_with(chosen[1:], messages)
    messages = [*([] if repeats else messages), *chosen[:alike]]
    if isinstance(prompt, str) and prompt and all(message["role"] == "system" for message in messages):
        messages = [*messages, {"role": "user", "content": prompt}]
    return messages, chosen[alike:], rejected[alike:]


def _begins_with(side: Messages, messages: Messages) -> bool:
    """Whether `side` begins with what `messages` say. What either leaves out, both leave out from then on."""
    pairs = [*zip(side, messages, strict=False)]
    if len(pairs) < len(messages) or any({**one, "train": 0} != {**other, "train": 0} for one, other in pairs):
        return False
    for one, other in pairs:
        if False in (one.get("train"), other.get("train")):
            one["train"] = other["train"] = False
    return True
