"""Sizes and checksums of a checkpoint's files: one that was cut or changed is known before it is loaded."""

from __future__ import annotations

import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from orpo.runs.non_finite import is_finite

CHUNK = 1 << 22
SMALL = 1 << 26
THREADS = min(8, os.cpu_count() or 1)


def describe_files(folder: Path, leave_out: str) -> dict[str, dict[str, Any]]:
    """``{path below folder: {"bytes": size, "crc32": checksum}}`` of all files in `folder` but `leave_out`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / leave_out)
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "crc32": checksum}
        for path, checksum in zip(paths, _checksums(paths), strict=True)
    }


def describes_files(value: Any) -> bool:
    """Whether `value`, read from a file, has the form that :func:`describe_files` gives."""
    return isinstance(value, dict) and all(
        isinstance(seen, dict) and isinstance(seen.get("bytes"), int) and "crc32" in seen for seen in value.values()
    )


def find_damage(folder: Path, files: dict[str, dict[str, Any]], contents: bool) -> str | None:
    """What `folder` has otherwise than :func:`describe_files` wrote, in words, or None.

    Args:
        folder: a checkpoint.
        files: what it held once.
        contents: read the files too, not only their sizes: a changed bit is found at the price of reading all.
    """
    for name, seen in files.items():
        path = folder / name
        if not path.is_file():
            return f"has lost {name}"
        if (size := path.stat().st_size) != seen["bytes"]:
            return f"has a {name} of {size:,} bytes, which was written with {seen['bytes']:,}"
    if not contents:
        return None
    checksums = _checksums([folder / name for name in files])
    changed = [name for (name, seen), now in zip(files.items(), checksums, strict=True) if now != seen["crc32"]]
    return f"has a {changed[0]} whose checksum is not that of what was written" if changed else None


def find_cut_file(folder: Path) -> str | None:
    """A file of weights or states in `folder` that is not as long as it says itself, in words, or None."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"has a {path.name} that cannot be read ({error})"
    # What torch saves is a zip archive, whose directory is its end.
    for path in sorted(folder.glob("*.pt*")):
        if path.is_file() and not zipfile.is_zipfile(path):
            return f"has a {path.name} that cannot be read (it is cut off)"
    return None


def find_bad_weights(folder: Path) -> str | None:
    """The first weight in the safetensors files of `folder` that is NaN or infinite, in words, or None."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if not is_finite(file.get_tensor(name)):
                    return f"has weights that are not finite ({name})"
    return None


def _checksums(paths: list[Path]) -> list[str]:
    if sum(path.stat().st_size for path in paths) < SMALL:
        return [_crc32(path) for path in paths]
    # zlib lets other threads run while it reads a chunk.
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_crc32, paths))


def _crc32(path: Path) -> str:
    value = 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"
