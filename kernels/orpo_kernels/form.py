"""Fused kernels or the library's matmul: which form of stages 1 and 3 runs, by one timing for each class of shapes.

The fused form (triton_backend.py) keeps logits on the chip; the strip form (triton_strip_backend.py) has the library
write them, a strip at a time. Which is faster depends on how well triton's matmul does on the card, so both are timed
there at first use; that holds one strip and a float32 dX of at most 4096 rows. The result is remembered in the process,
and on disk beside triton's own cache.

Forced by ``backend="triton-fused"`` or ``"triton-strip"``, which goes first, and by ``ORPO_KERNEL_FORM=fused`` or
``strip``. Without a timing the form is "fused": on a CPU, where deterministic algorithms are asked for, and while a
CUDA graph is captured unless the process has timed this class before.

Each form gives the same bits in every run, but the two differ by the rounding of a float32 sum, and ranks that time for
themselves may choose differently. Gradients are averaged over the ranks, so parameters stay equal on all of them; runs
that have to repeat bit for bit force a form.

Letters: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .backends import load_backend
from .head import Head, strip_width, strips
from .matmul import add_matmul

FORMS = ("fused", "strip")
VARIABLE = "ORPO_KERNEL_FORM"
# Where nothing may be timed: the form without a strip of logits in the forward pass.
UNTIMED = "fused"

# Enough rows to fill any card; the two forms' ratio does not change beyond.
_TIMED_ROWS = 4096

_log = logging.getLogger(__name__)
_chosen: dict[str, str] = {}


def load_form(backend: str, x_ND: Tensor, targets_N: Tensor, head: Head, strip_bytes: int) -> ModuleType:
    """The module with the stages for these rows: `backend` itself, or the form that "triton" leaves open.

    Raises:
        ValueError: the environment variable ORPO_KERNEL_FORM names no form.
    """
    if backend == "triton":
        backend = f"triton-{choose_form(x_ND, targets_N, head, strip_bytes)}"
    return load_backend(backend)


def choose_form(x_ND: Tensor, targets_N: Tensor, head: Head, strip_bytes: int) -> str:
    """ "fused" or "strip": forced by the environment, else remembered, else timed where that can be done."""
    forced = os.environ.get(VARIABLE, "auto")
    if forced in FORMS:
        return forced
    if forced != "auto":
        raise ValueError(f"{VARIABLE} has to be one of auto, {', '.join(FORMS)}, got {forced!r}")
    if torch.are_deterministic_algorithms_enabled() or x_ND.shape[0] == 0 or not can_time(x_ND.device):
        return UNTIMED
    key = shape_class(x_ND, head, strip_bytes)
    if key in _chosen:
        return _chosen[key]
    if capturing(x_ND.device):
        return UNTIMED
    file = _file(key)
    form = _read(file, key)
    if form is None:
        times = {name: _time(name, x_ND, targets_N, head, strip_bytes) for name in FORMS}
        form = min(FORMS, key=times.__getitem__)
        said = ", ".join(f"{name} {milliseconds:.3g} ms" for name, milliseconds in times.items())
        _log.info("kernel form %s for %s, timed: %s", form, key, said)
        _write(file, {"shape_class": key, "form": form, "milliseconds": times})
    else:
        _log.info("kernel form %s for %s, from %s", form, key, file)
    _chosen[key] = form
    return form


def forget() -> None:
    """Drop what this process remembers; files stay."""
    _chosen.clear()


def can_time(device: torch.device) -> bool:
    """Whether kernels on `device` take the time that they will take."""
    return device.type == "cuda"


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured: then nothing runs, and waiting for an event is an error."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def shape_class(x_ND: Tensor, head: Head, strip_bytes: int) -> str:
    """All that the faster form depends on; rows and vocabulary to the next power of two."""
    import triton

    from . import configs

    (n, d), v = x_ND.shape, head.weight_VD.shape[0]
    features = [name for name, on in (("bias", head.bias_V is not None), ("softcap", head.softcap is not None)) if on]
    if not configs.rows_aligned(x_ND, head.weight_VD):
        features.append("unaligned")
    device = torch.cuda.get_device_name(x_ND.device) if x_ND.is_cuda else x_ND.device.type
    dtypes = dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in (x_ND, head.weight_VD))
    parts = (
        device,
        f"torch {torch.__version__}",
        f"triton {triton.__version__}",
        " ".join(dtypes),
        configs.input_precision(),
        f"N<={1 << (n - 1).bit_length()}",
        f"D={d}",
        f"V<={1 << (v - 1).bit_length()}",
        f"strip={strip_bytes}",
        *features,
    )
    return ", ".join(parts)


def _time(form: str, x_ND: Tensor, targets_N: Tensor, head: Head, strip_bytes: int) -> float:
    """Milliseconds of stage 1 and of stage 3 with dX, over the whole vocabulary; inf where the chip cannot run it."""
    from triton.runtime.errors import OutOfResources

    backend, rows = load_backend(f"triton-{form}"), x_ND.shape[0]
    x_ND, targets_N = x_ND[:_TIMED_ROWS], targets_N[:_TIMED_ROWS]
    # Strips as wide as those of all rows.
    strip_bytes = max(1, strip_bytes * x_ND.shape[0] // rows)
    try:
        return milliseconds(lambda: _stages(backend, x_ND, targets_N, head, strip_bytes), x_ND.device)
    except OutOfResources as error:
        _log.warning("kernel form %s does not fit this card: %s", form, error)
        return math.inf


def _stages(backend: ModuleType, x_ND: Tensor, targets_N: Tensor, head: Head, strip_bytes: int) -> None:
    """What differs between the forms: not dW, whose matmuls add up to the same whatever the width of a strip."""
    logp_N, lse_N = backend.token_stats(x_ND, targets_N, head, strip_bytes)
    dx_ND = torch.zeros_like(x_ND, dtype=torch.float32)
    v, element_bytes = head.weight_VD.shape[0], backend.strip_element_bytes(x_ND.dtype, head.weight_VD.dtype)
    for first, last in strips(v, strip_width(x_ND.shape[0], v, element_bytes, strip_bytes)):
        g_NW, weight_WD = backend.logit_grad(x_ND, targets_N, logp_N, lse_N, head, first, last)
        add_matmul(dx_ND, g_NW, weight_WD)
        del g_NW


def milliseconds(run: Callable[[], None], device: torch.device) -> float:
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
    return Path(folder).expanduser() / "orpo_kernel_form" / f"{name}.json"


def _read(file: Path, key: str) -> str | None:
    """The form in `file`, or None: it is not there, or not what `_write` writes."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["shape_class"] == key and found["form"] in FORMS:
            return found["form"]
        reason = "it holds another class or form"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    _log.warning("%s is ignored, and the kernel forms are timed again: %s", file, reason)
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
        _log.warning("the kernel form is not remembered on disk: %s", error)
