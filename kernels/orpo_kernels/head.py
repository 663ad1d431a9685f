"""The vocabulary projection of a model, how it is cut into strips, and which of its gradients are wanted.

Letters: N kept rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from orpo_kernels.shard import WHOLE, Shard


@dataclass(frozen=True)
class Head:
    """z_NV = cap(scale * (x_ND weight_VD^T + bias_V)), cap(u) = softcap * tanh(u / softcap) (Eq. 1).

    V are this rank's columns where the head is a `shard` of a larger one.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    shard: Shard = WHOLE

    def strip(self, first: int, last: int) -> Head:
        """The head of columns [first, last) alone."""
        bias_W = None if self.bias_V is None else self.bias_V[first:last]
        return replace(self, weight_VD=self.weight_VD[first:last], bias_V=bias_W)


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted, and whether the head is `frozen`, not trained whatever is wanted of this call."""

    hidden: bool
    weight: bool
    bias: bool
    frozen: bool = False

    @property
    def head(self) -> bool:
        return self.weight or self.bias

    @property
    def any(self) -> bool:
        return self.hidden or self.head


# Columns to a multiple of which a strip's rows are padded.
ALIGNED = 8


@dataclass(frozen=True)
class Gradients:
    """Gradients by the rows' hidden states and by the head; None where not wanted.

    That of a row's hidden state is x_coef_N times x_ND, or x_ND itself where x_coef_N is None.
    """

    x_ND: Tensor | None = None
    weight_VD: Tensor | None = None
    bias_V: Tensor | None = None
    x_coef_N: Tensor | None = None


def strip_width(rows: int, vocabulary: int, element_bytes: int, strip_bytes: int) -> int:
    """Columns of one strip: the most that `strip_bytes` holds for `rows` rows, evened out over the vocabulary.

    At least one column, so that a strip of more rows than `strip_bytes` has room for is still computed.
    """
    widest = max(1, strip_bytes // max(1, rows * element_bytes))
    if widest >= vocabulary:
        return vocabulary
    # Matmul libraries lose a large part of their speed on widths that are not multiples of a tile.
    tile = next((t for t in (128, 16) if widest >= t), 1)
    strips = -(-vocabulary // (widest // tile * tile))
    return -(-vocabulary // (strips * tile)) * tile


def strip_memory(like: Tensor, rows: int, columns: int) -> Tensor:
    """Memory for (rows, columns) whose rows begin at multiples of 16 bytes, or a library's matmul goes a slower way."""
    padded = like.new_empty((rows, -(-columns // ALIGNED) * ALIGNED))
    if padded.shape[1] > columns:
        # A library may read up to the next row, though it leaves out what it reads there.
        padded[:, columns:].zero_()
    return padded[:, :columns]


def strips(vocabulary: int, width: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) column of each strip."""
    for first in range(0, vocabulary, width):
        yield first, min(first + width, vocabulary)
