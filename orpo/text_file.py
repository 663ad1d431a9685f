"""Text files that people write: read as UTF-8, and refused with the line where they are something else."""

from __future__ import annotations

from pathlib import Path


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
