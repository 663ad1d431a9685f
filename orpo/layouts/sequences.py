"""Puts each pair's tokens beside a batch, one row a pair in every layout, for metrics that ask for inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

SEQUENCES = "sequences"


def with_sequences(collator: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
    """`collator`, whose batches also hold ``sequences``, int64 (pairs, tokens).

    A row is prompt and chosen answer, and behind them the rejected answer, filled up with -100.
    """
    # No closure: it could not be sent to dataloader workers that are spawned.
    return partial(_collate, collator)


def _collate(collator: Callable[[list[Any]], dict[str, Any]], examples: list[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [e["chosen_input_ids"] + e["rejected_input_ids"][e["rejected_prompt_length"] :] for e in examples]
    longest = max(map(len, rows))
    filled = torch.tensor([row + [-100] * (longest - len(row)) for row in rows])
    return {**collator(examples), SEQUENCES: filled}
