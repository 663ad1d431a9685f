"""JSON lines whose rows do not agree on what a column holds: read as they stand, so that one row's fault stays its own.

``datasets`` gives a column of text that holds anything else in one row to a type of JSON, which makes numbers of the
texts "4" and " 4"; where it has decided for text before, it puts quotes around the texts beside such a row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from orpo.data.files.file_check import OPENERS


def json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines.

    Raises:
        ValueError: a line holds no JSON, or no object.
    """
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} could not be read as json: line {number} is no JSON: {error.msg} in column {error.colno}"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} could not be read as json: line {number} is {line.strip()[:40]}, no JSON object")
        yield row


def is_json_lines(path: Path) -> bool:
    """Whether `path`, a file that ``datasets`` reads as JSON, holds an object a line, by its first."""
    if path.suffix.lower() not in (".jsonl", ".json", *OPENERS):
        return False
    first = next((line for _, line in _lines(path)), "")
    return first.lstrip().startswith("{") and first.strip() != "{"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line with something in it."""
    # A form feed ends no line, as it does in str.splitlines.
    with OPENERS.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def mixed_columns(files: Iterable[Path]) -> list[str]:
    """The columns that hold values of several kinds (text, numbers, true or false, lists, objects), at any depth.

    Args:
        files: of JSON lines. Those that break off in a line are left to their reader, which says so.
    """
    kinds: dict[tuple[str, ...], type] = {}
    mixed: set[str] = set()
    for file in files:
        try:
            for row in json_rows(file):
                for name, value in row.items():
                    if name not in mixed and _differs(value, (name,), kinds):
                        mixed.add(name)
        except ValueError:
            return []
    return sorted(mixed)


def _differs(value: Any, path: tuple[str, ...], kinds: dict[tuple[str, ...], type]) -> bool:
    """Whether `value` holds another kind somewhere than `kinds` knows of that place; fills in what is new there."""
    if value is None:
        return False
    kind = float if type(value) is int else type(value)
    if kinds.setdefault(path, kind) is not kind:
        return True
    if kind is list:
        return any([_differs(part, (*path, ""), kinds) for part in value])
    return kind is dict and any([_differs(part, (*path, name), kinds) for name, part in value.items()])


def encode_columns(path: Path, names: Iterable[str], copy: Path) -> None:
    """Copies a file of JSON lines with the columns `names` written as JSON, a text in every row."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    # Another rank may write the same one.
    part = copy.with_name(f"{copy.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as file:
        for row in json_rows(path):
            encoded = {name: json.dumps(row[name]) for name in names if row.get(name) is not None}
            file.write(json.dumps({**row, **encoded}) + "\n")
    part.replace(copy)


def decode_columns(data: Any, names: Iterable[str]) -> Any:
    """`data`, read of such a copy, with the values that its rows have in the columns `names`."""
    import datasets

    known = {name: datasets.Json() for name in names if name in data.features}
    return data.cast(datasets.Features({**data.features, **known}))


def as_json_columns(data: Any) -> Any:
    """Rows, a dict of lists or a list of dicts, whose columns hold values of several kinds, as a ``datasets.Dataset``.

    Raises:
        TypeError: a value is no JSON.
    """
    import datasets

    columns = dict(data) if isinstance(data, dict) else {}
    if not columns:
        names = dict.fromkeys(name for row in data for name in row)
        columns = {name: [row.get(name) for row in data] for name in names}
    encoded = {
        name: [None if value is None else json.dumps(value) for value in values] for name, values in columns.items()
    }
    return decode_columns(datasets.Dataset.from_dict(encoded), encoded)
