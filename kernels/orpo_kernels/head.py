"""The vocabulary projection of a model, how it is cut into strips, and which of its gradients are wanted.

Letters: N kept rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Head:
    """z_NV = cap(scale * (x_ND weight_VD^T + bias_V)), cap(u) = softcap * tanh(u / softcap) (Eq. 1)."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def strip(self, first: int, last: int) -> Head:
        """The head of columns [first, last) alone."""
        bias_W = None if self.bias_V is None else self.bias_V[first:last]
        return Head(self.weight_VD[first:last], bias_W, self.scale, self.softcap)


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


@dataclass(frozen=True)
class Gradients:
    """Gradients by the rows' hidden states and by the head; None where not wanted."""

    x_ND: Tensor | None = None
    weight_VD: Tensor | None = None
    bias_V: Tensor | None = None


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


def strips(vocabulary: int, width: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) column of each strip."""
    for first in range(0, vocabulary, width):
        yield first, min(first + width, vocabulary)
