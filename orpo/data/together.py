"""Rows of a stream that all ranks read, tokenized once: each rank does its part of them, and takes the others'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

Columns = dict[str, list[Any]]

_together = False


@contextmanager
def together() -> Iterator[None]:
    """In the block, which all ranks enter at the same row of a stream, :class:`SharedTokenizer` shares its work.

    A worker of a dataloader is in no process group: there, nothing is shared.
    """
    global _together
    before, _together = _together, torch.utils.data.get_worker_info() is None and PartialState().num_processes > 1
    try:
        yield
    finally:
        _together = before


class SharedTokenizer:
    """`tokenize`, whose rows the ranks divide where they read a stream :func:`together`; elsewhere it does them all.

    Args:
        tokenize: makes lists of one length of a batch of rows and their numbers, each row by itself.

    Raises:
        Exception: on all ranks, what `tokenize` raises on one: the others would wait for its part.
    """

    def __init__(self, tokenize: Callable[[Mapping[str, list[Any]], list[int]], Columns]) -> None:
        self.tokenize = tokenize

    def __call__(self, rows: Mapping[str, list[Any]], indices: list[int]) -> Columns:
        if not _together:
            return self.tokenize(rows, indices)
        state = PartialState()
        at = [len(indices) * rank // state.num_processes for rank in range(state.num_processes + 1)]
        own = slice(at[state.process_index], at[state.process_index + 1])
        answer: list[Any] = [None, None]
        try:
            answer[0] = self.tokenize({name: column[own] for name, column in rows.items()}, indices[own])
        except Exception as error:
            answer[1] = error
        answers = gather_object([answer])
        for _, error in answers:
            if error is not None:
                raise error
        return {name: [value for part, _ in answers for value in part[name]] for name in answer[0]}
