"""Finds the assistant's turns in the text of an answer that also holds turns of others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from orpo.data.forms.messages import OTHERS, PROBE, Messages, apply_template, plain, probed, render_messages
from orpo.data.forms.unusable import NOTHING_SCORED, TURNS_CHANGE, UnusableRow

SCORE_TURNS = ("all", "last")
# A span is scored by both terms, or by neither. Other text is scored only by an NLL that scores the prompt.
SCORED, LEFT_OUT = 1, -1
# (start, end, SCORED or LEFT_OUT), in characters of prompt and answer together.
Turns = tuple[tuple[int, int, int], ...]

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def scored_turns(
    messages: Messages, first: int, whole: str, opening: str, tokenizer: Any, keywords: Mapping[str, Any], which: str
) -> Turns | None:
    """The spans of `whole` that are scored or left out; None where all after `opening` is scored.

    They are read off a template's generation marks; without marks, turn after turn is rendered.

    Args:
        messages: prompt and answer.
        first: how many of them are the prompt.
        whole: what the template makes of them.
        opening: what it makes of the prompt.
        keywords: for the template.
        which: "all", every turn of the assistant in the answer, or "last". A message with ``train`` False is left
            out; of another speaker's, what it says.

    Raises:
        UnusableRow: nothing is scored, or the template changes a turn when others follow.
    """
    own = [k for k, message in enumerate(messages) if message["role"] not in OTHERS]
    silent = [k for k, m in enumerate(messages) if m["role"] in OTHERS and not plain(m.get("content")).strip()]
    left_out = [k for k, message in enumerate(messages) if message.get("train") is False and k not in silent]
    if first + 1 == len(messages) and not left_out:
        return None
    scored = [k for k in own if k >= first and k not in left_out and (which == "all" or k + 1 == len(messages))]
    if not scored:
        raise UnusableRow(NOTHING_SCORED)
    marked = _marked(messages, tokenizer, keywords)
    found = dict(zip(own, marked, strict=True)) if len(marked) == len(own) else {}
    if first + 1 == len(messages):
        # Of an answer of one turn all is scored, whatever is left out before it.
        found.pop(first, None)
    spans: list[tuple[int, int, int]] = []
    for k in sorted({*scored, *left_out}):
        if messages[k]["role"] in OTHERS:
            span = _said(messages, k, whole, tokenizer, keywords)
        else:
            span = found.get(k) or _rendered(messages, k, whole, opening if k == first else None, tokenizer, keywords)
        if span is None or span[0] >= span[1] or (spans and span[0] < spans[-1][1]):
            hint = "" if k + 1 == len(messages) or k in left_out else ", which score_turns last does not need"
            raise UnusableRow(TURNS_CHANGE, f"message {k + 1} of {len(messages)}{hint}")
        spans.append((*span, LEFT_OUT if k in left_out else SCORED))
    return tuple(spans)


def _marked(messages: Messages, tokenizer: Any, keywords: Mapping[str, Any]) -> list[Any]:
    """The spans that the template encloses in its generation marks; none where it has no marks."""
    template = keywords.get("chat_template") or tokenizer.chat_template
    if isinstance(template, Mapping):
        template = tokenizer.get_chat_template(tools=keywords.get("tools"))
    if not _MARKER.search(template) or not getattr(tokenizer, "is_fast", False):
        return []
    out = apply_template(
        messages,
        tokenizer,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
        **keywords,
    )
    spans = []
    for kept, tokens in groupby(zip(out["assistant_masks"], out["offset_mapping"], strict=True), lambda pair: pair[0]):
        offsets = [offset for _, offset in tokens]
        spans += [(offsets[0][0], offsets[-1][1])] if kept else []
    return spans


def _said(
    messages: Messages, k: int, whole: str, tokenizer: Any, keywords: Mapping[str, Any]
) -> tuple[int, int] | None:
    """(start, end) in `whole` of what message `k`, which is another's, says; or None. Its frame is the template's."""
    changed = render_messages([*messages[:k], probed(messages[k]), *messages[k + 1 :]], tokenizer, **keywords)
    before, found, after = changed.partition(PROBE)
    stands = found and PROBE not in after and whole.startswith(before) and whole.endswith(after)
    return (len(before), len(whole) - len(after)) if stands else None


def _rendered(
    messages: Messages, k: int, whole: str, opening: str | None, tokenizer: Any, keywords: Mapping[str, Any]
) -> tuple[int, int] | None:
    """(start, end) of turn `k` in `whole`, found by rendering the turns up to it; or None."""

    def render(*turns: dict[str, Any], **options: Any) -> str:
        return render_messages(list(turns), tokenizer, **options, **keywords) if turns else ""

    before = messages[:k]
    opening = render(*before, add_generation_prompt=True) if opening is None else opening
    start = opened(opening, whole, messages, k, tokenizer, keywords)
    if start < len(opening) and not whole.startswith(render(*before)):
        return None
    if k + 1 == len(messages):
        return start, len(whole)
    shown = render(*messages[: k + 1])
    if whole.startswith(shown):
        return start, len(shown)
    # A last turn may have a frame, such as empty thoughts, that it loses when others follow. Its own words have to
    # stay: a turn trained without its thoughts is not what the model says in use.
    most = min(len(shown), len(whole) - start)
    length = next((n for n in range(most, 0, -1) if shown.endswith(whole[start : start + n])), 0)
    framed = render(*before, _alone(messages[k]))
    frame = framed[shared(opening, framed) : framed.find(PROBE)]
    is_whole = length and shown[shared(opening, shown) : len(shown) - length] == frame
    return (start, start + length) if is_whole else None


def opened(opening: str, whole: str, messages: Messages, k: int, tokenizer: Any, keywords: Mapping[str, Any]) -> int:
    """How many characters of `whole` come before message `k`; `opening` is what the template writes before it."""
    start = shared(opening, whole)
    if start == len(opening):
        return start
    # The opening may end with "<think>", which the turn itself lacks; comparing characters fails if it begins with "<".
    framed = render_messages([*messages[:k], _alone(messages[k])], tokenizer, **keywords)
    return min(start, shared(opening, framed))


def _alone(message: dict[str, Any]) -> dict[str, Any]:
    """`message` with a probe in place of its content and calls."""
    return {"role": message["role"], "content": probed(message)["content"]}


def shared(one: Any, other: Any) -> int:
    """How many characters, or tokens, `one` and `other` share at their start."""
    least = min(len(one), len(other))
    return next((at for at in range(least) if one[at] != other[at]), least)
