"""What became of each pair: which were left out and why, what is cut of the others, and the line that says so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from orpo.data.bad_rows import refuse_bad_rows
from orpo.data.forms.unusable import BAD

# Columns, with their types, that pairs have until those that cannot train are dropped: the reason, what else is known
# of the row, a special token in its text, and which parts are cut.
ACCOUNT = {"dropped": "string", "detail": "string", "written_out": "string", "cut": "int64"}

# The parts of a kept pair that may be cut; each is a bit of the column `cut`.
CUT = ("chosen", "rejected", "prompt")

Side = tuple[list[int], list[int]]


def what_is_cut(whole: Sequence[Side], kept: Sequence[Side]) -> int:
    """The bits of :data:`CUT` for a pair. `whole` and `kept` hold (prompt tokens, answer tokens) of both sides."""
    answers = [len(b) < len(a) for (_, a), (_, b) in zip(whole, kept, strict=True)]
    prompt = any(len(b) < len(a) for (a, _), (b, _) in zip(whole, kept, strict=True))
    return sum(lost << bit for bit, lost in enumerate([*answers, prompt]))


def is_cut(bits: int, part: str) -> bool:
    """Whether `bits` say that `part`, one of :data:`CUT`, is cut."""
    return bool(bits >> CUT.index(part) & 1)


def read_account(tokenized: Any, name: str, rows: int, max_bad_rows: float) -> tuple[str, int, list[tuple[int, str]]]:
    """Sums up the columns of :data:`ACCOUNT`.

    Args:
        tokenized: a data set with these columns and ``pair_id``.
        name: what the summary calls it.
        rows: how many rows the pairs were made of.
        max_bad_rows: the largest share of malformed pairs.

    Returns:
        the summary, how many pairs are left out, and (row, special token) of each kept pair with one in its text.

    Raises:
        ValueError: more pairs are malformed, or none is left.
    """
    reasons: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    first: dict[str, str] = {}
    written: list[tuple[int, str]] = []
    bad: list[str] = []
    columns = (tokenized[column] for column in ("pair_id", *ACCOUNT))
    for row, reason, detail, token, bits in zip(*columns, strict=True):
        if not reason:
            cut.update(part for part in CUT if is_cut(bits, part))
            written += [(row, token)] if token else []
            continue
        reasons[reason] += 1
        first.setdefault(reason, f"row {row}, {detail}" if detail else f"row {row}")
        if reason in BAD:
            bad.append(f"row {row}: {reason}: {detail}")
    refuse_bad_rows(name, len(bad), len(tokenized), max_bad_rows, bad)
    summary = summarize(name, len(tokenized), reasons, cut, first, rows)
    if reasons.total() == len(tokenized):
        raise ValueError(f"no row of the {name} set can train: {summary}")
    return summary, reasons.total(), written


def summarize(
    name: str,
    total: int,
    reasons: Counter[str],
    cut: Counter[str],
    first: Mapping[str, str] | None = None,
    rows: int | None = None,
) -> str:
    """For example "train: kept 1,771 of 1,800: 4 empty answers (first: row 7), 25 prompts of 512 tokens or more".

    Args:
        name: of the data set.
        total: how many pairs it has.
        reasons: how many pairs each reason dropped.
        cut: how many of the kept pairs each part is cut of.
        first: for each reason, or some, words about the first row that it dropped.
        rows: how many rows the pairs were made of, if known.
    """
    parts = []
    for reason, n in reasons.most_common():
        known = (first or {}).get(reason)
        where = "" if known is None else f" ({known})" if n == 1 else f" (first: {known})"
        parts.append(f"{n:,} {reason if n == 1 else _plural(reason)}{where}")
    made = f" pairs, made of {rows:,} rows" if rows not in (None, total) else ""
    text = f"{name}: kept {total - reasons.total():,} of {total:,}{made}{': ' if parts else ''}{', '.join(parts)}"
    chosen, rejected, prompts = (cut[part] for part in CUT)
    said = []
    if prompts:
        said.append(f"{prompts:,} prompt{'s are' if prompts > 1 else ' is'} cut")
    if chosen or rejected:
        said.append(f"{chosen:,} chosen and {rejected:,} rejected answers are cut, without their end")
    return f"{text}; of the kept, {', and '.join(said)}" if said else text


def _plural(reason: str) -> str:
    first, _, rest = reason.partition(" ")
    return f"{reason}s" if first in ("empty", "malformed") else f"{first}s {rest}"
