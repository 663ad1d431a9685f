"""The forms of preference data, each reduced to a prompt and an answer as text for either side.

* Strings: ``prompt``, ``chosen``, ``rejected``, taken as they are.
* Conversations: ``chosen`` and ``rejected`` are lists of ``{"role", "content"}``, rendered with the tokenizer's chat
  template. The prompt is the ``prompt`` list, or a ``prompt`` string where the answers hold the assistant's turn alone,
  or else the messages that both begin with (in UltraFeedback-binarized ``prompt`` repeats the first of these).
* Dialogues (HH-RLHF): ``chosen`` and ``rejected`` strings without a ``prompt``, split after the last
  ``"\\n\\nAssistant:"``.
* Other strings without a ``prompt``: it is what both begin with, without a space before the difference, as in TRL.

:mod:`orpo.data.forms.columns` turns forms of other projects into these.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from orpo.data.forms.columns import OPENAI
from orpo.data.forms.conversations import conversation_text
from orpo.data.forms.images import refuse_images
from orpo.data.forms.messages import is_conversation, without_none
from orpo.data.forms.misread import refuse_dates, refuse_messages_as_text
from orpo.data.forms.tools import read_tools, refuse_tools
from orpo.data.forms.turns import Turns
from orpo.data.forms.unusable import (
    ASSISTANT,
    EMPTY_ANSWER,
    MISSING,
    NO_PROMPT,
    PROMPTS_DIFFER,
    UNMARKED,
    FileFault,
    UnusableRow,
)

AS_THEY_ARE = (
    "the prompts are strings, trained as they are although the tokenizer has a chat template: an instruct model wants "
    "conversations; orpo-generate answers prompts without the template too, unless told otherwise (--chat_template)"
)

IMPLIED = (
    "there is no column 'prompt': the prompt is what both answers begin with, as in TRL; a prompt in a column of "
    "another name is read with --columns prompt=NAME"
)


def skips_template(row: Mapping[str, Any], tokenizer: Any) -> bool:
    """Whether the pair in `row` is joined from strings although `tokenizer` has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None)) and all(
        isinstance(row.get(name), str) for name in ("prompt", "chosen", "rejected")
    )


class PairText(NamedTuple):
    """Text of one pair. The prompts may differ: a chat template may render one prompt in two ways.

    `turns` are the spans of each side's prompt and answer that count; None where all of the answer does.
    """

    chosen_prompt: str
    chosen: str
    rejected_prompt: str
    rejected: str
    templated: bool
    turns: tuple[Turns | None, Turns | None] = (None, None)


def check_columns(names: Collection[str]) -> None:
    """Refuses columns that hold no pairs.

    Raises:
        FileFault: the message says what they hold, and how to make pairs of it.
    """
    if {"chosen", "rejected"} <= set(names) or set(OPENAI) <= set(names):
        return
    what = f"a data set needs the columns 'chosen' and 'rejected'; this one has {sorted(names)}"
    if {"completion", "label"} <= set(names):
        raise FileFault(
            f"{what}: answers marked good or bad one by one, as KTO trains on. ORPO compares two answers to one "
            "prompt: --pair_by_prompt true makes pairs of the prompts that have both"
        )
    if {"completion", "messages", "conversations", "text"} & set(names):
        raise FileFault(
            f"{what}: one text a row, as fine-tuning (SFT) trains on. ORPO compares two answers to one prompt: "
            "take the one there is as 'chosen', and add a worse one as 'rejected', a model's own for instance "
            "(orpo-generate)"
        )
    raise FileFault(
        f"{what}: rename its columns, or say which they are (--columns "
        "chosen=good,rejected=bad); 'prompt' is needed too where the answers do not begin with it"
    )


def unread_columns(row: Mapping[str, Any]) -> str | None:
    """A warning of columns that sound like a part of the prompt and are not read; or None."""
    candidates = ("system", "system_prompt", "instruction", "input", "history")
    names = [name for name in candidates if isinstance(value := row.get(name), str | list | Mapping) and value]
    if not names:
        return None
    return (
        f"the columns {', '.join(names)} are not read: a prompt is what 'prompt' holds, or the messages that both "
        "answers begin with; a system message is read of a column 'system' (--columns system=NAME), tools of 'tools'"
    )


