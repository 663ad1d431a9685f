"""Places in a stream of ``datasets``: where one can be gone back to, nothing before it is read again."""

from __future__ import annotations

import copy
from typing import Any

# What a stream is made of, as far as ``load_state_dict`` brings back the very rows that would have come. It does not
# for a shuffle buffer, whose rows it loses, nor for tables that a map takes in batches.
EXACT = frozenset(
    (
        *("ExamplesIterable", "ArrowExamplesIterable", "RebatchedArrowExamplesIterable", "FormattedExamplesIterable"),
        *("MappedExamplesIterable", "FilteredExamplesIterable", "SelectColumnsIterable"),
        *("SkipExamplesIterable", "TakeExamplesIterable", "VerticallyConcatenatedMultiSourcesExamplesIterable"),
    )
)


def own_copy(stream: Any) -> Any | None:
    """A copy of `stream` that no other reading of it disturbs, and whose ``state_dict`` is exact; None if it is not.

    Two streams made of one share its counts of what was read: reading the second in between would change the place of
    the first.

    Args:
        stream: a ``datasets.IterableDataset``.
    """
    parts = getattr(stream, "_ex_iterable", None)
    if parts is None or getattr(stream, "_formatting", None) or not _is_exact(parts):
        return None
    own = object.__new__(type(stream))
    # Not copy.copy, after which both have one dictionary of attributes.
    own.__dict__.update(vars(stream), _ex_iterable=_copied(parts))
    return own


def _sources(part: Any) -> list[Any]:
    return [part.ex_iterable] if hasattr(part, "ex_iterable") else list(getattr(part, "ex_iterables", ()))


def _is_exact(part: Any) -> bool:
    plain = not getattr(part, "formatting", None)
    return type(part).__name__ in EXACT and plain and all(map(_is_exact, _sources(part)))


def _copied(part: Any) -> Any:
    part = copy.copy(part)
    if hasattr(part, "ex_iterable"):
        part.ex_iterable = _copied(part.ex_iterable)
    elif hasattr(part, "ex_iterables"):
        part.ex_iterables = [_copied(source) for source in part.ex_iterables]
    return part
