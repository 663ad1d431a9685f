"""What the first rows show of a data set that trains, but perhaps not as it was meant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from orpo.data.formats import AS_THEY_ARE, IMPLIED, implies_prompt, skips_template, unread_columns
from orpo.data.repeats import ROWS, repeats_prompt


def first_rows_say(data: Iterable[Mapping[str, Any]], tokenizer: Any) -> Iterator[str]:
    """A sentence for each thing that a user should know of the first rows of `data`."""
    rows = list(islice(data, ROWS))
    first = rows[0] if rows else {}
    if skips_template(first, tokenizer):
        yield AS_THEY_ARE
    if implies_prompt(first):
        yield IMPLIED
    yield from filter(None, (repeats_prompt(rows), unread_columns(first)))
