"""Text files: read as UTF-8 or refused with the line, written whole or not at all; and JSON of any text."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_text(path: str | Path) -> str:
    """The text of the file `path`, without a byte order mark.

    Raises:
        ValueError: it is not UTF-8; the message names the line.
    """
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} {not_utf8(line, error)}") from error


def not_utf8(line: int, error: UnicodeDecodeError) -> str:
    """What to say of a file whose line `line` could not be decoded."""
    byte = error.object[error.start]
    return (
        f"is not UTF-8: line {line} has the byte 0x{byte:02x}; save it as UTF-8, for example with iconv -f latin1 -t "
        "utf-8 (or -f cp1252, -f utf-16, as it was written)"
    )


def as_json(value: Any, **options: Any) -> str:
    """`value` as JSON, its letters as they are but for half a surrogate pair, which UTF-8 has no bytes for: escaped.

    Args:
        options: of ``json.dumps``.
    """
    text = json.dumps(value, ensure_ascii=False, **options)
    return "".join(f"\\u{ord(c):04x}" if "\ud800" <= c <= "\udfff" else c for c in text) if _has_halves(text) else text


def _has_halves(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def write_whole(path: str | Path, text: str) -> None:
    """Writes `text` to `path` in UTF-8; where that fails, what was there before is still there, and whole."""
    if Path(path).exists() and not Path(path).is_file():
        # A pipe or a terminal.
        Path(path).write_text(text, encoding="utf-8")
        return
    # Through a link, to the file that it names.
    path = Path(os.path.realpath(path))
    part = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        if path.exists():
            part.chmod(path.stat().st_mode)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
