"""Fused kernels or the library's matmul: which form of stages 1 and 3 runs, by one timing for each class of shapes.

The fused form (triton_backend.py) keeps logits on the chip; the strip form (triton_strip_backend.py) has the library
write them, a strip at a time. Which is faster depends on how well triton's matmul does on the card, so both are timed
there at first use (tuning.py), the fused one with the tiles that were found fastest; that holds one strip and a float32
dX of at most 4096 rows.

Forced by ``backend="triton-fused"`` or ``"triton-strip"``, which goes first, and by ``ORPO_KERNEL_FORM=fused`` or
``strip``. Without a timing the form is "fused", and where exponentials are kept (kept.py): a logit that is not
computed twice costs less than the fastest that is.

Each form gives the same bits in every run, but the two differ by the rounding of a float32 sum, and ranks that time for
themselves may choose differently. Gradients are averaged over the ranks, so parameters stay equal on all of them; runs
that have to repeat bit for bit force a form and ask for deterministic algorithms.

Letters: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import Tensor

from . import tuning
from .backends import load_backend
from .head import Head, strip_width, strips
from .matmul import add_matmul

# First the one without a strip of logits in the forward pass: it runs where nothing may be timed.
FORMS = ("fused", "strip")
VARIABLE = "ORPO_KERNEL_FORM"


def keeps_exponentials(backend: str) -> bool:
    """Whether this backend can: the fused form, unless the environment forces the other."""
    return backend == "triton-fused" or (backend == "triton" and _forced() != "strip")


def load_form(
    backend: str, x_ND: Tensor, targets_N: Tensor, head: Head, strip_bytes: int, kept_columns: int = 0
) -> ModuleType:
    """The module with the stages for these rows: `backend` itself, or the form that "triton" leaves open.

    Raises:
        ValueError: the environment variable ORPO_KERNEL_FORM names no form.
    """
    if backend == "triton":
        chosen = "fused" if kept_columns else choose_form(x_ND, targets_N, head, strip_bytes)
        backend = f"triton-{chosen}"
    return load_backend(backend)


def _forced() -> str | None:
    forced = os.environ.get(VARIABLE, "auto")
    if forced not in ("auto", *FORMS):
        raise ValueError(f"{VARIABLE} has to be one of auto, {', '.join(FORMS)}, got {forced!r}")
    return None if forced == "auto" else forced


def choose_form(x_ND: Tensor, targets_N: Tensor, head: Head, strip_bytes: int) -> str:
    """ "fused" or "strip": forced by the environment, else remembered, else timed where that can be done."""
    if forced := _forced():
        return forced
    if x_ND.shape[0] == 0:
        return FORMS[0]

    def time(form: str) -> float:
        return _time(form, x_ND, targets_N, head, strip_bytes)

    key = tuning.shape_class(x_ND, head, f"strip={strip_bytes}")
    return tuning.fastest("kernel form", FORMS, key, x_ND.device, time)


def _time(form: str, x_ND: Tensor, targets_N: Tensor, head: Head, strip_bytes: int) -> float:
    """Milliseconds of stage 1 and of stage 3 with dX, over the whole vocabulary."""
    backend, rows = load_backend(f"triton-{form}"), x_ND.shape[0]
    x_ND, targets_N = x_ND[: tuning.TIMED_ROWS], targets_N[: tuning.TIMED_ROWS]
    # Strips as wide as those of all rows.
    strip_bytes = max(1, strip_bytes * x_ND.shape[0] // rows)
    return tuning.milliseconds(lambda: _stages(backend, x_ND, targets_N, head, strip_bytes), x_ND.device)


def _stages(backend: ModuleType, x_ND: Tensor, targets_N: Tensor, head: Head, strip_bytes: int) -> None:
    """What differs between the forms: not dW, whose matmuls add up to the same whatever the width of a strip."""
    logp_N, lse_2N = backend.token_stats(x_ND, targets_N, head, strip_bytes)
    dx_ND = torch.zeros_like(x_ND, dtype=torch.float32)
    v, element_bytes = head.weight_VD.shape[0], backend.strip_element_bytes(x_ND.dtype, head.weight_VD.dtype)
    for first, last in strips(v, strip_width(x_ND.shape[0], v, element_bytes, strip_bytes)):
        g_NW, weight_WD = backend.logit_grad(x_ND, targets_N, logp_N, lse_2N, head, first, last)
        add_matmul(dx_ND, g_NW, weight_WD)
        del g_NW
