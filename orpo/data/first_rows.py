"""The first rows of a data set, looked at before it is trained on: in which form they come, and what is odd of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from orpo.data.columns import describe_forms, read_row, renamed
from orpo.data.formats import AS_THEY_ARE, IMPLIED, implies_prompt, skips_template, unread_columns
from orpo.data.repeats import ROWS, repeats_prompt
from orpo.data.sources import as_dataset
from orpo.data.tools import unread_tools
from orpo.tokens.pretokenized import COLUMNS
from orpo.tokens.prompts import first_row


def read_first(data: Any, tokenizer: Any, columns: Mapping[str, str] | None = None) -> Mapping[str, Any]:
    """The first row of `data` in one of our forms; of prepared data as it is, and empty where there is none."""
    if data is None:
        return {}
    row = first_row(data if isinstance(data, Mapping | list | tuple) else as_dataset(data))
    return row if not row or set(COLUMNS) <= row.keys() else _read(row, 0, tokenizer, columns)


def _read(row: Mapping[str, Any], number: int, tokenizer: Any, columns: Mapping[str, str] | None) -> Mapping[str, Any]:
    try:
        return read_row(row, tokenizer, columns)
    except ValueError as error:
        error.add_note(f"in row {number}, counted from 0")
        raise


def report_first_rows(
    data: Any, tokenizer: Any, columns: Mapping[str, str] | None, report: Callable[[str], None]
) -> None:
    """Reports what the first rows show of a data set that trains, but perhaps not as it was meant.

    Args:
        data: a ``datasets.Dataset`` or ``IterableDataset``, not prepared.
        tokenizer: of the model.
        columns: our name -> the column's, of columns that have other names.
        report: called with each sentence.

    Raises:
        ValueError: one of the rows has no place among the texts that are trained.
    """
    given = list(islice(data, ROWS))
    rows = [_read(row, i, tokenizer, columns) for i, row in enumerate(given)]
    first = rows[0] if rows else {}
    said = (
        describe_forms(renamed(given[0], columns)) if given else None,
        AS_THEY_ARE if skips_template(first, tokenizer) else None,
        IMPLIED if implies_prompt(first) else None,
        repeats_prompt(rows),
        unread_columns(first),
        unread_tools(first.get("tools"), tokenizer),
    )
    for sentence in filter(None, said):
        report(sentence)
