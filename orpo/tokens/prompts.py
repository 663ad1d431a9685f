"""Prompts in training and in generation: rendered in the same way, and ending in front of the same token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orpo.tokens.special_tokens import token_ids

# One of the tokenizer's settings, so that it is saved with every model: in checkpoints, merged models, on the hub.
KEY = "orpo_prompts"
ESCAPE_KEY = "orpo_escape_special_tokens"
PLAIN, CHAT = "plain", "chat"


def remember_form(tokenizer: Any, data: Any, escape: bool = False) -> None:
    """Notes in `tokenizer`, and so with every saved model, whether the prompts of `data` are strings or chat turns.

    Args:
        data: pairs in any form of :mod:`orpo.data.forms.formats`; the first one decides. Of prepared pairs nothing is
            noted.
        escape: whether special tokens in their text stay text; noted too.
    """
    answer = first_row(data).get("chosen")
    if answer is not None and hasattr(tokenizer, "init_kwargs"):
        tokenizer.init_kwargs[KEY] = PLAIN if isinstance(answer, str) else CHAT
        tokenizer.init_kwargs.pop(ESCAPE_KEY, None)
        if escape:
            tokenizer.init_kwargs[ESCAPE_KEY] = True


def trained_plain(tokenizer: Any) -> bool:
    """Whether `tokenizer` belongs to a model that was trained on strings, without a chat template."""
    return getattr(tokenizer, "init_kwargs", {}).get(KEY) == PLAIN


def trained_escaped(tokenizer: Any) -> bool:
    """Whether `tokenizer` belongs to a model whose training kept special tokens in the text as text."""
    return bool(getattr(tokenizer, "init_kwargs", {}).get(ESCAPE_KEY))


def first_row(data: Any) -> Mapping[str, Any]:
    """The first row of a data set, a dict of lists or a list of dicts; empty where there is none."""
    if isinstance(data, Mapping):
        return {name: column[0] for name, column in data.items() if len(column)}
    return next(iter(data if data is not None else ()), {})


def prompt_tokens(text: str, tokenizer: Any, marks: str = "") -> list[int]:
    """Tokens of a prompt that stay the same before any answer, without special tokens around them.

    In training a prompt has the tokens that it shares with prompt and answer together. A space at its end mostly
    belongs to the answer's first word, and no model has seen a prompt that ends with the space alone. What `marks`
    enclose (:mod:`orpo.tokens.special_tokens`) does not become a special token.
    """
    ids = _ids(text, tokenizer, marks)
    if not text[-1:].isspace():
        return ids
    whole = _ids(text + "a", tokenizer, marks)
    shared = next((i for i, (one, other) in enumerate(zip(ids, whole, strict=False)) if one != other), len(ids))
    return ids[:shared]


def encoder_tokens(text: str, tokenizer: Any) -> list[int]:
    """Tokens of a prompt as an encoder reads it, with the special tokens that the tokenizer puts around a text."""
    return tokenizer([_characters(text)])["input_ids"][0]


def left_to_the_answer(text: str, tokenizer: Any, marks: str = "") -> str:
    """The end of a prompt that :func:`prompt_tokens` leaves out, as text."""
    return tokenizer.decode(_ids(text, tokenizer, marks)[len(prompt_tokens(text, tokenizer, marks)) :])


def boundary_note(data: Any, tokenizer: Any) -> str | None:
    """A warning where the first string prompt does not end where it seems to; or None."""
    row = first_row(data)
    prompt = row.get("prompt")
    # Only strings: for messages the chat template decides where a prompt ends.
    strings = isinstance(prompt, str) and isinstance(row.get("chosen"), str)
    if not strings or not left_to_the_answer(prompt, tokenizer):
        return None
    return (
        f"the first prompt ends in {prompt[len(prompt.rstrip()) :]!r}, whose last token goes to the answer's first "
        "word, as in TRL; orpo-generate does the same"
    )


def _ids(text: str, tokenizer: Any, marks: str = "") -> list[int]:
    return token_ids([_characters(text)], tokenizer, marks)[0]


def _characters(text: str) -> str:
    # A tokenizer raises on half a surrogate pair, which JSON can hold.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
