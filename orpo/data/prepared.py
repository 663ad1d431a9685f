"""Checks that a prepared data set was made with the run's tokenizer and limits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow.compute as pc

from orpo.tokens.limits import Limits
from orpo.tokens.pretokenized import checked

# Stands in the data set's description, which survives filters, slices and `save_to_disk`.
_MARK = "prepared by fused-orpo: "
_SIDES = ("chosen", "rejected")


def mark(prepared: Any, tokenizer: Any, limits: Limits, score_turns: str, summary: str) -> None:
    """Notes in `prepared`, a ``datasets.Dataset``, how it was made, for :func:`check_prepared` and :func:`summary_of`.

    Args:
        summary: what was kept and dropped, without the name of the set.
    """
    made = {"tokenizer": _digest(tokenizer), "max_length": limits.max_length, "score_turns": score_turns}
    made |= {"pairs": len(prepared), "summary": summary}
    prepared.info.description = _MARK + json.dumps(made)


def summary_of(data: Any) -> str | None:
    """What :func:`mark` noted was kept and dropped; None for a stream, and for rows that were selected afterwards."""
    made = _made(data) if hasattr(data, "__len__") else None
    return made.get("summary") if made and made.get("pairs") == len(data) else None


def check_prepared(
    data: Any,
    tokenizer: Any,
    limits: Limits,
    name: str,
    report: Callable[[str], None],
    *,
    joined: bool = True,
    score_turns: str = "all",
) -> Any:
    """Checks `data`, whose rows come as tokens (:func:`orpo.tokens.pretokenized.checked`), and cuts nothing.

    Args:
        joined: whether ``max_length`` limits prompt and answer together; False for an encoder-decoder.
        report: called with a sentence where the rows were cut to another ``max_length`` than that of `limits`, or score
            other turns than `score_turns`.

    Raises:
        ValueError: a sequence is longer than ``max_length``, or another tokenizer is known to have made the tokens.
    """
    import datasets

    data = checked(data, name)
    if isinstance(data, datasets.IterableDataset):
        return (
            data
            if limits.max_length is None or not joined
            else data.map(_Refusal(limits.max_length, name), batched=True)
        )
    made = _made(data)
    if made and made["tokenizer"] != _digest(tokenizer):
        raise ValueError(
            f"the rows of the {name} set come as tokens, which another tokenizer made (or this one with another chat "
            "template or other special tokens): give the rows of text again, or the tokenizer that they were made with"
        )
    if limits.max_length is not None and joined:
        sizes = [pc.list_value_length(data.with_format("arrow")[f"{side}_input_ids"][:]) for side in _SIDES]
        _refuse_longer(pc.max_element_wise(*sizes).to_pylist(), limits.max_length, name)
    if made and made["max_length"] != limits.max_length:
        report(
            f"{name}: the rows come as tokens, made with max_length {made['max_length']}, which is {limits.max_length} "
            "now: what was cut or left out then stays so"
        )
    if made and made.get("score_turns", score_turns) != score_turns:
        report(
            f"{name}: the rows come as tokens, made with score_turns {made['score_turns']}, which is {score_turns} "
            "now: what was scored then stays so; give the rows of text to change it"
        )
    return data


class _Refusal:
    """Refuses rows of a stream that are too long, when they are read."""

    def __init__(self, most: int, name: str) -> None:
        self.most, self.name = most, name

    def __call__(self, rows: Mapping[str, list[Any]]) -> Mapping[str, list[Any]]:
        both = zip(*(rows[f"{side}_input_ids"] for side in _SIDES), strict=True)
        _refuse_longer([max(map(len, pair)) for pair in both], self.most, self.name)
        return rows


def _refuse_longer(sizes: list[int], most: int, name: str) -> None:
    longer = [row for row, size in enumerate(sizes) if size > most]
    if longer:
        raise ValueError(
            f"{len(longer):,} of {len(sizes):,} rows of the {name} set come as more than max_length ({most:,}) tokens, "
            f"the first is row {longer[0]} with {sizes[longer[0]]:,}: give the rows of text, which are cut, leave "
            f"these out, or set max_length to {max(sizes)}, the longest"
        )


def _made(data: Any) -> dict[str, Any] | None:
    description = data.info.description or ""
    return json.loads(description.removeprefix(_MARK)) if description.startswith(_MARK) else None


def _digest(tokenizer: Any) -> str:
    """A digest of all in the tokenizer that decides which tokens a row becomes."""
    parts = (
        sorted(tokenizer.get_vocab().items()),
        tokenizer.special_tokens_map,
        getattr(tokenizer, "chat_template", None),
    )
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()
