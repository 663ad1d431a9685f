"""Exponentials that stage 1 leaves for stage 3: where they lie. plan.py says how many, kept_grad.py what is stored.

Letters: N rows, C kept columns (the first ones), T tiles of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Columns that share one maximum; every tile of stage 1 is a multiple of it. 4 bytes beside 64 exponentials.
TILE = 64
# float16 exponentials keep entries down to 4e-12 of the row's running maximum with this.
_FLOAT16_SCALE = 2.0**14


@dataclass(frozen=True)
class Kept:
    """exps (N, C) with rows `stride` apart, and max_TN, in flat buffers; larger ones may hold fewer rows.

    `overwrite`: stage 3 may put g where the exponentials are.
    """

    columns: int
    exps: Tensor
    maxima: Tensor
    overwrite: bool = False

    @property
    def stride(self) -> int:
        return -(-self.columns // TILE) * TILE

    @property
    def scale(self) -> float:
        """What exponentials were multiplied by before they were stored."""
        return _FLOAT16_SCALE if self.exps.dtype == torch.float16 else 1.0


def buffers(like: Tensor, tiles: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Flat (exps, maxima) for so many row tiles."""
    return like.new_empty(tiles * TILE, dtype=dtype), like.new_empty(tiles, dtype=torch.float32)


def clear_padding(exps: Tensor, maxima: Tensor, rows: int, columns: int) -> None:
    """Zeros where no exponential is stored: two runs of an operator have to return the same, unused memory included."""
    stride = -(-columns // TILE) * TILE
    exps[rows * stride :].zero_()
    if stride > columns:
        exps[: rows * stride].view(rows, stride)[:, columns:].zero_()
    maxima[rows * (stride // TILE) :].zero_()
