"""Looks at a prepared data set before training: its first pair, and whether the model knows its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

from orpo.data.streams import counters, summarize


def first_pair(data: Any) -> dict[str, Any]:
    """The first pair of a prepared data set.

    Raises:
        ValueError: it is a stream in which no row can train.
    """
    pair = next(iter(data), None)
    if pair is None:
        drops = [summarize(counter.name, *counter.take()) for counter in counters(data)]
        raise ValueError(f"no row of the stream can train: {'; '.join(drops)}")
    return pair


def check_stream(data: Any) -> None:
    """Refuses a prepared stream in which no row can train. None and other data sets pass.

    Raises:
        ValueError: the message says what was dropped.
    """
    first_of_stream(data)


def first_of_stream(data: Any) -> dict[str, Any] | None:
    """The first pair of a prepared stream; None for other data sets."""
    if data is None or hasattr(data, "__len__"):
        return None
    pair = first_pair(data)
    for counter in counters(data):
        # Not counted: it will be read again.
        counter.take()
    return pair


def check_token_ids(data: Any, vocabulary: int) -> None:
    """Refuses a prepared data set with tokens that the model has no embedding for. A stream passes.

    Raises:
        ValueError: the message has the largest id and the number of embeddings.
    """
    import pyarrow.compute as pc

    if not hasattr(data, "data"):
        return
    for side in ("chosen", "rejected"):
        largest = pc.max(pc.list_flatten(data.data.column(f"{side}_input_ids"))).as_py()
        if largest is not None and largest >= vocabulary:
            raise ValueError(
                f"the data set holds token id {largest}, and the model has {vocabulary} embeddings: it needs its own "
                "tokenizer, or model.resize_token_embeddings(len(tokenizer))"
            )


def describe_example(example: Mapping[str, Any], layout: Callable[..., dict[str, Any]], tokenizer: Any) -> str:
    """One pair, decoded, as each term of the loss scores it, read off the rows of a batch by `layout`.

    Text of an answer that is not scored is shown too. Stretches with other text between them are shown one by one.
    """
    batch = layout([example])
    rows = batch["orpo"].rows
    chosen = rows.sequence_N == 0
    kept = {
        "NLL": rows.in_nll_N,
        "odds ratio, chosen": rows.in_response_N & chosen,
        "odds ratio, rejected": rows.in_response_N & ~chosen,
    }
    shown = {label: (rows.rows_N[own].tolist(), rows.targets_N[own].tolist()) for label, own in kept.items()}
    if "labels" in batch:
        # The rows of the loss do not hold an encoder-decoder's prompt.
        prompt = batch["input_ids"][0].tolist()
        shown = {"nothing (encoder)": ([*range(len(prompt))], prompt), **shown}
    for side in ("chosen", "rejected"):
        ids, mask = example[f"{side}_input_ids"], example.get(f"{side}_mask") or ()
        unscored = [at for at in range(example[f"{side}_prompt_length"], len(mask)) if mask[at] != 1]
        if unscored:
            shown[f"not scored, {side}"] = unscored, [ids[at] for at in unscored]
    lines = (
        f"  {label:<20} {len(at):>5} tokens  {_stretches(at, ids, tokenizer)}" for label, (at, ids) in shown.items()
    )
    return "what each term scores, in the first pair:\n" + "\n".join(lines)


def _stretches(places: list[int], ids: list[int], tokenizer: Any) -> str:
    """The text of the tokens `ids` at `places`, with a sign where tokens between them are left out."""
    runs = groupby(enumerate(places), lambda pair: pair[1] - pair[0])
    return " … ".join(repr(tokenizer.decode([ids[at] for at, _ in run])) for _, run in runs) or repr("")
