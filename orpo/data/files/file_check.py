"""Checks local files before they are read: the readers' own errors say less, and some end the process."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orpo.files import not_utf8

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}

# Arrow stores some 60 levels. Its reader recurses for each one: thousands end the process (signal 11).
MOST_LEVELS = 50

# A stream's file may be of any size: only its first lines are checked.
LINES_OF_A_STREAM = 10_000

_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"')


def check_file(path: Path, *, is_json: bool, most_lines: int | None = None) -> None:
    """Refuses a text file that does not unpack, is not UTF-8, or holds JSON nested too deep.

    Args:
        path: the file, compressed as its name says.
        is_json: look at the nesting too.
        most_lines: how many lines are looked at. Default: all.

    Raises:
        ValueError: with the file, the line and what to do.
    """
    try:
        with OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith(b"["):
                    # The file is one list, whose reader counts levels itself.
                    is_json = False
                _check_line(path, number, line, is_json)
                if number == most_lines:
                    return
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path} could not be unpacked: {error}") from error
    except OSError as error:
        # An error with a number comes from the file system, not from the unpacker.
        if error.errno is not None:
            raise
        raise ValueError(f"{path} could not be unpacked: {error}") from error


def _check_line(path: Path, number: int, line: bytes, is_json: bool) -> None:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} {not_utf8(number, error)}") from error
    if is_json and line.count(b"[") + line.count(b"{") > MOST_LEVELS and (levels := _levels(line)) > MOST_LEVELS:
        raise ValueError(
            f"{path}: line {number} is nested {levels:,} levels deep, and {MOST_LEVELS} are read; a row needs prompt, "
            "chosen and rejected, leave out the rest"
        )


def _levels(line: bytes) -> int:
    """How deep brackets and braces are nested, outside of strings."""
    most = level = 0
    for byte in re.findall(rb"[][{}]", _STRINGS.sub(b"", line)):
        level += 1 if byte in b"[{" else -1
        most = max(most, level)
    return most
