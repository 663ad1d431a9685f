"""Checks a data set that comes tokenized, and adds the column ``length`` where it lacks one."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

COLUMNS = ("chosen_input_ids", "rejected_input_ids", "chosen_prompt_length", "rejected_prompt_length")
# Optional: 1 for a token of the answer, which both terms score; 0 for another, such as a tool's result, which only an
# NLL over the prompt scores; -1 for one that neither scores. An empty mask, or null, means 0 in the prompt, then 1.
MASKS = ("chosen_mask", "rejected_mask")
# The pair_id of a pair that only fills the last batch of a stream: no row of it reaches the loss.
NOT_COUNTED = -2
_REMEDY = "leave out such rows, data.filter(...)"


def checked(data: Any, name: str) -> Any:
    """`data` with the column ``length``, the tokens of both sequences together. A stream is checked when it is read.

    Args:
        data: a ``datasets.Dataset`` or ``IterableDataset`` with the columns of :data:`COLUMNS`, and perhaps of
            :data:`MASKS`.
        name: what errors call it.

    Raises:
        ValueError: a column is of another type, or a row holds null, a negative id, no answer, two equal answers, a
            prompt longer than its sequence, a mask that does not fit it, or another ``length`` than its own. The
            message names column and row.
    """
    import datasets

    if isinstance(data, datasets.IterableDataset):

        def add_length(rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[int]]:
            return {"length": _lengths(pa.table(rows), name, indices[0])}

        return data.map(add_length, batched=True, with_indices=True)
    lengths: list[int] = []
    for table in data.with_format("arrow").iter(1000):
        lengths += _lengths(table, name, len(lengths))
    return data if "length" in data.column_names else data.add_column("length", lengths)


def _lengths(table: pa.Table, name: str, first: int) -> list[int]:
    """Tokens of both sequences of each row; `first` is the number of the table's first row, from 0."""
    total: Any = 0
    sides: list[Any] = []
    for side in ("chosen", "rejected"):
        ids, prompt = (table.column(f"{side}_{part}").combine_chunks() for part in ("input_ids", "prompt_length"))
        if not (_is_list(ids.type) and pa.types.is_integer(ids.type.value_type)):
            raise ValueError(f"{name}: {side}_input_ids holds {ids.type}; it has to hold lists of whole numbers")
        if not pa.types.is_integer(prompt.type):
            raise ValueError(f"{name}: {side}_prompt_length holds {prompt.type}; it has to hold whole numbers")
        flat, sizes = pc.list_flatten(ids), pc.list_value_length(ids)
        is_whole = not (ids.null_count or flat.null_count or prompt.null_count)
        if not is_whole or not _fits(flat, sizes, prompt):
            _refuse(ids.to_pylist(), prompt.to_pylist(), name, side, first)
        if f"{side}_mask" in table.column_names:
            masks = table.column(f"{side}_mask").to_pylist()
            _check_masks(masks, sizes.to_pylist(), prompt.to_pylist(), name, side, first)
        total = pc.add(pc.cast(sizes, pa.int64()), total)
        sides += [(ids, sizes, prompt)]
    lengths = total.to_pylist()
    (ids, sizes, prompt), (other_ids, *other) = sides
    alike = pc.and_(pc.equal(sizes, other[0]), pc.equal(prompt, other[1])).to_pylist()
    for row in (row for row, same in enumerate(alike) if same):
        if ids[row].as_py() == other_ids[row].as_py():
            raise ValueError(f"{name}: row {first + row} cannot be trained on: its two answers are equal; {_REMEDY}")
    given = table.column("length").to_pylist() if "length" in table.column_names else lengths
    for row, (said, own) in enumerate(zip(given, lengths, strict=True), first):
        if said != own:
            raise ValueError(
                f"{name}: row {row} has the length {said}, and its two sequences have {own} tokens together: leave out "
                "the column 'length', which is made where there is none"
            )
    return lengths


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _fits(flat: Any, sizes: Any, prompt: Any) -> bool:
    negative = len(flat) and pc.min(flat).as_py() < 0
    beyond = pc.any(pc.or_(pc.less(prompt, 0), pc.greater_equal(prompt, sizes))).as_py()
    return not (negative or beyond or pc.any(pc.less(sizes, 2)).as_py())


def _refuse(ids: list[Any], prompts: list[Any], name: str, side: str, first: int) -> None:
    for row, (tokens, prompt) in enumerate(zip(ids, prompts, strict=True), first):
        if tokens is None or prompt is None or None in tokens:
            problem = f"{side}_input_ids or {side}_prompt_length holds null"
        elif not tokens:
            problem = f"{side}_input_ids holds no token"
        elif min(tokens) < 0:
            problem = f"{side}_input_ids holds {min(tokens)}; an id is 0 or more, and padding does not belong there"
        elif not 0 <= prompt <= len(tokens):
            problem = f"{side}_prompt_length is {prompt}, of {side}_input_ids' {len(tokens)} tokens, prompt included"
        elif max(prompt, 1) == len(tokens):
            # No token predicts a sequence's first one.
            problem = f"the {side} answer is empty, {side}_prompt_length {prompt} of {len(tokens)} tokens; {_REMEDY}"
        else:
            continue
        raise ValueError(f"{name}: row {row} cannot be trained on: {problem}")


def _check_masks(masks: list[Any], sizes: list[int], prompts: list[int], name: str, side: str, first: int) -> None:
    for row, (mask, size, prompt) in enumerate(zip(masks, sizes, prompts, strict=True), first):
        if mask is None:
            # Sets with masks and without, joined.
            continue
        if len(mask) not in (0, size):
            problem = f"holds {len(mask)} values for {size} tokens"
        elif not set(mask) <= {-1, 0, 1}:
            problem = f"holds {next(v for v in mask if v not in (-1, 0, 1))!r}; it has to hold 1, 0 and -1"
        elif 1 in mask[:prompt]:
            problem = f"scores token {mask.index(1)}, which is among the {prompt} of the prompt"
        elif mask and 1 not in mask[1:]:
            problem = f"scores no token that another precedes; {_REMEDY}"
        else:
            continue
        raise ValueError(f"{name}: row {row} cannot be trained on: {side}_mask {problem}")
