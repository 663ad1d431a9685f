"""One run at a time in a folder: a file with the process and the host that write there."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState

from orpo.disk import check_writable
from orpo.sharding import from_rank_0

# Begins with an underscore, since Trainer leaves such names out of what it uploads to the hub.
LOCK = "_orpo_run.lock"

# How often this process has locked each folder: a command holds one around the trainer's own.
_held: dict[Path, int] = {}


@contextmanager
def run_lock(output_dir: str | Path, state: Accelerator | PartialState) -> Iterator[None]:
    """While the block runs, no other run may write in `output_dir`, which is made if it is missing.

    Rank 0 holds the lock for all ranks. A lock that was left behind by a process that has ended is taken over.

    Raises:
        ValueError: on all ranks, where another process holds the lock, or the folder cannot be written.
    """
    folder = Path(output_dir).absolute()

    def acquire() -> None:
        check_writable(output_dir)
        _acquire(folder)

    from_rank_0(state, acquire)
    try:
        yield
    finally:
        if state.is_main_process:
            _release(folder)


def _acquire(folder: Path) -> None:
    me = _me()
    with _alone(folder):
        owner = _read(folder / LOCK)
        if owner is None or (owner != me and not _may_live(owner, me)):
            # What was left behind has lost its meaning, and so have counts that came with a fork.
            (folder / LOCK).unlink(missing_ok=True)
            _held.pop(folder, None)
            with open(folder / LOCK, "x", encoding="utf-8") as file:
                json.dump(me, file)
        elif owner != me:
            raise ValueError(_refusal(folder, owner, me))
    _held[folder] = _held.get(folder, 0) + 1


def _release(folder: Path) -> None:
    _held[folder] -= 1
    if not _held[folder]:
        del _held[folder]
        # Removed by hand, it may be another run's by now.
        if _read(folder / LOCK) == _me():
            (folder / LOCK).unlink(missing_ok=True)


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "started": _started(os.getpid()), "host": socket.gethostname()}


def _refusal(folder: Path, owner: dict[str, Any], me: dict[str, Any]) -> str:
    where = "" if owner["host"] == me["host"] else f" on {owner['host']}"
    text = (
        f"output_dir {folder} is in use by process {owner['pid']}{where}: wait for its end, or give another output_dir"
    )
    if not where:
        return text
    return f"{text}. If it has ended (from {me['host']} that cannot be seen): rm {folder / LOCK}"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process at a time look at the lock and replace it: two that take over the same would both have it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems have none, and creating the lock file is then all that keeps two apart.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _read(lock: Path) -> dict[str, Any] | None:
    try:
        owner = json.loads(lock.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        # Killed between creating the file and writing it.
        return None
    return owner if isinstance(owner, dict) and owner.keys() >= {"pid", "started", "host"} else None


def _may_live(owner: dict[str, Any], me: dict[str, Any]) -> bool:
    # A number is given to another process one day, and in a container at once: with another start, it is another.
    return owner["host"] != me["host"] or owner["started"] == _started(owner["pid"]) is not None


def _started(pid: int) -> int | None:
    """When process `pid` began, in clock ticks since boot; None if there is none, or one that has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *numbers = stat.rpartition(")")[2].split()
    # A zombie waits for its parent to ask how it ended.
    return None if state in "ZX" else int(numbers[18])
