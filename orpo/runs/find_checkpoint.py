"""Which checkpoints in a folder are whole, and which of them a run resumes from."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import transformers
from transformers import TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from orpo.runs.disk import readable
from orpo.runs.manifest import find_bad_weights, find_cut_file, find_damage
from orpo.runs.record import read_record

# Begins with an underscore, since Trainer leaves such names out of what it uploads to the hub.
INCOMPLETE = "_incomplete"
# Trainer's own sign, in the folder of a checkpoint that it saves on SIGTERM.
JIT_SIGN = "checkpoint-is-incomplete.txt"
NOT_ENDED = "was not written to its end"


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in `folder` that were written to their end, oldest first; their contents are not read.

    Those with a record of their run are ordered by the number of their save, and are newer than those without, which
    are ordered by step: a run that was started anew in the folder of a longer one has the newest. Clocks do not count.
    """
    found = []
    for path in checkpoint_folders(folder):
        if find_fault(path) is None:
            record = read_record(path)
            order = (record is not None, *((record or {}).get(name, 0) for name in ("number", "saved_at")), _step(path))
            found.append((order, path))
    return [path for _, path in sorted(found)]


def checkpoint_folders(folder: str | Path) -> list[Path]:
    """All checkpoints in `folder`, by their name alone."""
    return [p for p in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def find_fault(checkpoint: Path, contents: bool = False) -> str | None:
    """What keeps `checkpoint` from being whole, in words that go behind its name; None where nothing does.

    :class:`CheckpointingTrainer` writes a record with the sizes and checksums of all files last. A plain Trainer has
    none, and writes its state last of what its first process writes: there an interrupted save is seen, and no more.

    Args:
        checkpoint: a folder.
        contents: compare checksums as well, for which every file is read.
    """
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return NOT_ENDED
    known = {field.name for field in dataclasses.fields(TrainerState)}
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int) or not state.keys() <= known:
        return f"has a {TRAINER_STATE_NAME} that transformers {transformers.__version__} cannot read"
    try:
        record = read_record(checkpoint)
    except ValueError as error:
        return f"has a record that is damaged ({error})"
    if record is None or "files" not in record:
        if (checkpoint / JIT_SIGN).exists():
            return NOT_ENDED
        return find_cut_file(checkpoint) if contents else None
    return find_damage(checkpoint, record["files"], contents)


def find_checkpoint(
    wanted: str | bool | None, output_dir: str | Path, report: Callable[[str], object] = print
) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` means, its files compared with what was written; None: a new run.

    Args:
        wanted: True, the newest whole checkpoint in `output_dir`; "auto", the same if there is one; a folder of
            checkpoints, for the newest in it; or a checkpoint. None and False are a new run.
        output_dir: where the run saves.
        report: is told of those that are newer and damaged.

    Raises:
        ValueError: there is none, or it cannot be resumed.
    """
    if wanted is None or wanted is False:
        return None
    own = wanted is True or wanted == "auto"
    folder = Path(output_dir) if own else Path(wanted)
    if not own and not checkpoint_folders(folder) and (folder / TRAINER_STATE_NAME).is_file():
        fault = find_fault(folder, contents=True)
        if fault:
            raise ValueError(f"resume_from_checkpoint: {folder} {fault}{_before(folder)}")
        found = folder
    else:
        found = _newest_whole(folder, report)
    if found is None:
        if wanted == "auto":
            return None
        raise ValueError(f"resume_from_checkpoint: {folder} holds no complete checkpoint to resume from")
    if not any(path.name.startswith(("optimizer", "global_step")) for path in found.iterdir()):
        raise ValueError(
            f"{found} holds the model alone (save_only_model), without which the optimizer cannot go on: "
            "give another output_dir, or resume_from_checkpoint false to start anew"
        )
    # DeepSpeed keeps its own beside its optimizer; without it, Trainer would leave the optimizer's state out as well.
    if not (found / SCHEDULER_NAME).is_file() and not any(found.glob("global_step*")):
        raise ValueError(f"{found} has no {SCHEDULER_NAME}, without which the run cannot go on{_before(found)}")
    # Not passed over: going back leads to the same spike again, unless something is changed.
    if spoilt := find_bad_weights(found):
        raise ValueError(f"{found} {spoilt}{_before(found)}")
    return found


def _newest_whole(folder: Path, report: Callable[[str], object]) -> Path | None:
    for checkpoint in reversed(complete_checkpoints(folder)):
        fault = find_fault(checkpoint, contents=True)
        if fault is None:
            return checkpoint
        report(f"{checkpoint} {fault}: it is passed over")
    return None


def _before(checkpoint: Path) -> str:
    """Which older checkpoint is whole, as the end of a sentence about `checkpoint`."""
    complete = complete_checkpoints(checkpoint.parent)
    if checkpoint in complete:
        complete = complete[: complete.index(checkpoint)]
    for path in reversed(complete):
        if find_fault(path, contents=True) is None and find_bad_weights(path) is None:
            return f"; {path} is whole: --resume_from_checkpoint {path} goes on from there"
    return "; no other checkpoint beside it is whole: resume_from_checkpoint false starts anew"


def last_number(folder: Path) -> int:
    """The number of the last save in `folder`."""
    return max(((read_record(path) or {}).get("number", 0) for path in complete_checkpoints(folder)), default=0)


def way_back(folder: Path) -> str:
    """Says from where a run that met a NaN can go on, or nothing."""
    *older, newest = [None, *complete_checkpoints(folder)]
    if newest is None:
        return ""
    text = f"{newest} is whole, and the next start resumes from it"
    return text if older[-1] is None else f"{text}; --resume_from_checkpoint {older[-1]} goes further back"


def failure_note(name: str, folder: Path) -> str:
    """Beside the error of a save: how full the disk is, and what is left."""
    complete = complete_checkpoints(folder)
    left = f"{complete[-1]} is whole, and the run resumes from it" if complete else "there is none before it"
    free = f"{readable(shutil.disk_usage(folder).free)} free" if folder.is_dir() else "the folder is gone"
    return f"{name} could not be saved in {folder} ({free}); {left}"
