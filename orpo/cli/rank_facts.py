"""What a rank sees of a run's model and data, in short texts that ranks compare."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, cached_file

from orpo.hub import hub_options
from orpo.model.adapters import adapter_folder, naming_base_of, read_config
from orpo.model.load import check_model

Facts = dict[str, str]

# Files of a model's folder that decide what it computes.
WEIGHTS = (".safetensors", ".bin")
SETTINGS = (".json", ".txt", ".model", ".jinja", ".py")
# Of a file of weights so many pieces of so many bytes are read, with its size: all of it would take minutes.
PIECES, PIECE = 64, 1 << 16
# So many rows of a data set.
ROWS = 64


def model_facts(name: str, **options: Any) -> Facts:
    """The files of the model `name`, of an adapter and its base model, each with its size and a digest.

    Args:
        name: a folder, or a name on the hub, of which the commit is given: it stands for the files.
        options: of ``from_pretrained``.

    Raises:
        ImportError, ValueError: there is none, or it cannot be loaded.
    """
    folder = adapter_folder(name, **options)
    if folder is None:
        return _of_model(name, **options)
    config = read_config(folder)
    with naming_base_of(folder):
        base = _of_model(config.base_model_name_or_path, **{**options, "revision": config.revision})
    return {**_of_folder(folder), **{f"{file} of the base model": fact for file, fact in base.items()}}


def data_facts(label: str, name: str, data: Any) -> Facts:
    """How many rows `data` has, a digest of some of them, and the size of the file or files that it is read from.

    Args:
        label: what the facts call it.
        name: where it comes from: a file, a folder, or a name on the hub.
        data: a ``datasets.Dataset`` or ``IterableDataset``, of which the first rows are read.
    """
    path = Path(name).expanduser()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else []
    facts = {f"file {file.name} of the {label}": f"{file.stat().st_size:,} bytes" for file in files}
    if hasattr(data, "__len__"):
        facts[f"number of rows in the {label}"] = f"{len(data):,}"
        rows = [data[i] for i in range(0, len(data), max(len(data) // ROWS, 1))]
    else:
        rows = list(islice(data, ROWS))
    facts[f"content of the {label}"] = _digest(json.dumps(rows, default=str).encode())
    return facts


def differences(ranks: Sequence[Facts]) -> list[str]:
    """In words, which of the `ranks` lacks a fact that another has, or has another than most of them."""
    said = []
    for name in dict.fromkeys(name for facts in ranks for name in facts):
        having = [rank for rank, facts in enumerate(ranks) if name in facts]
        said += [f"rank {rank} lacks {name}" for rank in range(len(ranks)) if rank not in having]
        # Of as many, the one that comes first, with rank 0.
        usual = Counter(ranks[rank][name] for rank in having).most_common(1)[0][0]
        first = next(rank for rank in having if ranks[rank][name] == usual)
        said += [
            f"rank {rank} has another {name} than rank {first} ({ranks[rank][name]}, not {usual})"
            for rank in having
            if ranks[rank][name] != usual
        ]
    return said


def _of_model(name: str, **options: Any) -> Facts:
    # Its errors say what is wrong with a name.
    check_model(name, **options)
    if Path(name).is_dir():
        return _of_folder(Path(name))
    return {"commit on the hub": Path(cached_file(name, CONFIG_NAME, **hub_options(options))).parent.name}


def _of_folder(folder: Path) -> Facts:
    files = [path for path in sorted(folder.iterdir()) if path.suffix in WEIGHTS + SETTINGS and path.is_file()]
    return {path.name: f"{path.stat().st_size:,} bytes, {_digest_file(path)}" for path in files}


def _digest_file(path: Path) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        if size <= PIECES * PIECE:
            digest.update(file.read())
        else:
            for piece in range(PIECES):
                file.seek(piece * (size - PIECE) // (PIECES - 1))
                digest.update(file.read(PIECE))
    return digest.hexdigest()[:12]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
