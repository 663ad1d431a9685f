"""Which tokens of a sequence count: masks made of spans of text, cut along with it, absent where nobody needs one."""

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
    """What is tokenized of each side: its prompt, prompt and answer, and these up to where spans begin and end."""
    sides = ((text.chosen_prompt, text.chosen), (text.rejected_prompt, text.rejected))
    return [
        [prompt, prompt + answer, *((prompt + answer)[:at] for span in spans or () for at in span[:2])]
        for (prompt, answer), spans in zip(sides, text.turns, strict=True)
    ]


def token_mask(turns: Turns | None, cuts: list[list[int]], whole: list[int], side: Side) -> list[int]:
    """What each token of `side` counts for; empty where `turns` is None, and all of the answer counts.

    Args:
        turns: spans in its text.
        cuts: for each span, the tokens of the text up to where it begins and up to where it ends.
        whole: the tokens of all its text, which may lack an EOS at the end.
    """
    if turns is None:
        return []
    length = sum(map(len, side))
    mask = [0] * length
    for (_, _, value), begin, end in zip(turns, cuts[::2], cuts[1::2], strict=True):
        # As a prompt's end is found: a merge over the boundary belongs to what follows.
        stop = length if end == whole else shared(end, whole)
        # Generation marks may enclose what the prompt ends with already.
        start = max(shared(begin, whole), len(side[0]) if value == SCORED else 0)
        for at in range(start, stop):
            mask[at] = value
    return mask


def cut_masks(
    masks: list[list[int]], before: list[Side], after: list[Side], limits: Limits, bos_token_id: int | None
) -> list[list[int]]:
    """`masks` of both sides, cut as these were `before` to what they are `after`.

    Raises:
        UnusableRow: nothing that is scored is left.
    """
    return [_cut(*side, limits, bos_token_id) for side in zip(masks, before, after, strict=True)]


def _cut(mask: list[int], before: Side, after: Side, limits: Limits, bos_token_id: int | None) -> list[int]:
    (prompt, _), (kept, answer) = before, after
    if not mask:
        return mask
    places = [*range(len(prompt))]
    if len(kept) < len(prompt):
        # The same cut, of places: 0 is that of BOS.
        places = limits.cut_prompt(places, 0 if prompt[0] == bos_token_id else None)
    cut = [*(mask[at] for at in places), *mask[len(prompt) : len(prompt) + len(answer)]]
    if SCORED not in cut[1:]:
        raise UnusableRow(NOTHING_SCORED)
    return cut


def features(account: Mapping[str, str]) -> Any:
    """The types of the prepared columns and of `account`: those that the first rows leave empty cannot be guessed."""
    from datasets import Features, List, Value

    whole = Value("int64")
    tokens = {name: whole if name.endswith("length") else List(whole) for name in COLUMNS}
    masks = dict.fromkeys(MASKS, List(Value("int8")))
    return Features({**tokens, **masks, "pair_id": whole, "length": whole, **{n: Value(t) for n, t in account.items()}})


def empty_masks(data: Any) -> list[str]:
    """The columns of masks in which no row of a ``datasets.Dataset`` has one."""
    import pyarrow.compute as pc

    return [name for name in MASKS if not pc.max(pc.list_value_length(data.data.column(name))).as_py()]


def without_empty_masks(
    tokenize: Callable[[Mapping[str, list[Any]], list[int]], Columns], rows: Mapping[str, list[Any]], indices: list[int]
) -> Columns:
    """What `tokenize` makes of a batch of a stream, without masks where none of its rows has one."""
    out = tokenize(rows, indices)
    return {name: column for name, column in out.items() if name not in MASKS or any(column)}
