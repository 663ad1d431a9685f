"""Orders of the training pairs that depend on seed and epoch alone: all ranks and a resumed run have the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import LengthGroupedSampler


class LengthGroups(LengthGroupedSampler):
    """transformers' sampler of ``group_by_length``, which draws from the global random state.

    That state differs between ranks, and a resumed run lacks it at the start of its epoch.

    Args:
        lengths: tokens of each row.
        batch_size: rows of an optimizer step, sorted with the longest first.
        seed: decides the order, together with the epoch.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the dataloader."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class PairsOfRows(Sampler[int]):
    """Rows in random order, the pairs that were made of one row behind each other: they share their prompt in a batch.

    Args:
        starts: int64 (rows,), where each row's pairs begin.
        pairs: how many pairs there are.
        seed: decides the order, together with the epoch.
    """

    def __init__(self, starts: np.ndarray, pairs: int, seed: int) -> None:
        self.starts, self.ends = starts, np.append(starts[1:], pairs)
        self.pairs, self.seed, self.epoch = pairs, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the dataloader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.pairs

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for row in torch.randperm(len(self.starts), generator=generator).tolist():
            yield from range(self.starts[row], self.ends[row])


def pairs_of_rows(data: Any, seed: int) -> PairsOfRows | None:
    """The sampler of prepared `data` where a row made several pairs; None where none did."""
    if "pair_id" not in getattr(data, "column_names", ()):
        return None
    rows = np.asarray(data["pair_id"])
    starts = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 1))
    return PairsOfRows(starts, len(rows), seed) if len(starts) < len(rows) else None
