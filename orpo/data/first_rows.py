"""Looks at the first rows of a data set before training: their form, and what is odd about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from orpo.data.bad_rows import refuse_bad_rows
from orpo.data.files.sources import as_dataset
from orpo.data.files.splits import refuse_splits
from orpo.data.forms.columns import describe_forms, each_pair, read_row, renamed
from orpo.data.forms.formats import AS_THEY_ARE, IMPLIED, implies_prompt, skips_template, unread_columns
from orpo.data.forms.tools import unread_tools
from orpo.data.forms.unusable import BAD, FileFault
from orpo.data.labelled import is_labelled
from orpo.data.ratings import describe_ratings
from orpo.data.repeats import ROWS, repeats_prompt
from orpo.tokens.pretokenized import COLUMNS

Row = Mapping[str, Any]


def read_first(data: Any, tokenizer: Any, columns: Mapping[str, str] | None = None) -> Row:
    """The first row of `data` in one of our forms; a prepared row as it is; empty where there is none."""
    if data is None:
        return {}
    refuse_splits(data)
    if isinstance(data, Mapping):
        rows = [dict(zip(data, values, strict=True)) for values in islice(zip(*data.values(), strict=False), ROWS)]
    else:
        # Making a table of a whole list would take long for its first rows.
        rows = list(islice(data if isinstance(data, list | tuple) else as_dataset(data), ROWS))
    if not rows or set(COLUMNS) <= rows[0].keys():
        return rows[0] if rows else {}
    return next((row for _, row in _readable(rows, tokenizer, columns)), {})


def _readable(rows: Iterable[Row], tokenizer: Any, columns: Mapping[str, str] | None) -> Iterator[tuple[Row, Row]]:
    """For each readable row, its first pair: (the row by our names, the row in one of our forms)."""
    for number, row in enumerate(rows):
        try:
            given = each_pair(renamed(row, columns))[0]
            if is_labelled(given):
                # These rows are paired later; either answer shows the form.
                given = {**given, "chosen": given["completion"], "rejected": given["completion"]}
            yield given, read_row(given, tokenizer)
        except FileFault as error:
            error.add_note(f"in row {number}, counted from 0")
            raise
        except ValueError:
            # Tokenizing will count this row with its reason.
            continue


def report_first_rows(
    data: Any, tokenizer: Any, columns: Mapping[str, str] | None, report: Callable[[str], None]
) -> None:
    """Reports what in the first rows suggests that the data will not be trained as it was meant.

    Args:
        data: a ``datasets.Dataset`` or ``IterableDataset``, not prepared.
        tokenizer: of the model.
        columns: our name -> the column's, of columns that have other names.
        report: called with each sentence.
    """
    read = list(_readable(islice(data, ROWS), tokenizer, columns))
    if not read:
        return
    (given, first), rows = read[0], [row for _, row in read]
    said = (
        describe_forms(given),
        AS_THEY_ARE if skips_template(first, tokenizer) else None,
        IMPLIED if implies_prompt(first) else None,
        repeats_prompt(rows),
        unread_columns(first),
        describe_ratings(data, given),
        unread_tools(first.get("tools"), tokenizer),
    )
    for sentence in filter(None, said):
        report(sentence)


def check_first_rows(
    tokenize: Callable[[dict[str, list[Any]], list[int]], dict[str, list[Any]]],
    data: Any,
    names: Sequence[str],
    name: str,
    max_bad_rows: float,
) -> None:
    """Refuses a data set if none of its first rows can be read, before all of it is tokenized."""
    said: list[str] = []
    for number, row in enumerate(islice(data, ROWS)):
        made = tokenize({column: [row.get(column)] for column in names}, [number])
        if any(reason not in BAD for reason in made["dropped"]):
            return
        said.append(f"row {number}: {made['dropped'][0]}: {made['detail'][0]}")
    refuse_bad_rows(f"{name}, the first rows", len(said), max(len(said), 1), max_bad_rows, said)
