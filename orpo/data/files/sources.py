"""Where preference pairs come from: a local file, a local folder, or a data set of the hub."""

from __future__ import annotations

import glob
import hashlib
import logging
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from orpo.data.files.file_check import LINES_OF_A_STREAM, OPENERS, check_file
from orpo.data.files.kinds import READERS, reader_for, refuse_missing
from orpo.data.files.mixed_forms import (
    as_json_columns,
    decode_columns,
    encode_columns,
    is_json_lines,
    json_row,
    json_rows,
    mixed_columns,
)
from orpo.data.files.splits import NoSuchSplit, from_disk, is_saved, refuse_splits, which_splits
from orpo.hub import check_hub_name
from orpo.packages import require


def as_dataset(data: Any) -> Any:
    """`data` as a ``datasets.Dataset`` (or as the ``IterableDataset`` it is).

    Args:
        data: a Dataset, an IterableDataset, a dict of equally long lists, or a list of dicts.
    """
    import datasets
    import pyarrow as pa

    refuse_splits(data)
    if isinstance(data, datasets.Dataset) and data.format["type"] not in (None, "custom"):
        # Forms are known by strings and lists, which rows of numpy and pandas are not; a user's transform stays.
        data = data.with_format(None)
    if isinstance(data, (datasets.Dataset, datasets.IterableDataset)):
        return data
    try:
        if isinstance(data, Mapping):
            return datasets.Dataset.from_dict(dict(data))
        if isinstance(data, (list, tuple)):
            if wrong := [i for i, row in enumerate(data) if not isinstance(row, Mapping)]:
                kind = type(data[wrong[0]]).__name__
                raise ValueError(f"row {wrong[0]} of the list, counted from 0, is of type {kind}; a row is a dict")
            return datasets.Dataset.from_list(list(data))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        try:
            return as_json_columns(data)
        except (TypeError, ValueError):
            # A value is no JSON, or lists differ in length: the first error says more.
            raise ValueError(f"the rows make no table, each column of which holds one type only: {error}") from error
    raise ValueError(
        "a data set has to be a datasets.Dataset or IterableDataset, a dict of lists or a list of dicts, "
        f"not {type(data).__name__}"
    )


def load_pairs(name: str, split: str = "train", *, config: str | None = None, streaming: bool = False) -> Any:
    """One split of a data set.

    Args:
        name: a file (JSON lines, JSON, Parquet, CSV or Arrow, also compressed), a folder, or a name on the hub.
        split: the name of a split, or a part of it as ``datasets`` writes it: ``"train[:90%]"``, ``"train[200:]"``. A
            file has the one split "train".
        config: the configuration of a hub data set.
        streaming: read rows during training, not before.

    Raises:
        ImportError: a file is compressed with zstd, and zstandard is not installed.
        ValueError: there is no such file, it is empty, broken or of no kind that we read, or the hub cannot be reached.
        NoSuchSplit: there is no such split.
    """
    import datasets
    import pyarrow as pa

    path = Path(name).expanduser()
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(f"{name} is empty; it needs rows with prompt, chosen and rejected")
        reader = reader_for(path)
        if reader is None:
            raise ValueError(f"{name} is of no known kind; it has to end in {', '.join(READERS)}, compressed or not")
        # A file's name is no pattern, even with [0-2] in it.
        arguments: dict[str, Any] = {"path": reader, "data_files": glob.escape(str(path))}
    else:
        refuse_missing(name)
        check_hub_name(name, "dataset")
        if path.is_dir() and glob.has_magic(str(path.absolute())):
            raise ValueError(
                f"{name} is a folder whose path holds one of * ? [, and would be read as a pattern: rename it, or name "
                "a file in it"
            )
        arguments = {"path": str(path) if path.is_dir() else name, "name": config}
    if is_saved(path):
        return from_disk(path, split, streaming=streaming)
    _check_files(path, streaming)
    kind = arguments["path"] if path.is_file() else "a data set"
    if streaming and split == "train" and arguments["path"] == "json" and is_json_lines(path):
        # Read here, row by row: the reader of streams lets the first rows decide the types of later ones.
        deque(islice(json_rows(path), LINES_OF_A_STREAM), maxlen=0)
        return datasets.IterableDataset.from_generator(json_rows, gen_kwargs={"path": path})
    if path.exists() and not streaming:
        # The cache knows a file by its path and time alone: a run would train on the old rows of a file that is
        # replaced with its time kept, or within the clock's resolution.
        arguments["cache_dir"] = str(Path(datasets.config.HF_DATASETS_CACHE, _digest(path)))
    try:
        with _silent_reader():
            if path.is_dir() or arguments["path"] == "csv":
                builder = datasets.load_dataset_builder(**arguments)
                _tell_unread(path, builder)
                arguments |= _as_text(builder)
            encoded = [] if streaming else _encode_mixed(path, arguments)
            data = datasets.load_dataset(**arguments, split=split, streaming=streaming)
            if streaming and path.exists():
                # A stream finds a broken file only when it is read: read one row now.
                next(iter(data))
            return decode_columns(data, encoded) if encoded else data
    except (StopIteration, datasets.exceptions.DatasetGenerationError) as error:
        # The error itself says nothing; its cause does.
        reason = _broken_line(path) or error.__cause__ or "no row was found"
        raise ValueError(f"{name} could not be read as {kind}: {reason}") from error
    except (ValueError, pa.ArrowException) as error:
        if "corresponds to no data" in str(error):
            raise ValueError(
                f"{name} has no row in {split!r}: it is empty, or has too few rows for that part"
            ) from error
        if "split" in str(error).lower():
            raise NoSuchSplit(which_splits(name, split, str(error))) from error
        reason = _broken_line(path) or (error if path.exists() else None)
        if reason is None:
            raise
        raise ValueError(f"{name} could not be read as {kind}: {reason}") from error


