"""The plain matmuls, which are left to the library, and the dtypes they run and accumulate in."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 stays float64; everything else is accumulated in float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with its result in `dtype`, rounded once where the library can write its accumulator out."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def add_matmul(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """accumulator += a @ b; low-precision products are added to the accumulator, never to one another."""
    if accumulator.dtype == a.dtype:
        accumulator.addmm_(a, b)
    else:
        accumulator.add_(matmul(a, b, accumulator.dtype))
