"""The splits of a data set: the error for a missing one, and splits saved in a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class NoSuchSplit(ValueError):
    """A data set without the split that was asked for."""


def refuse_splits(data: Any) -> None:
    """Refuses a dict of data sets, such as a ``DatasetDict``, where one is wanted.

    Raises:
        ValueError: with the splits that there are.
    """
    import datasets

    kinds = (datasets.Dataset, datasets.IterableDataset)
    if isinstance(data, Mapping) and any(isinstance(part, kinds) for part in data.values()):
        sizes = [
            f"{name!r} ({len(part):,} rows)" if hasattr(part, "__len__") else repr(name) for name, part in data.items()
        ]
        raise ValueError(
            f"one data set is wanted, and a dict of {len(data)} is given, the splits {', '.join(sizes)}: give one of "
            f"them, data[{next(iter(data))!r}]"
        )


def which_splits(name: str, split: str, error: str) -> str:
    """The error where `name` has no `split`, with the splits that the `error` of ``datasets`` names."""
    found = re.search(r"[Ss]hould be one of (\[.*?\])", error)
    splits = re.findall(r"'([^']+)'", found[1]) if found else []
    if not splits:
        return f"{name} has no split {split!r}: {error}"
    like = [part for part in splits if part.startswith(re.split(r"[^a-z]", split)[0])] or splits
    return (
        f"{name} has no split {split!r}; it has {', '.join(map(repr, splits))}: --dataset_train_split says which is "
        f"trained on, --dataset_test_split which is held out (here perhaps {like[0]!r})"
    )


def is_saved(path: Path) -> bool:
    """Whether `path` is a folder that ``save_to_disk`` wrote, of one data set or of several splits."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def from_disk(path: Path, split: str, *, streaming: bool) -> Any:
    """A split, or a part of one, from a folder that ``save_to_disk`` wrote; a single data set is the split "train".

    ``load_dataset`` would take the folders' names for patterns, and read train_sft and train_prefs as one split.

    Raises:
        NoSuchSplit: there is no such split.
        ValueError: the part is empty.
    """
    import datasets

    saved = datasets.load_from_disk(str(path))
    parts = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    wanted = datasets.ReadInstruction.from_spec(split)
    try:
        places = wanted.to_absolute({name: len(part) for name, part in parts.items()})
    except ValueError as error:
        raise NoSuchSplit(which_splits(str(path), split, str(error))) from error
    data = datasets.concatenate_datasets([parts[at.splitname].select(range(at.from_, at.to)) for at in places])
    if not len(data):
        raise ValueError(f"{path} has no row in {split!r}: it is empty, or has too few rows for that part")
    return data.to_iterable_dataset() if streaming else data
