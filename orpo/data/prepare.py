"""Turns a data set of pairs into one of tokens, and reports what was dropped and why.

A prepared data set has six columns: ``chosen_input_ids`` and ``rejected_input_ids`` (prompt and answer in one list),
``chosen_prompt_length`` and ``rejected_prompt_length`` (tokens before the answer), ``length`` (of both sequences
together), and ``pair_id`` (the row in the given data set). Where some of an answer is not scored there are
``chosen_mask`` and ``rejected_mask`` too (:data:`orpo.tokens.pretokenized.MASKS`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from orpo.data.account import ACCOUNT, read_account
from orpo.data.files.sources import as_dataset
from orpo.data.first_rows import ROWS, check_first_rows, report_first_rows
from orpo.data.forms.columns import renamed, with_our_names
from orpo.data.forms.formats import check_columns
from orpo.data.forms.unusable import REASONS
from orpo.data.labelled import is_labelled, pair_by_prompt
from orpo.data.masks import empty_masks, features, without_empty_masks
from orpo.data.pair_tokens import PairTokenizer
from orpo.data.prepared import check_prepared, mark
from orpo.data.streams import ATTRIBUTE, DropCounter
from orpo.data.together import SharedTokenizer
from orpo.tokens.limits import Limits
from orpo.tokens.pretokenized import COLUMNS
from orpo.tokens.special_tokens import describe_written

# Rows of a stream that are tokenized at once. A run that resumes reads up to so many again.
ROWS_OF_A_STREAM = 256


def prepare_dataset(
    data: Any,
    tokenizer: Any,
    limits: Limits,
    *,
    name: str = "train",
    num_proc: int | None = None,
    escape_special_tokens: bool = False,
    columns: Mapping[str, str] | None = None,
    score_turns: str = "all",
    max_bad_rows: float = 0.01,
    pair_answers: bool = False,
    pair_tokenizer: type[PairTokenizer] = PairTokenizer,
    report: Callable[[str], None] = print,
) -> Any:
    """Tokenizes `data` and drops the rows that cannot train, saying how many and why.

    Args:
        data: anything that :func:`as_dataset` takes, in any form of :mod:`orpo.data.forms.formats` or
            :mod:`orpo.data.forms.columns`, or prepared already.
        tokenizer: a Hugging Face tokenizer.
        limits: lengths in tokens.
        name: what the report calls this data set.
        num_proc: processes that tokenize. The result is cached by ``datasets`` where the data set lies on disk.
        escape_special_tokens: whether special tokens written out in the rows' text stay text (:class:`PairTokenizer`).
        columns: our name -> the column's, of columns that have other names.
        score_turns: "all" of the assistant's turns of an answer, or the "last".
        max_bad_rows: the largest share of rows that may be malformed (:data:`orpo.data.forms.unusable.BAD`) and left
            out.
        pair_answers: whether rows of one answer each, good or bad, are paired by prompt (:mod:`orpo.data.labelled`).
        pair_tokenizer: the class that turns text pairs into token pairs.
        report: called with the report, which counts rows from 0. A stream is counted as it is read:
            :class:`orpo.data.streams.StreamReport` says when.

    Raises:
        ValueError: `data` has no known form, too many rows are malformed, or no row is left. For a stream
            :func:`orpo.data.preview.first_pair` finds that.
    """
    import datasets

    data = as_dataset(data)
    # A stream that was mapped does not know its columns: read them off its first rows.
    names = data.column_names or list(dict.fromkeys(name for row in islice(data, ROWS) for name in row))
    if set(COLUMNS) <= set(names):
        return check_prepared(
            data, tokenizer, limits, name, report, joined=pair_tokenizer.joined, score_turns=score_turns
        )
    if pair_answers and is_labelled(renamed(dict.fromkeys(names), columns)):
        data, columns = pair_by_prompt(with_our_names(data, columns), name, max_bad_rows, report), None
        names = data.column_names
    options = {"escape": escape_special_tokens, "columns": columns, "score_turns": score_turns}
    tokenize = pair_tokenizer(tokenizer, limits, **options)
    is_stream = isinstance(data, datasets.IterableDataset)
    if not is_stream and not len(data):
        raise ValueError(f"the {name} set holds no rows")
    check_columns(renamed(dict.fromkeys(names), columns, f"the {name} set").keys())
    check_first_rows(tokenize, data, names, name, max_bad_rows)
    if is_stream:
        tokenize = functools.partial(without_empty_masks, SharedTokenizer(tokenize))
        tokenized = data.map(
            tokenize, batched=True, batch_size=ROWS_OF_A_STREAM, with_indices=True, remove_columns=names
        )
        report(f"{name}: a stream; rows that cannot train are left out as they come, and counted after each epoch")
        report_first_rows(data, tokenizer, columns, lambda said: report(f"{name}: {said}"))
        counter = DropCounter(name, (*REASONS, *limits.reasons), escape_special_tokens, max_bad_rows)
        prepared = tokenized.filter(counter).remove_columns([*ACCOUNT])
        setattr(prepared, ATTRIBUTE, counter)
        return prepared
    tokenized = data.map(
        tokenize,
        batched=True,
        with_indices=True,
        remove_columns=names,
        features=features(ACCOUNT),
        num_proc=num_proc,
        desc=f"Tokenizing the {name} set",
    )
    summary, dropped, written = read_account(tokenized, name, len(data), max_bad_rows)
    report(summary)
    if written:
        row, token = written[0]
        report(f"{name}: {describe_written(len(written), escape_special_tokens, f'row {row}, {token!r}')}")
    report_first_rows(data, tokenizer, columns, lambda said: report(f"{name}: {said}"))
    kept = tokenized.filter(_is_kept, num_proc=num_proc, desc=f"Filtering the {name} set") if dropped else tokenized
    prepared = kept.remove_columns([*ACCOUNT, *empty_masks(kept)])
    mark(prepared, tokenizer, limits, score_turns, summary.removeprefix(f"{name}: "))
    return prepared


def _is_kept(example: Mapping[str, Any]) -> bool:
    return not example["dropped"]
