"""Compares the ratings that stand beside answers in Argilla's and UltraFeedback's data sets."""

from __future__ import annotations

from typing import Any

# Columns of (the chosen answer's rating, the rejected one's).
COLUMNS = (
    ("chosen-rating", "rejected-rating"),
    ("chosen_rating", "rejected_rating"),
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
)


def describe_ratings(data: Any, names: Any) -> str | None:
    """A sentence about the ratings in `data`, whose columns are `names`; None where there are none.

    Args:
        data: a ``datasets.Dataset``, or a stream, whose ratings are not compared.
    """
    found = next((pair for pair in COLUMNS if set(pair) <= set(names)), None)
    if found is None:
        return None
    said = f"{found[0]!r} and {found[1]!r} are ratings, which training does not read"
    if not hasattr(data, "__len__"):
        return said
    equal, reversed_ = [], []
    for row, (chosen, rejected) in enumerate(zip(*(data[name] for name in found), strict=True)):
        if not all(isinstance(rating, int | float) for rating in (chosen, rejected)) or not chosen <= rejected:
            continue
        (equal if chosen == rejected else reversed_).append(row)
    parts = [
        f"{len(rows):,} {'is' if len(rows) == 1 else 'are'} {how} (first: row {rows[0]})"
        for rows, how in ((equal, "rated equal"), (reversed_, "rated the other way round"))
        if rows
    ]
    if not parts:
        return said
    return f"{said}: of {len(data):,} rows {' and '.join(parts)}; data.filter(...) leaves such rows out"
