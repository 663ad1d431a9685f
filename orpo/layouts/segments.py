"""Rows that share prompts, as attention kernels of variable length read them: which keys each run of queries sees.

A prompt and the answer behind it are one segment, as they stand. Every further answer is a segment too, whose keys are
those of the prompt again and its own. In each, the last query stands at the last key, so that a causal kernel that
counts from the end ("bottom-right", FlashAttention since 2.1) lets every token see exactly what it may, and a window
reaches as far back as positions say. No token is in two segments as a query: there is nothing to merge.
Letters: B rows, T tokens of a row, M keys of all segments, S segments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

PROMPT = 0


@dataclass(frozen=True)
class Segments:
    """The segments of a batch. Queries are the (B T) tokens as they stand, padding too.

    Attributes:
        key_M: int64, places in the flattened batch of each segment's keys, one segment behind the other.
        query_bounds, key_bounds: int32 (S + 1), where each segment begins among the queries and in `key_M`, from 0.
        most_queries, most_keys: of one segment, Python numbers: reading them off a device would stall it.
    """

    key_M: Tensor
    query_bounds: Tensor
    key_bounds: Tensor
    most_queries: int
    most_keys: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        """The same segments on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Segments:
        """The same segments in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Segments:
        names = ("key_M", "query_bounds", "key_bounds")
        return replace(self, **{name: change(getattr(self, name)) for name in names})


def segments_of(branch_BT: np.ndarray, branches: int) -> Segments:
    """The segments of a batch.

    Args:
        branch_BT: integers (B, T), as in :class:`orpo.layouts.prefix_mask.SharedPrefixMask`: a prompt stands before all
            its answers in one row, and no branch is in two places but for padding.
        branches: one more than the most answers behind a prompt.
    """
    rows, width = branch_BT.shape
    new = np.ones((rows, width), dtype=bool)
    new[:, 1:] = branch_BT[:, 1:] != branch_BT[:, :-1]
    bounds = np.append(np.flatnonzero(new), rows * width)
    segments: list[tuple[int, list[np.ndarray]]] = []
    prompt, prompt_group = np.arange(0), -1
    for start, end in pairwise(bounds):
        group, branch = divmod(int(branch_BT.flat[start]), branches)
        own = np.arange(start, end)
        if branch == PROMPT:
            prompt, prompt_group = own, group
            segments.append((len(own), [own]))
        elif prompt_group != group:
            # Pairs without a common prompt: their answers have nothing before them.
            segments.append((len(own), [own]))
        elif prompt[-1] + 1 == start:
            # The prompt's keys serve it and its first answer at once.
            segments[-1] = (len(prompt) + len(own), [prompt, own])
        else:
            segments.append((len(own), [prompt, own]))
    queries = [count for count, _ in segments]
    keys = [sum(map(len, parts)) for _, parts in segments]
    return Segments(
        torch.from_numpy(np.concatenate([part for _, parts in segments for part in parts])),
        *(torch.from_numpy(np.cumsum([0, *counts], dtype=np.int32)) for counts in (queries, keys)),
        max(queries),
        max(keys),
    )
