"""How many rows of a stream could not train, and why: counted as they come, printed when an epoch or the run ends."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from orpo.tokens.special_tokens import describe_written

ATTRIBUTE = "orpo_drop_counter"


class DropCounter:
    """The filter of a stream, which counts what passes through it.

    The counts lie in shared memory, one row for each dataloader worker, so that workers, which read the stream in
    processes of their own, are counted too. What cannot be known: a run that stops before the stream ends has read some
    rows ahead, which are counted though no step used them; and each rank counts what it has read itself.

    Args:
        name: what the report calls the data set.
        reasons: every reason for which a row can be dropped.
        escaped: whether special tokens in the rows' text stay text.
        workers: processes that read the stream at once, at most.
    """

    def __init__(self, name: str, reasons: Sequence[str], escaped: bool = False, workers: int = 256) -> None:
        self.name, self.reasons, self.escaped = name, ("", *reasons), escaped
        self.written_W = torch.zeros(workers, dtype=torch.int64).share_memory_()
        self.counts_WR = torch.zeros(workers, len(self.reasons), dtype=torch.int64).share_memory_()

    def __call__(self, example: Mapping[str, Any]) -> bool:
        if example["detail"]:
            # Once for each text, and from the process that reads: the counts alone are shared.
            warnings.warn(f"{self.name}: {example['dropped']}: {example['detail']}", stacklevel=2)
        info = torch.utils.data.get_worker_info()
        worker = 0 if info is None else info.id
        self.counts_WR[worker, self.reasons.index(example["dropped"])] += 1
        self.written_W[worker] += bool(example["written_out"] and not example["dropped"])
        return not example["dropped"]

    def take(self) -> tuple[int, Counter[str]]:
        """(rows read, rows dropped by reason) since the last call."""
        counts = self.counts_WR.sum(0).tolist()
        self.counts_WR.zero_()
        self.written_W.zero_()
        dropped = Counter({reason: n for reason, n in zip(self.reasons, counts, strict=True) if reason and n})
        return sum(counts), dropped


class StreamReport(TrainerCallback):
    """Prints what was dropped from streams: of training at the end of each epoch, of evaluation after each one."""

    def __init__(self, train: Sequence[DropCounter], evaluation: Sequence[DropCounter]) -> None:
        self.train, self.evaluation = train, evaluation

    @staticmethod
    def _print(counters: Sequence[DropCounter], args: Any) -> None:
        for counter in counters:
            written = int(counter.written_W.sum())
            rows, dropped = counter.take()
            if written and args.should_log:
                print(f"{counter.name}, a stream: {describe_written(written, counter.escaped)}")
            if rows and args.should_log:
                print(summarize(f"{counter.name}, a stream, so far as it was read", rows, dropped))

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        # The first pair was read before, to be shown.
        for counter in self.train:
            counter.take()

    def on_epoch_end(self, args: Any, *_: Any, **__: Any) -> None:
        self._print(self.train, args)

    def on_train_end(self, args: Any, *_: Any, **__: Any) -> None:
        self._print(self.train, args)

    def on_evaluate(self, args: Any, *_: Any, **__: Any) -> None:
        self._print(self.evaluation, args)

    on_predict = on_evaluate

    @contextmanager
    def counting(self, data: Any) -> Iterator[None]:
        """Counts prepared `data` too, which are evaluated in the block."""
        before = self.evaluation
        self.evaluation = [*before, *(counter for counter in counters(data) if counter not in before)]
        try:
            yield
        finally:
            self.evaluation = before


def counters(data: Any) -> list[DropCounter]:
    """The counters of a prepared data set, or of a dict of them; none for data sets that are counted already."""
    parts = data.values() if isinstance(data, dict) else [data]
    return [getattr(part, ATTRIBUTE) for part in parts if hasattr(part, ATTRIBUTE)]


def summarize(name: str, total: int, reasons: Counter[str], first: Mapping[str, str] | None = None) -> str:
    """For example "train: kept 1,771 of 1,800: 4 empty answers (first: row 7), 25 prompts of 512 tokens or more".

    Args:
        name: of the data set.
        total: its rows.
        reasons: rows dropped by reason.
        first: what to say of the first row that each reason dropped; not every reason has to be there.
    """
    text = f"{name}: kept {total - reasons.total():,} of {total:,}"
    if not reasons:
        return text
    parts = []
    for reason, n in reasons.most_common():
        known = (first or {}).get(reason)
        where = "" if known is None else f" ({known})" if n == 1 else f" (first: {known})"
        parts.append(f"{n:,} {reason if n == 1 else _plural(reason)}{where}")
    return f"{text}: {', '.join(parts)}"


def _plural(reason: str) -> str:
    first, _, rest = reason.partition(" ")
    return f"{reason}s" if first == "empty" else f"{first}s {rest}"
