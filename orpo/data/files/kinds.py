"""Tells by a file's name which reader reads it, and whether it is missing."""

from __future__ import annotations

from pathlib import Path

from orpo.data.files.file_check import OPENERS

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
COMPRESSIONS = (*OPENERS, ".zst")


def reader_for(path: str | Path) -> str | None:
    """The ``datasets`` reader for a file of this name ("pairs.jsonl.gz" -> "json"), or None."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return READERS.get(suffixes[-1]) if suffixes else None


def refuse_missing(name: str) -> None:
    """Refuses a file or folder that is not there. Other names may be on the hub.

    Raises:
        ValueError: `name` looks like a path or a file of pairs, and there is none.
    """
    if (name.startswith((".", "/", "~")) or reader_for(name) is not None) and not Path(name).expanduser().exists():
        raise ValueError(f"there is no file or folder {name}")
