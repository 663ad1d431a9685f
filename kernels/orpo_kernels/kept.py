"""Exponentials that stage 1 leaves for stage 3, as far as a budget reaches: how many, and where they lie.

kept_grad.py has what is stored and what is made of it.

Letters: N rows, V vocabulary, C kept columns (the first ones), T tiles of them, R described rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Columns that share one maximum; every tile of stage 1 is a multiple of it. 4 bytes beside 64 exponentials.
TILE = 64
# Kept columns end where a tile of stage 1 does, so that none is computed for a few columns.
_STEP = 256
# The least part of the exponentials that is worth to be kept: one in so many.
_SHARE = 8
# Rows that a budget has to hold for blocks (`block_rows`): each of them reads the whole head.
_BLOCK_ROWS = 1024
# float16 exponentials keep entries down to 4e-12 of the row's running maximum with this.
_FLOAT16_SCALE = 2.0**14


@dataclass(frozen=True)
class Keeping:
    """What is kept: exponentials of the first `columns` columns, of blocks of `block` rows, one after the other.

    `tiles` row tiles have room for it. A block of 0 is all rows at once.
    """

    columns: int
    tiles: int
    block: int = 0


@dataclass(frozen=True)
class Kept:
    """exps (N, C) with rows `stride` apart, and max_TN, in flat buffers; larger ones may hold fewer rows."""

    columns: int
    exps: Tensor
    maxima: Tensor

    @property
    def stride(self) -> int:
        return -(-self.columns // TILE) * TILE

    @property
    def scale(self) -> float:
        """What exponentials were multiplied by before they were stored."""
        return _FLOAT16_SCALE if self.exps.dtype == torch.float16 else 1.0


def row_tiles(rows: int, vocabulary: int, element_bytes: int, budget: int) -> int:
    """Tiles of one row each for which buffers are made: what `budget` bytes hold, at most all of R rows.

    None where they hold less than an eighth, which saves less than the choice between the forms of stage 1 (form.py),
    or no step of columns.
    """
    held, whole = budget // (TILE * element_bytes + 4), rows * -(-vocabulary // TILE)
    enough = _SHARE * held >= whole and kept_columns(rows, vocabulary, held) > 0
    return min(held, whole) if enough else 0


def kept_columns(rows: int, vocabulary: int, tiles: int) -> int:
    """Columns of which `rows` rows fit into `tiles` row tiles: whole steps of 256, or the whole vocabulary."""
    columns = tiles // max(1, rows) * TILE
    return vocabulary if columns >= vocabulary else columns // _STEP * _STEP


def block_rows(rows: int, vocabulary: int, element_bytes: int, budget: int) -> int:
    """Rows of a block whose exponentials `budget` bytes hold over the whole vocabulary.

    For a head without gradients: it has used a block's exponentials up before the next one's. Blocks are of about the
    same size. 0 where there are no rows, or the budget holds less than 1024 and not all of them.
    """
    held = budget // (-(-vocabulary // TILE) * (TILE * element_bytes + 4))
    if rows == 0 or held < min(rows, _BLOCK_ROWS):
        return 0
    even = -(-rows // -(-rows // held))
    # Whole tiles of a matrix instruction, where that does not take more than there is room for.
    return min(held, rows, -(-even // 16) * 16)


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
