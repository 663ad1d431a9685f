"""Reads JSON lines whose rows disagree on a column's type, so that one odd row does not change the others.

Where one row of a text column holds something else, ``datasets`` types the column as JSON and turns the texts "4" and
" 4" into numbers; where it has decided for text already, it puts quotes around the texts beside such a row.
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
            yield json_row(number, line)
        except ValueError as error:
            raise ValueError(f"{path} could not be read as json: {error}") from error


def json_row(number: int, line: str) -> dict[str, Any]:
    """The row in line `number`.

    Raises:
        ValueError: it holds no JSON, or no object.
    """
    try:
        row = json.loads(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is no JSON: {error.msg} in column {error.colno}") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is {line.strip()[:40]}, no JSON object")
    return row


def is_json_lines(path: Path) -> bool:
    """Whether the first line of `path`, a JSON file to ``datasets``, is an object by itself."""
    if path.suffix.lower() not in (".jsonl", ".json", *OPENERS):
        return False
    first = next((line for _, line in _lines(path)), "")
    return first.lstrip().startswith("{") and first.strip() != "{"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line that is not blank."""
    # Not str.splitlines: it also ends a line at a form feed.
    with OPENERS.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def mixed_columns(files: Iterable[Path]) -> list[str]:
    """The columns that hold values of several kinds (text, numbers, true or false, lists, objects), at any depth.

    Args:
        files: of JSON lines. A broken one is left to its reader, which refuses it.
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
    """Whether `value` disagrees with `kinds`, place -> kind, anywhere. Adds the places that are new."""
    if value is None:
        return False
    kind = float if type(value) is int else type(value)
    if kinds.setdefault(path, kind) is not kind:
        return True
    if kind is list:
        return any([_differs(part, (*path, ""), kinds) for part in value])
    return kind is dict and any([_differs(part, (*path, name), kinds) for name, part in value.items()])


def encode_columns(path: Path, names: Iterable[str], copy: Path) -> None:
    """Copies a file of JSON lines; each value in the columns `names` becomes its JSON text."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    # Another rank may write the same copy: each writes a file of its own, and moves it.
    part = copy.with_name(f"{copy.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as file:
        for row in json_rows(path):
            encoded = {name: json.dumps(row[name]) for name in names if row.get(name) is not None}
            file.write(json.dumps({**row, **encoded}) + "\n")
    part.replace(copy)


def decode_columns(data: Any, names: Iterable[str]) -> Any:
    """`data`, read from a copy by :func:`encode_columns`, with the values themselves in the columns `names`."""
    import datasets

    known = {name: datasets.Json() for name in names if name in data.features}
    return data.cast(datasets.Features({**data.features, **known}))


def as_json_columns(data: Any) -> Any:
    """A ``datasets.Dataset`` of a dict of lists or a list of dicts whose columns hold values of several kinds.

    Raises:
        TypeError: a value cannot be written as JSON.
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
