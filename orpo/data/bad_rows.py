"""Malformed rows: how one is described, and how many of them a run accepts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from orpo.data.forms.conversations import is_conversation

# So many rows are described where there are too many.
SHOWN = 3

# A stream is judged after so many rows: the share among fewer says nothing.
LEAST_ROWS = 1000

_KINDS = ((str, "text"), (bool, "true or false"), (int | float, "a number"), (Mapping, "an object"))


def what_it_holds(row: Mapping[str, Any]) -> str:
    """Names the columns of `row`, and the kind of value in each."""
    return f"it holds {', '.join(f'{name}: {_kind(value)}' for name, value in row.items())}"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            return "an empty list"
        return "messages" if is_conversation(value) else f"a list that begins with {_kind(value[0])}"
    return next((words for kind, words in _KINDS if isinstance(value, kind)), type(value).__name__)


def refuse_bad_rows(name: str, bad: int, rows: int, most: float, first: Sequence[str]) -> None:
    """Refuses a data set with too many bad rows.

    Args:
        name: what the error calls the data set.
        bad: how many rows are bad.
        rows: how many were looked at.
        most: the largest share that a run accepts, ``max_bad_rows``.
        first: descriptions of the first bad rows.

    Raises:
        ValueError: the share is larger; the message has it and `first`.
    """
    if bad <= most * rows:
        return
    share = f"{100 * bad / rows:.3g} %"
    which = "".join(f"\n  {said}" for said in first[:SHOWN])
    more = f"\n  and {bad - len(first[:SHOWN]):,} more" if bad > len(first[:SHOWN]) else ""
    raise ValueError(
        f"{name}: {bad:,} of {rows:,} rows cannot be read ({share}; max_bad_rows allows {100 * most:.3g} %), counted "
        f"from 0:{which}{more}\nmend these rows, or leave them out: --max_bad_rows {math.ceil(100 * bad / rows) / 100}"
    )
