"""The fastest of a few ways to the same result, by one timing for each class of shapes, remembered.

Used for the tiles of each kernel (tiles.py). What a class was timed at stays in this process, and on disk beside
triton's own cache, so that later processes do not time again.

Nothing is timed, and the first way is taken, on a CPU, where deterministic algorithms are asked for, and while a CUDA
graph is captured in a process that has not met the class: that process then stays with it. So one process takes one
way for one class, and repeats its own bits. Two processes may choose differently only where both had to time, with
no file to read: then they differ by the rounding of float32 sums.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from orpo_kernels.head import Head

# Enough rows to fill any card; which way is faster does not change beyond.
TIMED_ROWS = 4096

_log = logging.getLogger(__name__)
_chosen: dict[str, str] = {}


def fastest(what: str, ways: Sequence[str], key: str, device: torch.device, time: Callable[[str], float]) -> str:
    """One of `ways` for the class of shapes `key`: the first one where nothing may be timed, else the fastest.

    `what` names the choice in the log and on disk; `time` gives a way's milliseconds.
    """
    if len(ways) == 1 or torch.are_deterministic_algorithms_enabled() or not can_time(device):
        return ways[0]
    key = f"{what}: {key}"
    if key not in _chosen:
        _chosen[key] = ways[0] if capturing(device) else _find(ways, key, time)
    return _chosen[key]


def _find(ways: Sequence[str], key: str, time: Callable[[str], float]) -> str:
    file = _file(key)
    way = _read(file, key, ways)
    if way is not None:
        _log.info("%s: %s, from %s", key, way, file)
        return way
    times = {way: _milliseconds_or_inf(way, key, time) for way in ways}
    way = min(ways, key=times.__getitem__)
    _log.info("%s: %s, timed: %s", key, way, ", ".join(f"{name} {spent:.3g} ms" for name, spent in times.items()))
    _write(file, {"class": key, "chosen": way, "milliseconds": times})
    return way


def _milliseconds_or_inf(way: str, key: str, time: Callable[[str], float]) -> float:
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return time(way)
    except (OutOfResources, PTXASError) as error:
        _log.warning("%s: %s does not fit this card: %s", key, way, error)
        return math.inf


def forget() -> None:
    """Drop what this process remembers; files stay."""
    _chosen.clear()


def can_time(device: torch.device) -> bool:
    """Whether kernels on `device` take the time that they will take."""
    return device.type == "cuda"


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: then nothing runs, and waiting for an event is an error."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def shape_class(x_ND: Tensor, head: Head, *more: str) -> str:
    """What the fastest way depends on, with `more`; rows and vocabulary to the next power of two.

    Of x_ND, or of the rows of a strip of logits.
    """
    from orpo_kernels.gpu import tiles

    return _class_name(
        x_ND.device,
        tuple(dict.fromkeys((x_ND.dtype, head.weight_VD.dtype))),
        tiles.input_precision(),
        x_ND.shape[0],
        tuple(head.weight_VD.shape),
        *more,
        *(name for name, on in (("bias", head.bias_V is not None), ("softcap", head.softcap is not None)) if on),
        *(() if tiles.rows_aligned(x_ND, head.weight_VD) else ("unaligned",)),
    )


# Cached: written anew for every strip, the name takes longer than a launch.
@functools.lru_cache(maxsize=1024)
def _class_name(
    device: torch.device, dtypes: tuple[torch.dtype, ...], precision: str, n: int, shape: tuple[int, int], *more: str
) -> str:
    import triton

    v, d = shape
    parts = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        f"torch {torch.__version__}",
        f"triton {triton.__version__}",
        " ".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
        precision,
        f"N<={1 << (n - 1).bit_length()}",
        f"D={d}",
        f"V<={1 << (v - 1).bit_length()}",
        *more,
    )
    return ", ".join(parts)


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Median of three runs on the device's clock, after one that compiles."""
    with torch.cuda.device(device):
        run()
        times = []
        for _ in range(3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def _file(key: str) -> Path:
    """One file for each class, so that ranks and processes that write at the same time do not undo each other."""
    folder = os.environ.get("TRITON_CACHE_DIR") or Path(os.environ.get("TRITON_HOME") or "~", ".triton", "cache")
    name = hashlib.sha256(key.encode()).hexdigest()[:24]
    return Path(folder).expanduser() / "orpo_kernels" / f"{name}.json"


def _read(file: Path, key: str, ways: Sequence[str]) -> str | None:
    """The way in `file`, or None: it is not there, was chosen among other ways, or is not what `_write` writes."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["class"] == key and list(found["milliseconds"]) == list(ways) and found["chosen"] in ways:
            return found["chosen"]
        reason = "it holds another class or other ways"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    _log.warning("%s is ignored, and timed again: %s", file, reason)
    return None


def _write(file: Path, content: dict) -> None:
    """Whole or not at all: by renaming. A folder that cannot be written costs a timing in the next process."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            written = Path(folder, file.name)
            written.write_text(json.dumps(content), encoding="utf-8")
            written.replace(file)
    except OSError as error:
        _log.warning("what was timed is not remembered on disk: %s", error)