def _check_files(path: Path, streaming: bool) -> None:
    """Calls :func:`orpo.data.files.file_check.check_file` for `path`, or the text files below it."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        reader = reader_for(file)
        if reader is None or not file.is_file():
            continue
        if file.suffix.lower() == ".zst":
            require("zstandard", f"{file}, compressed with zstd,")
        elif reader in ("json", "csv"):
            check_file(file, is_json=reader == "json", most_lines=LINES_OF_A_STREAM if streaming else None)


def _encode_mixed(path: Path, arguments: dict[str, Any]) -> list[str]:
    """The columns of JSON lines whose rows disagree on a type. `arguments` then read a copy of `path` in which these
    columns are text."""
    found = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
    files = [file for file in found if reader_for(file) == "json"]
    if not all(map(is_json_lines, files)) or (path.is_dir() and (path / "README.md").is_file()):
        # The copies would stand in for all files: one that is a list would be lost, and what a README.md says of files.
        return []
    names = mixed_columns(files)
    if names:
        folder = Path(arguments["cache_dir"], "encoded")
        copies = {file: folder / (file.relative_to(path) if path.is_dir() else file.name) for file in files}
        copies = {file: copy.with_suffix(".jsonl") for file, copy in copies.items()}
        for file, copy in copies.items():
            encode_columns(file, names, copy)
        if path.is_dir():
            arguments["path"] = str(folder)
        else:
            arguments["data_files"] = glob.escape(str(copies[path]))
    return names


def _tell_unread(folder: Path, builder: Any) -> None:
    """Warns of files in `folder` that are in no split: ``datasets`` takes files of one kind, and only train, test and
    validation where one has such a name. A README.md may say which files are meant."""
    if not folder.is_dir() or (folder / "README.md").is_file():
        return
    read = {Path(file).resolve() for split in (builder.config.data_files or {}).values() for file in split}
    names = ("dataset_info.json", "dataset_infos.json", "state.json")
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and reader_for(p) and p.name not in names]
    hidden = [p for p in files if any(part.startswith((".", "__")) for part in p.relative_to(folder).parts)]
    if left := [p for p in files if p.resolve() not in read and p not in hidden]:
        warnings.warn(
            f"{folder}: {len(left)} of {len(files) - len(hidden)} files are not read (first: "
            f"{left[0].relative_to(folder)}): of a folder, files of one kind are, and with one that is named train, "
            "test or validation only such names",
            stacklevel=4,
        )


def _as_text(builder: Any) -> dict[str, Any]:
    """Options by which the CSV reader takes every column as text; none for other readers.

    Otherwise it takes "NA", "None" and "null" for missing values, and the answer "007" for a number.
    """
    import pandas
    from datasets.exceptions import DatasetGenerationError
    from datasets.packaged_modules.csv.csv import CsvConfig

    if not isinstance(builder.config, CsvConfig):
        return {}
    files = (file for split in builder.config.data_files.values() for file in split)
    names: set[str] = set()
    try:
        for file in files:
            first = pandas.read_csv(file, nrows=1, dtype=str)
            if not isinstance(first.index, pandas.RangeIndex):
                # The reader takes surplus fields for row names, and shifts all others by one column.
                raise ValueError(
                    f"the first row of {Path(file).name} has more fields than its line of names; a text with a comma "
                    "has to stand in double quotes, and no comma ends a row"
                )
            header = pandas.read_csv(file, nrows=1, dtype=str, header=None, na_filter=False).iloc[0]
            if twice := [name for name, count in Counter(header).items() if name and count > 1]:
                # The reader would rename the second one, and the wrong one may be meant.
                raise ValueError(f"{Path(file).name} has more than one column named {twice[0]!r}: rename or remove one")
            names.update(first.columns)
    except ValueError as error:
        raise DatasetGenerationError from error
    return {"converters": dict.fromkeys(sorted(names), str), "na_filter": False}


def _digest(path: Path) -> str:
    """A digest of a file's content, or of the names and content of a folder's files that hold rows."""
    digest = hashlib.blake2b(digest_size=16)
    for part in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and reader_for(p)):
        with part.open("rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
        digest.update(str(part.relative_to(path)).encode() + b"\0" + content)
    return digest.hexdigest()


@contextmanager
def _silent_reader() -> Iterator[None]:
    """Silences the line that the JSON reader logs before it raises the same error."""
    logger = logging.getLogger("datasets.packaged_modules.json.json")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _broken_line(path: Path) -> str | None:
    """The first fault in a file of JSON lines, with its line from 1; None for a sound file and for other files."""
    opened = {".jsonl": open, ".json": open, **OPENERS}.get(path.suffix.lower())
    if opened is None or not path.is_file() or reader_for(path) != "json":
        return None
    with opened(path, "rt", encoding="utf-8-sig", errors="replace") as file:
        return _first_broken(file)


def _first_broken(lines: Iterable[str]) -> str | None:
    for number, line in enumerate(lines, 1):
        if number == 1 and (line.startswith("[") or line.strip() == "{"):
            # The file is one value over many lines, not JSON lines.
            return None
        if not line.strip():
            continue
        try:
            json_row(number, line)
        except ValueError as error:
            return str(error)
    return None