def pair_text(row: Mapping[str, Any], tokenizer: Any, score_turns: str = "all") -> PairText:
    """The texts of one row in a form above. :func:`orpo.data.forms.columns.read_row` brings others into one.

    A row's ``tools`` and ``chat_template_kwargs`` go to the chat template, as in TRL.

    Args:
        row: with the columns of one of the forms.
        tokenizer: whose chat template renders conversations.
        score_turns: "all" or "last", which turns of the assistant count in an answer of several.

    Raises:
        UnusableRow: the row has a form above and cannot train; :mod:`orpo.data.forms.unusable` has the reasons.
        FileFault: the file was misread (:mod:`orpo.data.forms.misread`), or has no such columns.
        ValueError: the row has none of the forms above, or an image.
    """
    refuse_images(row)
    check_columns(row.keys())
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    refuse_dates([prompt, chosen, rejected, row.get("tools"), row.get("chat_template_kwargs")])
    refuse_messages_as_text(prompt, chosen, rejected)
    if chosen is None or rejected is None:
        raise UnusableRow(MISSING, f"{'chosen' if chosen is None else 'rejected'!r} is null")
    if [] in (chosen, rejected):
        # A list of answers without any, or messages without one.
        raise UnusableRow(EMPTY_ANSWER)
    if is_conversation(chosen) and is_conversation(rejected):
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(
                "the data set holds conversations, and the tokenizer has no chat template to render them with: "
                "set tokenizer.chat_template (--chat_template), or give prompt, chosen and rejected as strings"
            )
        keywords = _keywords(row.get("chat_template_kwargs") or {}, row.get("tools"))
        sides = conversation_text(prompt, chosen, rejected, tokenizer, keywords, score_turns)
        texts = (part for side in sides for part in (side.prompt, side.answer))
        return PairText(*texts, templated=True, turns=tuple(side.turns for side in sides))
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        kinds = f"{type(chosen).__name__} and {type(rejected).__name__}"
        raise ValueError(f"'chosen' and 'rejected' have to be two strings or two lists of messages, not {kinds}")
    refuse_tools(row.get("tools"))
    if prompt is None:
        return _without_prompt(chosen, rejected, "prompt" in row)
    if not isinstance(prompt, str):
        raise ValueError(f"'prompt' has to be a string where the answers are strings, not {type(prompt).__name__}")
    _refuse_empty(chosen, rejected)
    return PairText(prompt, chosen, prompt, rejected, templated=False)


def _keywords(given: Any, tools: Any) -> dict[str, Any]:
    """The chat template's keywords in a row."""
    if not isinstance(given, Mapping):
        raise ValueError(f"'chat_template_kwargs' has to be a dictionary, not {type(given).__name__}")
    # A column of dictionaries holds None for the names that a row does not have.
    keywords = without_none(given)
    own = {"conversation", "tokenize", "add_generation_prompt", "continue_final_message"} & keywords.keys()
    if own:
        raise ValueError(f"'chat_template_kwargs' sets {', '.join(sorted(own))}, which is set here: leave it out")
    schemas = read_tools(tools)
    if schemas and keywords.get("tools"):
        raise ValueError("a row has tools in its column 'tools' and in 'chat_template_kwargs': leave one out")
    # None, not an empty list, for which some templates write an empty list of tools.
    schemas = schemas or read_tools(keywords.pop("tools", None))
    return {**keywords, "tools": schemas} if schemas else keywords


def _refuse_empty(*answers: str) -> None:
    if not all(answer.strip() for answer in answers):
        raise UnusableRow(EMPTY_ANSWER)


def implies_prompt(row: Mapping[str, Any]) -> bool:
    """Whether the prompt of `row` is what its two strings begin with, and no marker ends it."""
    sides = (row.get("chosen"), row.get("rejected"))
    return "prompt" not in row and not any(not isinstance(text, str) or ASSISTANT in text for text in sides)


def _without_prompt(chosen: str, rejected: str, has_column: bool) -> PairText:
    """The pair in two strings that both begin with the prompt."""
    _refuse_empty(chosen, rejected)
    marked = [text for text in (chosen, rejected) if ASSISTANT in text]
    if len(marked) == 2:
        splits = [len(text.rpartition(ASSISTANT)[0]) + len(ASSISTANT) for text in marked]
    elif has_column:
        raise UnusableRow(MISSING, "'prompt' is null")
    elif marked:
        other = rejected if marked == [chosen] else chosen
        raise UnusableRow(UNMARKED, f"there is no column 'prompt', and nothing to split {other[:80]!r} after")
    else:
        splits = [_shared(chosen, rejected)] * 2
    prompts, answers = zip(*((t[:at], t[at:]) for t, at in zip((chosen, rejected), splits, strict=True)), strict=True)
    if prompts[0] != prompts[1]:
        raise UnusableRow(PROMPTS_DIFFER)
    if not prompts[0].strip():
        raise UnusableRow(
            NO_PROMPT,
            f"there is no column 'prompt', and {chosen[:40]!r} and {rejected[:40]!r} begin with nothing alike",
        )
    _refuse_empty(*answers)
    return PairText(prompts[0], answers[0], prompts[1], answers[1], templated=False)


def _shared(chosen: str, rejected: str) -> int:
    """How many characters both strings share at their start: the prompt."""
    least = min(len(chosen), len(rejected))
    shared = next((at for at in range(least) if chosen[at] != rejected[at]), least)
    if shared == least:
        # One string would be all prompt: its last character is left as an answer.
        return shared - 1
    # A space belongs to the word behind it, as in most vocabularies.
    return shared - chosen[:shared].endswith(" ")
