"""Masks of the tokens that count: made from spans of text, cut with the tokens, left out where no row needs one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from orpo.data.forms.formats import PairText
from orpo.data.forms.turns import SCORED, Turns, shared
from orpo.data.forms.unusable import NOTHING_SCORED, UnusableRow
from orpo.tokens.limits import Limits
from orpo.tokens.pretokenized import COLUMNS, MASKS

Columns = dict[str, list[Any]]
# (prompt, answer), tokens.
Side = tuple[list[int], list[int]]


def texts_of(text: PairText) -> list[list[str]]:
    """For each side the texts to tokenize: prompt, prompt and answer, and the text up to each span's start and end."""
    sides = ((text.chosen_prompt, text.chosen), (text.rejected_prompt, text.rejected))
    return [
        [prompt, prompt + answer, *((prompt + answer)[:at] for span in spans or () for at in span[:2])]
        for (prompt, answer), spans in zip(sides, text.turns, strict=True)
    ]


def token_mask(turns: Turns | None, cuts: list[list[int]], whole: list[int], side: Side) -> list[int]:
    """What each token of `side` counts for; empty where `turns` is None, since all of the answer counts then.

    Args:
        turns: spans in the side's text.
        cuts: for each span, the tokens of the text up to its start, and those up to its end.
        whole: the tokens of all the text, perhaps without the EOS at the end.
    """
    if turns is None:
        return []
    length = sum(map(len, side))
    mask = [0] * length
    for (_, _, value), begin, end in zip(turns, cuts[::2], cuts[1::2], strict=True):
        # As at a prompt's end, a token over the boundary belongs to what follows.
        stop = length if end == whole else shared(end, whole)
        # Generation marks may enclose the end of the prompt too.
        start = max(shared(begin, whole), len(side[0]) if value == SCORED else 0)
        for at in range(start, stop):
            mask[at] = value
    return mask


def cut_masks(
    masks: list[list[int]], before: list[Side], after: list[Side], limits: Limits, bos_token_id: int | None
) -> list[list[int]]:
    """`masks` of both sides, cut as the sides were cut, `before` to `after`.

    Raises:
        UnusableRow: no scored token is left.
    """
    return [_cut(*side, limits, bos_token_id) for side in zip(masks, before, after, strict=True)]


def _cut(mask: list[int], before: Side, after: Side, limits: Limits, bos_token_id: int | None) -> list[int]:
    (prompt, _), (kept, answer) = before, after
    if not mask:
        return mask
    places = [*range(len(prompt))]
    if len(kept) < len(prompt):
        # The prompt's cut, made on places in place of tokens; BOS has place 0.
        places = limits.cut_prompt(places, 0 if prompt[0] == bos_token_id else None)
    cut = [*(mask[at] for at in places), *mask[len(prompt) : len(prompt) + len(answer)]]
    if SCORED not in cut[1:]:
        raise UnusableRow(NOTHING_SCORED)
    return cut


def features(account: Mapping[str, str]) -> Any:
    """The types of the prepared columns and of `account`. ``datasets`` cannot guess that of a column of empty lists."""
    from datasets import Features, List, Value

    whole = Value("int64")
    tokens = {name: whole if name.endswith("length") else List(whole) for name in COLUMNS}
    masks = dict.fromkeys(MASKS, List(Value("int8")))
    return Features({**tokens, **masks, "pair_id": whole, "length": whole, **{n: Value(t) for n, t in account.items()}})


def empty_masks(data: Any) -> list[str]:
    """The mask columns of a ``datasets.Dataset`` that are empty in every row."""
    import pyarrow.compute as pc

    return [name for name in MASKS if not pc.max(pc.list_value_length(data.data.column(name))).as_py()]


def without_empty_masks(
    tokenize: Callable[[Mapping[str, list[Any]], list[int]], Columns], rows: Mapping[str, list[Any]], indices: list[int]
) -> Columns:
    """`tokenize` for a batch of a stream, without mask columns that are empty in every row of the batch."""
    out = tokenize(rows, indices)
    return {name: column for name, column in out.items() if name not in MASKS or any(column)}
