"""Makes pairs of answers that are marked good or bad one by one, as KTO's are."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from orpo.data.bad_rows import refuse_bad_rows, what_it_holds
from orpo.data.files.sources import as_dataset

COLUMNS = ("prompt", "completion", "label")
# What else the answers of a pair have in common: what is said to the model beside the prompt.
CONTEXT = ("system", "tools", "chat_template_kwargs")
# In files of text alone, as CSV is.
WRITTEN = {"true": True, "1": True, "false": False, "0": False}


def is_labelled(names: Any) -> bool:
    """Whether a data set with the columns `names`, by our names, holds single answers and no pairs."""
    return {"completion", "label"} <= set(names) and not {"chosen", "rejected"} & set(names)


def pair_by_prompt(data: Any, name: str, max_bad_rows: float, report: Callable[[str], None]) -> Any:
    """Makes pairs of a ``datasets.Dataset`` with ``prompt``, ``completion`` and ``label``.

    Of each prompt, with the same system message and tools, the first good answer goes with the first bad one, the
    second with the second, and so on. Other columns are the good answer's, and so is the order of the pairs.

    Args:
        name: what the report calls the data set.
        max_bad_rows: the largest share of rows that may hold something else.
        report: called with how many rows made how many pairs, and how many are left over.

    Raises:
        ValueError: `data` is a stream or lacks a column, or no prompt has both a good and a bad answer.
    """
    import datasets

    if isinstance(data, datasets.IterableDataset):
        raise ValueError(
            f"pair_by_prompt is set, and the {name} set is a stream: a prompt's other answers may come at its end; "
            "leave out dataset_streaming"
        )
    if missing := [column for column in COLUMNS if column not in data.column_names]:
        raise ValueError(f"pair_by_prompt is set, and the {name} set has no column {missing[0]!r}: {data.column_names}")
    answers: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    bad: list[str] = []
    rows = list(data)
    for number, row in enumerate(rows):
        label = _label(row)
        if label is None or row["prompt"] is None or row["completion"] is None:
            bad.append(f"row {number}: a prompt, a completion and a label of true or false are wanted; {_held(row)}")
        else:
            asked = [row["prompt"], *(row.get(column) for column in CONTEXT)]
            answers[json.dumps(asked, default=str)][not label].append(number)
    refuse_bad_rows(name, len(bad), len(rows), max_bad_rows, bad)
    pairs = sorted(pair for both in answers.values() for pair in zip(*both, strict=False))
    good, worse = (sum(len(both[side]) for both in answers.values()) - len(pairs) for side in (0, 1))
    said = f"{name}: {len(rows):,} answers to {len(answers):,} prompts make {len(pairs):,} pairs"
    left = [f"{good:,} good and {worse:,} bad answers have no other beside them"] if good or worse else []
    left += [f"{len(bad):,} malformed (first: {bad[0]})"] if bad else []
    said += f"; left out: {', '.join(left)}" if left else ""
    if not pairs:
        raise ValueError(f"no prompt of the {name} set has both a good and a bad answer: {said}")
    report(said)
    return as_dataset([_pair(rows[first], rows[second]) for first, second in pairs])


def _pair(good: Mapping[str, Any], bad: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in good.items() if name not in ("completion", "label")}
    return {**rest, "chosen": good["completion"], "rejected": bad["completion"]}


def _label(row: Mapping[str, Any]) -> bool | None:
    label = row["label"]
    if isinstance(label, str):
        return WRITTEN.get(label.strip().lower())
    return bool(label) if label in (True, False) else None


def _held(row: Mapping[str, Any]) -> str:
    label = "" if row["label"] is None or _label(row) is not None else f", its label is {row['label']!r:.20}"
    return what_it_holds({column: row[column] for column in COLUMNS}) + label
