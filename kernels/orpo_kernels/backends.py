"""Which implementation of the stages runs: Triton on an accelerator, torch on a CPU, or the one that was asked for."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch

from .head import CPU_STRIP_BYTES, STRIP_BYTES

# "triton" leaves the form of its stages to form.py.
NAMES = ("torch", "triton", "triton-fused", "triton-strip")
_MODULES = {"torch": "torch_backend", "triton-strip": "triton_strip_backend"}

# Bytes kept between the logits and their gradient, by default: tiles of logits (bins.py), or exponentials (kept.py).
CPU_LOGITS_BUDGET = 512 * 2**20
LOGITS_BUDGET = 2**30


# The choice depends on the machine and on what never changes between calls, so torch.compile may take it as a constant.
@torch.compiler.assume_constant_result
def choose_backend(name: str | None, device: str, hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> str:
    """The backend to run on a device of type `device`.

    Raises:
        ValueError: `name` is not a backend's, or Triton was asked for where it cannot run.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"backend has to be one of {', '.join(NAMES)} or None, got {name!r}")
    float64 = torch.float64 in (hidden_dtype, weight_dtype)
    if name is None:
        return "torch" if device == "cpu" or float64 or importlib.util.find_spec("triton") is None else "triton"
    if name != "torch" and float64:
        raise ValueError(f"backend={name!r} does not compute in torch.float64: use backend='torch'")
    if name != "torch" and device == "cpu" and not _triton_takes_cpu_tensors():
        raise ValueError(
            f"backend={name!r} cannot run on CPU tensors: move them to a GPU, set TRITON_INTERPRET=1 before the first "
            "import of triton to interpret the kernels (its interpreter gets bfloat16 wrong), or use backend='torch'"
        )
    return name


def resolve_budget(
    logits_budget: int | None,
    backend: str,
    device: str,
    hidden_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    vocabulary: int,
    head_frozen: bool,
) -> int:
    """`logits_budget`, or the device's default; for torch 0 where it cannot hold the logits of a single row."""
    if backend != "torch":
        return LOGITS_BUDGET if logits_budget is None else logits_budget
    if logits_budget is None:
        # Tiles save the head's gradient a second computation of the logits. A frozen head has none, and goes through
        # each strip once.
        logits_budget = CPU_LOGITS_BUDGET if device == "cpu" and not head_frozen else 0
    row_bytes = vocabulary * _tile_element_bytes(hidden_dtype, weight_dtype)
    return logits_budget if logits_budget >= row_bytes else 0


# Not the vocabulary, which is a symbol where a graph is compiled for any weight.
@torch.compiler.assume_constant_result
def _tile_element_bytes(hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> int:
    return load_backend("torch").tile_element_bytes(hidden_dtype, weight_dtype)


def resolve_strip(strip_bytes: int | None, device: str) -> int:
    """`strip_bytes`, or the device's default: 32 MiB on a CPU, 128 MiB elsewhere."""
    if strip_bytes is None:
        return CPU_STRIP_BYTES if device == "cpu" else STRIP_BYTES
    return strip_bytes


def load_backend(name: str) -> ModuleType:
    """The module with the stages; triton is imported here at the earliest."""
    return importlib.import_module(f"orpo_kernels.{_MODULES.get(name, 'triton_backend')}")


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
