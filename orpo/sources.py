"""Where preference pairs come from: a local file, a local folder, or a data set of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")


def reader_for(path: str | Path) -> str | None:
    """The ``datasets`` reader for a file of this name ("pairs.jsonl.gz" -> "json"), or None."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    return READERS.get(suffixes[-1]) if suffixes else None


def load_pairs(name: str, split: str = "train", *, config: str | None = None, streaming: bool = False) -> Any:
    """One split of a data set.

    Args:
        name: a file (JSON lines, JSON, Parquet, CSV or Arrow, also compressed), a folder, or a name on the hub.
        split: the name of a split, or a part of it as ``datasets`` writes it: ``"train[:90%]"``, ``"train[200:]"``. A
            file has the one split "train".
        config: the configuration of a hub data set.
        streaming: read it as it is trained on, rather than beforehand.

    Raises:
        ValueError: there is no such file, it is empty, broken or of no kind that we read, or there is no such split.
    """
    import datasets

    path = Path(name).expanduser()
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(f"{name} is empty; it needs rows with prompt, chosen and rejected")
        reader = reader_for(path)
        if reader is None:
            raise ValueError(f"{name} is of no known kind; it has to end in {', '.join(READERS)}, compressed or not")
        arguments: dict[str, Any] = {"path": reader, "data_files": str(path)}
    elif (name.startswith((".", "/", "~")) or reader_for(name) is not None) and not path.exists():
        raise ValueError(f"there is no file or folder {name}")
    else:
        arguments = {"path": str(path) if path.is_dir() else name, "name": config}
    try:
        return datasets.load_dataset(**arguments, split=split, streaming=streaming)
    except (StopIteration, datasets.exceptions.DatasetGenerationError) as error:
        # What went wrong in the file is the cause, behind a sentence that says nothing.
        reason = error.__cause__ or "no row was found"
        raise ValueError(f"{name} could not be read as {arguments['path']}: {reason}") from error
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise ValueError(
                f"{name} has no row in {split!r}: it is empty, or has too few rows for that part"
            ) from error
        if "split" not in str(error).lower():
            raise
        raise ValueError(f"{name} has no split {split!r}: {error}") from error
