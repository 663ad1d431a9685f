"""One run at a time in a folder: a file with the process and the host that write there."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

from orpo.ranks import from_rank_0
from orpo.runs.disk import check_writable

# Begins with an underscore, since Trainer leaves such names out of what it uploads to the hub.
LOCK = "_orpo_run.lock"

# How often this process has locked each folder: a command holds one around the trainer's own.
_held: dict[Path, int] = {}
_stops: dict[Path, threading.Event] = {}

# Seconds. A run touches its lock, by which others see that it lives where they cannot see its process; NFS may show
# an older time for one minute.
BEAT, SILENCE = 15.0, 180.0


@contextmanager
def run_lock(output_dir: str | Path, state: Accelerator | PartialState) -> Iterator[None]:
    """While the block runs, no other run may write in `output_dir`, which is made if it is missing.

    Rank 0 holds the lock for all ranks. A lock that was left behind by a process that has ended is taken over; of a
    process on another host or in another container, once nothing has touched the lock for three minutes.

    Raises:
        ValueError: on all ranks, where another process holds the lock, or the folder cannot be written.
    """
    # One folder has many names: relative, absolute, by a link.
    folder = Path(output_dir).resolve()

    def acquire() -> None:
        check_writable(output_dir)
        _acquire(folder)

    from_rank_0(state, acquire)
    try:
        yield
    finally:
        if state.is_main_process:
            _release(folder)


def warn_of_own_disks(output_dir: str | Path, accelerator: Accelerator, saves_on_each: bool) -> None:
    """On rank 0, tells of ranks that do not see its lock, on nodes with disks of their own. All ranks call it.

    Args:
        output_dir: the folder that is locked.
        saves_on_each: ``save_on_each_node``.
    """
    if accelerator.num_processes == 1 or saves_on_each:
        return
    blind = len(blind_ranks(output_dir))
    if blind and accelerator.is_main_process:
        warnings.warn(
            f"{blind} of {accelerator.num_processes} ranks have another output_dir {output_dir} than rank 0, on a disk "
            "of their own, and a run could not go on from its checkpoints: give a folder that all nodes share, or "
            "save_on_each_node true",
            stacklevel=2,
        )


def blind_ranks(output_dir: str | Path) -> list[int]:
    """The ranks that do not see the lock which rank 0 holds in `output_dir`. All ranks call it."""
    sees = gather_object([Path(output_dir, LOCK).exists()])
    return [rank for rank, there in enumerate(sees) if not there]


def check_lock(output_dir: str | Path) -> None:
    """Refuses to write in `output_dir` where another run has taken the lock over from this process.

    Raises:
        ValueError: with the process that has it now.
    """
    folder, me = Path(output_dir).resolve(), _me()
    owner = _read(folder / LOCK)
    if folder in _held and owner is not None and not _is(owner, me):
        raise ValueError(_refusal(folder, owner, me))


def _acquire(folder: Path) -> None:
    me, silent_since = _me(), None
    while True:
        with _alone(folder):
            owner = _read(folder / LOCK)
            if owner is not None and _is(owner, me):
                break
            if owner is None or not _may_live(owner, me) or silent_since == _touched(folder / LOCK):
                # What was left behind has lost its meaning, and so have counts that came with a fork.
                (folder / LOCK).unlink(missing_ok=True)
                _held.pop(folder, None)
                _create(folder / LOCK, me)
                _stops[folder] = threading.Event()
                threading.Thread(target=_beat, args=(folder / LOCK, me, _stops[folder]), daemon=True).start()
                break
        if _sees(owner, me) or not owner.get("beats"):
            raise ValueError(_refusal(folder, owner, me))
        silent_since = _wait_for_silence(folder, owner, me)
    _held[folder] = _held.get(folder, 0) + 1


def _create(lock: Path, me: dict[str, Any]) -> None:
    with open(lock, "x", encoding="utf-8") as file:
        try:
            os.utime(lock)
        except OSError:
            # Some file systems have no times to set: there, silence says nothing.
            json.dump({**me, "beats": False}, file)
        else:
            json.dump({**me, "beats": True}, file)


def _beat(lock: Path, me: dict[str, Any], stop: threading.Event) -> None:
    """Touches `lock` until `stop`, or until it is another's."""
    while not stop.wait(BEAT) and _is(_read(lock) or {}, me):
        with suppress(OSError):
            os.utime(lock)


def _touched(lock: Path) -> int | None:
    try:
        return lock.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _wait_for_silence(folder: Path, owner: dict[str, Any], me: dict[str, Any]) -> int | None:
    """When the lock of `owner` was touched last, after it was not touched for SILENCE seconds. Clocks do not count.

    Raises:
        ValueError: it was touched.
    """
    seen, start = _touched(folder / LOCK), time.monotonic()
    print(
        f"output_dir {folder} was left locked by process {owner['pid']} on {owner['host']}; {SILENCE:.0f} s without a "
        "sign of its life end the lock",
        flush=True,
    )
    while time.monotonic() < start + SILENCE:
        time.sleep(min(BEAT, SILENCE) / 4)
        if (now := _touched(folder / LOCK)) != seen:
            if now is None:
                break
            raise ValueError(_refusal(folder, owner, me))
    return seen


def _release(folder: Path) -> None:
    _held[folder] -= 1
    if not _held[folder]:
        del _held[folder]
        _stops.pop(folder).set()
        # Removed by hand, it may be another run's by now.
        if _is(_read(folder / LOCK) or {}, _me()):
            (folder / LOCK).unlink(missing_ok=True)


def _me() -> dict[str, Any]:
    namespace = None
    # Containers may share a host's name, and do not see each other's processes.
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    pid = os.getpid()
    return {"pid": pid, "started": _started(pid), "host": socket.gethostname(), "namespace": namespace}


def _is(owner: dict[str, Any], me: dict[str, Any]) -> bool:
    return all(owner.get(name) == value for name, value in me.items())


def _sees(owner: dict[str, Any], me: dict[str, Any]) -> bool:
    """Whether the process of `owner`, if it lives, can be seen from here."""
    return owner["host"] == me["host"] and owner.get("namespace", me["namespace"]) == me["namespace"]


def _refusal(folder: Path, owner: dict[str, Any], me: dict[str, Any]) -> str:
    where = "" if owner["host"] == me["host"] else f" on {owner['host']}"
    text = (
        f"output_dir {folder} is in use by process {owner['pid']}{where}: wait for its end, or give another output_dir"
    )
    if _sees(owner, me):
        return text
    return f"{text}. If it has ended (from {me['host']} that cannot be seen): rm {shlex.quote(str(folder / LOCK))}"


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
    return not _sees(owner, me) or owner["started"] == _started(owner["pid"]) is not None


def _started(pid: int) -> int | None:
    """When process `pid` began, in clock ticks since boot; None if there is none, or one that has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *numbers = stat.rpartition(")")[2].split()
    # A zombie waits for its parent to ask how it ended.
    return None if state in "ZX" else int(numbers[18])
