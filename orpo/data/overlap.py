"""Held-out pairs that are trained on: what is measured on them is no measure of new ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

SIDES = ("chosen_input_ids", "rejected_input_ids")


def report_overlap(train: Any, held_out: Any, report: Callable[[str], None] = print) -> None:
    """Reports, in a line for each held-out set, how many of its pairs `train` has too, token by token.

    Args:
        train: a prepared data set; of a stream nothing is known.
        held_out: one, a dict of some, or None.
        report: called with the line, where there are such pairs.
    """
    import datasets

    parts = held_out if isinstance(held_out, dict) else {"": held_out}
    parts = {name: data for name, data in parts.items() if isinstance(data, datasets.Dataset)}
    if not parts or not isinstance(train, datasets.Dataset):
        return
    trained = set(_digests(train))
    for name, data in parts.items():
        shared = sum(digest in trained for digest in _digests(data))
        if shared:
            report(
                f"eval{f' ({name})' if name else ''}: {shared:,} of {len(data):,} held-out pairs are in the train set "
                "too: figures on them say nothing of new pairs"
            )


def _digests(data: Any) -> Iterator[bytes]:
    """A digest of both sequences of every pair."""
    for table in data.select_columns(list(SIDES)).with_format("arrow").iter(1000):
        # Tokens that came as columns may be lists of another width, or of one length.
        lists = [table[name].combine_chunks().cast(pa.large_list(pa.int64())) for name in SIDES]
        sides = [(array.offsets.to_numpy(), array.values.to_numpy()) for array in lists]
        for row in range(len(table)):
            digest = hashlib.blake2b(digest_size=16)
            for offsets, ids in sides:
                tokens = ids[offsets[row] : offsets[row + 1]].astype("int64")
                digest.update(len(tokens).to_bytes(8) + tokens.tobytes())
            yield digest.digest()
