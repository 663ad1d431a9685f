"""A run that has come to its end, known again: the same command would only write what is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orpo.files import write_whole

# Begins with an underscore, since Trainer leaves such names out of what it uploads to the hub.
FINISHED = "_orpo_finished.json"


def write_finished(folder: str | Path, described: Mapping[str, Any], step: int) -> None:
    """Notes that the run `described` ended at `step`, and which files it leaves in `folder`; of weights, their sizes.

    It is the last file that a run writes.
    """
    folder = Path(folder)
    found = sorted(path for place in (folder, folder / "merged") for path in place.glob("*") if path.is_file())
    names = [path for path in found if not path.name.startswith(("_", "."))]
    files = {path.relative_to(folder).as_posix(): _size(path) for path in names}
    record = {"step": step, "run": _plain(described), "files": files}
    write_whole(folder / FINISHED, json.dumps(record, indent=1) + "\n")


def finished_at(folder: str | Path, described: Mapping[str, Any]) -> int | None:
    """The step at which the run `described` had ended, where all that it left in `folder` is still there; else None."""
    folder = Path(folder)
    try:
        record = json.loads((folder / FINISHED).read_text("utf-8"))
        step, run, files = (record[name] for name in ("step", "run", "files"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        # The run goes on from its checkpoints, as without a note.
        return None
    if run != _plain(described):
        return None
    whole = all((folder / name).is_file() and _size(folder / name) == size for name, size in files.items())
    return step if whole else None


def forget_finished(folder: str | Path) -> None:
    """Takes back what :func:`write_finished` noted in `folder`."""
    Path(folder, FINISHED).unlink(missing_ok=True)


def _size(path: Path) -> int | None:
    # A card may be edited, and a run that is trained on is told by its settings.
    return path.stat().st_size if path.suffix == ".safetensors" else None


def _plain(described: Mapping[str, Any]) -> Any:
    # Enums and sets are no JSON, and numbers come back as they were written.
    return json.loads(
        json.dumps(described, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    )
