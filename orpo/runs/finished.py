"""Knows a run that has ended, whose command has nothing left to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orpo.files import write_whole

# With an underscore in front, since Trainer does not upload such files to the hub.
FINISHED = "_orpo_finished.json"


def write_finished(folder: str | Path, described: Mapping[str, Any], step: int) -> None:
    """Notes that the run `described` ended at `step`, and which files are in `folder`, with the sizes of weights.

    It is the last file that a run writes.
    """
    folder = Path(folder)
    found = sorted(path for place in (folder, folder / "merged") for path in place.glob("*") if path.is_file())
    names = [path for path in found if not path.name.startswith(("_", "."))]
    files = {path.relative_to(folder).as_posix(): _size(path) for path in names}
    record = {"step": step, "run": _plain(described), "files": files}
    write_whole(folder / FINISHED, json.dumps(record, indent=1) + "\n")


def finished_at(folder: str | Path, described: Mapping[str, Any]) -> int | None:
    """The step at which the run `described` ended, if all files that it left in `folder` are there; else None."""
    folder = Path(folder)
    try:
        record = json.loads((folder / FINISHED).read_text("utf-8"))
        step, run, files = (record[name] for name in ("step", "run", "files"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        # An unreadable note counts as none: the run goes on from its checkpoints.
        return None
    if run != _plain(described):
        return None
    whole = all((folder / name).is_file() and _size(folder / name) == size for name, size in files.items())
    return step if whole else None


def forget_finished(folder: str | Path) -> None:
    """Removes the note of :func:`write_finished` from `folder`."""
    Path(folder, FINISHED).unlink(missing_ok=True)


def _size(path: Path) -> int | None:
    # Only weights: a user may edit the card.
    return path.stat().st_size if path.suffix == ".safetensors" else None


def _plain(described: Mapping[str, Any]) -> Any:
    # As it comes back from a JSON file, where enums and sets are text.
    return json.loads(
        json.dumps(described, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    )
