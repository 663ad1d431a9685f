"""Finds answers that begin with their own prompt, which would be trained on twice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# So many rows, and this share of them, tell a habit of the data set from answers that happen to repeat a question.
ROWS, MOST = 256, 0.9


def repeats_prompt(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """A warning where nearly all string answers of one side begin with their row's prompt; or None.

    Args:
        rows: the first rows of a data set, in any form of :mod:`orpo.data.forms.formats`.
    """
    looked_at = 0
    found: dict[str, list[int]] = {"chosen": [], "rejected": []}
    for i, row in enumerate(rows):
        prompt, *answers = (row.get(key) for key in ("prompt", *found))
        if not all(isinstance(text, str) for text in (prompt, *answers)) or not prompt.strip():
            continue
        looked_at += 1
        for side, answer in zip(found.values(), answers, strict=True):
            if answer.strip().startswith(prompt.strip()):
                side.append(i)
    sides = {side: at for side, at in found.items() if at and len(at) >= MOST * looked_at}
    if not sides:
        return None
    first = min(at[0] for at in sides.values())
    return (
        f"the texts of {' and '.join(sides)} begin with their own row's prompt (first: row {first}), which is "
        "put in front of them once more, as in TRL, and so trained twice: leave it out of the answers"
    )
