"""Which implementation of the stages runs: Triton on an accelerator, torch on a CPU, or the one that was asked for."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

NAMES = ("torch", "triton")

# Bytes of logit tiles kept alive for their gradient, by default: none where tiles can stay on the chip.
CPU_LOGITS_BUDGET = 512 * 2**20


def default_budget(device: torch.device) -> int:
    """`logits_budget` where the caller names none."""
    return CPU_LOGITS_BUDGET if device.type == "cpu" else 0


def choose_backend(name: str | None, device: torch.device) -> str:
    """The backend to run on `device`.

    Raises:
        ValueError: `name` is not a backend's, or Triton was asked for where it cannot run.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"backend has to be one of {', '.join(NAMES)} or None, got {name!r}")
    if name is None:
        return "torch" if device.type == "cpu" or importlib.util.find_spec("triton") is None else "triton"
    if name == "triton" and device.type == "cpu" and not _triton_takes_cpu_tensors():
        raise ValueError(
            "backend='triton' cannot run on CPU tensors: move them to a GPU, set TRITON_INTERPRET=1 before the first "
            "import of triton to interpret the kernels, or use backend='torch'"
        )
    return name


def load_backend(name: str) -> ModuleType:
    """The module with the stages; triton is imported here at the earliest."""
    return importlib.import_module(f"orpo_kernels.{name}_backend")


def _triton_takes_cpu_tensors() -> bool:
    if importlib.util.find_spec("triton") is None:
        raise ValueError("backend='triton' needs the package triton, which is not installed here")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    from triton.runtime import driver

    try:
        return driver.active.get_active_torch_device().type == "cpu"
    except RuntimeError:  # no driver is active on a machine without a GPU
        return False
