"""The forms in which preference data comes, each reduced to one prompt and answer text per side.

* Strings: ``prompt``, ``chosen``, ``rejected``, taken as they are.
* Conversations: ``chosen`` and ``rejected`` are lists of ``{"role", "content"}``, rendered with the tokenizer's chat
  template. The prompt is the ``prompt`` list, or a ``prompt`` string where the answers hold the assistant's turn alone,
  or else the messages that both begin with (as in UltraFeedback-binarized, whose ``prompt`` repeats the first of them).
* Dialogues (HH-RLHF): ``chosen`` and ``rejected`` strings without a ``prompt``, split after the last
  ``"\\n\\nAssistant:"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orpo.images import refuse_images

ASSISTANT = "\n\nAssistant:"

EMPTY_ANSWER = "empty answer"
PROMPTS_DIFFER = "pair whose prompts differ"


AS_THEY_ARE = (
    "the prompts are strings, trained as they are although the tokenizer has a chat template: an instruct model wants "
    "conversations; orpo-generate answers prompts without the template too, unless told otherwise (--chat_template)"
)


def skips_template(row: Mapping[str, Any], tokenizer: Any) -> bool:
    """Whether the pair in `row` is joined from strings although `tokenizer` has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None)) and all(
        isinstance(row.get(name), str) for name in ("prompt", "chosen", "rejected")
    )


class UnusableRow(Exception):
    """A row that cannot train; the message is the reason under which it is counted."""


class PairText(NamedTuple):
    """Text of one pair. The prompts differ where a chat template renders the same messages in two ways."""

    chosen_prompt: str
    chosen: str
    rejected_prompt: str
    rejected: str
    templated: bool


def pair_text(row: Mapping[str, Any], tokenizer: Any) -> PairText:
    """The texts of one row of a data set, whatever its form.

    A row's ``chat_template_kwargs`` go to the chat template, as in TRL.

    Raises:
        UnusableRow: an answer is empty, or the two dialogues do not share their prompt.
        ValueError: the row has none of the forms above, or an image.
    """
    refuse_images(row)
    for side in ("chosen", "rejected"):
        if side not in row:
            raise ValueError(
                "a data set needs the columns 'chosen' and 'rejected', and 'prompt' where they are no whole dialogues; "
                f"this one has {sorted(row)}: rename its columns"
            )
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if chosen is None or rejected is None:
        raise UnusableRow(EMPTY_ANSWER)
    if _is_conversation(chosen) and _is_conversation(rejected):
        # A column of dictionaries holds None for the names that a row does not have.
        keywords = row.get("chat_template_kwargs") or {}
        if not isinstance(keywords, Mapping):
            raise ValueError(f"'chat_template_kwargs' has to be a mapping, not {type(keywords).__name__}")
        given = {name: v for name, v in keywords.items() if v is not None}
        return _conversation(prompt, list(chosen), list(rejected), tokenizer, given)
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        kinds = f"{type(chosen).__name__} and {type(rejected).__name__}"
        raise ValueError(f"'chosen' and 'rejected' have to be two strings or two lists of messages, not {kinds}")
    if prompt is None:
        return _dialogue(chosen, rejected)
    if not isinstance(prompt, str):
        raise ValueError(f"'prompt' has to be a string where the answers are strings, not {type(prompt).__name__}")
    _refuse_empty(chosen, rejected)
    return PairText(prompt, chosen, prompt, rejected, templated=False)


def _refuse_empty(*answers: str) -> None:
    if not all(answer.strip() for answer in answers):
        raise UnusableRow(EMPTY_ANSWER)


def _dialogue(chosen: str, rejected: str) -> PairText:
    splits = []
    for text in (chosen, rejected):
        head, marker, answer = text.rpartition(ASSISTANT)
        if not marker:
            raise ValueError(
                f"without a 'prompt' column the dialogues are split after the last {ASSISTANT!r}, "
                f"which this text does not hold: {text[:80]!r}"
            )
        splits.append((head + marker, answer))
    (chosen_prompt, chosen_answer), (rejected_prompt, rejected_answer) = splits
    if chosen_prompt != rejected_prompt:
        raise UnusableRow(PROMPTS_DIFFER)
    _refuse_empty(chosen_answer, rejected_answer)
    return PairText(chosen_prompt, chosen_answer, rejected_prompt, rejected_answer, templated=False)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(m, Mapping) for m in value)


def _conversation(
    prompt: Any, chosen: list[Any], rejected: list[Any], tokenizer: Any, keywords: Mapping[str, Any]
) -> PairText:
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "the data set holds conversations, and the tokenizer has no chat template to render them with: "
            "set tokenizer.chat_template (--chat_template), or give prompt, chosen and rejected as strings"
        )
    for message in (*chosen, *rejected, *(prompt if _is_conversation(prompt) else ())):
        if not isinstance(message.get("role"), str):
            raise ValueError(f"a message holds {sorted(message)}; it needs 'role' and 'content': rename its keys")
    if not chosen or not rejected:
        raise UnusableRow(EMPTY_ANSWER)
    if _is_conversation(prompt) and prompt:
        messages = list(prompt)
        if chosen[: len(messages)] == messages and rejected[: len(messages)] == messages:
            chosen, rejected = chosen[len(messages) :], rejected[len(messages) :]
    elif isinstance(prompt, str) and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        messages = [{"role": "user", "content": prompt}]
    else:
        # The last message is the answer even where both sides give the same one.
        shared = 0
        while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
            shared += 1
        messages, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    for answer in (chosen, rejected):
        _refuse_empty("".join(str(m.get("content") or "") for m in answer))
    try:
        sides = [_render(messages, answer, tokenizer, keywords) for answer in (chosen, rejected)]
    except ImportError:
        raise
    except Exception as error:
        # Also what the template's own expressions raise, of any type.
        line = f" (line {error.lineno} of the template)" if getattr(error, "lineno", None) else ""
        turns = [message.get("role") for message in messages + chosen]
        raise ValueError(f"the chat template cannot render turns of {turns}: {error}{line}") from error
    return PairText(*(text for side in sides for text in side), templated=True)


def _render(prompt: list[Any], answer: list[Any], tokenizer: Any, keywords: Mapping[str, Any]) -> tuple[str, str]:
    """(prompt, answer) text. Templates may render a prompt otherwise once an answer follows; the answer decides."""
    whole = tokenizer.apply_chat_template(prompt + answer, tokenize=False, **keywords)
    if not prompt:
        return "", whole
    turn_open = prompt[-1]["role"] == "assistant"
    opening = tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=not turn_open, continue_final_message=turn_open, **keywords
    )
    split = 0
    while split < min(len(opening), len(whole)) and opening[split] == whole[split]:
        split += 1
    return whole[:split], whole[split:]
