"""Counts the rows of a stream that cannot train as they are read, and prints them when an epoch or the run ends."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from orpo.data.account import CUT, is_cut, summarize
from orpo.data.bad_rows import LEAST_ROWS, SHOWN, refuse_bad_rows
from orpo.data.forms.unusable import BAD
from orpo.tokens.special_tokens import describe_written

ATTRIBUTE = "orpo_drop_counter"


class DropCounter:
    """The filter of a stream, which counts what passes through it.

    The counts lie in shared memory, one row for each dataloader worker, since workers read the stream in their own
    processes. A run that stops before the stream ends also counts rows that were read ahead and not used; each rank
    counts only what it has read itself.

    Args:
        name: what the report calls the data set.
        reasons: every reason for which a row can be dropped.
        escaped: whether special tokens in the rows' text stay text.
        max_bad_rows: the largest share of malformed rows in what one worker has read, from ``LEAST_ROWS`` rows on.
        workers: most processes that read the stream at once.

    Raises:
        ValueError: when it is called, more rows than `max_bad_rows` are malformed.
    """

    def __init__(
        self,
        name: str,
        reasons: Sequence[str],
        escaped: bool = False,
        max_bad_rows: float = 1.0,
        workers: int = 256,
    ) -> None:
        self.name, self.reasons, self.escaped, self.max_bad_rows = name, ("", *reasons), escaped, max_bad_rows
        self.bad = [i for i, reason in enumerate(self.reasons) if reason in BAD]
        self.first_bad: list[str] = []
        self.cut_WC = torch.zeros(workers, len(CUT), dtype=torch.int64).share_memory_()
        self.written_W = torch.zeros(workers, dtype=torch.int64).share_memory_()
        self.counts_WR = torch.zeros(workers, len(self.reasons), dtype=torch.int64).share_memory_()

    def __call__(self, example: Mapping[str, Any]) -> bool:
        reason = example["dropped"]
        if detail := example["detail"]:
            # Said by the process that reads, once for each text, since only counts are shared.
            where = f" (row {example['pair_id']})" if reason in BAD else ""
            warnings.warn(f"{self.name}: {reason}: {detail}{where}", stacklevel=2)
        info = torch.utils.data.get_worker_info()
        worker = 0 if info is None else info.id
        self.counts_WR[worker, self.reasons.index(reason)] += 1
        if reason in BAD:
            if len(self.first_bad) < SHOWN:
                self.first_bad.append(f"row {example['pair_id']}: {reason}: {example['detail']}")
            read, bad = int(self.counts_WR[worker].sum()), int(self.counts_WR[worker, self.bad].sum())
            if read >= LEAST_ROWS:
                refuse_bad_rows(
                    f"{self.name}, a stream, so far as it was read", bad, read, self.max_bad_rows, self.first_bad
                )
        if not reason:
            self.cut_WC[worker] += torch.tensor([is_cut(example["cut"], part) for part in CUT])
        self.written_W[worker] += bool(example["written_out"] and not example["dropped"])
        return not reason

    def take(self) -> tuple[int, Counter[str], Counter[str]]:
        """(rows read, rows dropped by reason, parts cut of kept rows) since the last call."""
        counts, cut = self.counts_WR.sum(0).tolist(), self.cut_WC.sum(0).tolist()
        self.counts_WR.zero_()
        self.cut_WC.zero_()
        self.written_W.zero_()
        dropped = Counter({reason: n for reason, n in zip(self.reasons, counts, strict=True) if reason and n})
        return sum(counts), dropped, Counter(dict(zip(CUT, cut, strict=True)))


class StreamReport(TrainerCallback):
    """Prints what was dropped from streams, at the end of each epoch and after each evaluation."""

    def __init__(self, train: Sequence[DropCounter], evaluation: Sequence[DropCounter]) -> None:
        self.train, self.evaluation = train, evaluation

    @staticmethod
    def _print(counters: Sequence[DropCounter], args: Any) -> None:
        for counter in counters:
            written = int(counter.written_W.sum())
            rows, dropped, cut = counter.take()
            if written and args.should_log:
                print(f"{counter.name}, a stream: {describe_written(written, counter.escaped)}")
            if rows and args.should_log:
                print(summarize(f"{counter.name}, a stream, so far as it was read", rows, dropped, cut))

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        # Forget the first pair, which was read to be shown.
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
        """Reports also on prepared `data` that are evaluated in the block."""
        before = self.evaluation
        self.evaluation = [*before, *(counter for counter in counters(data) if counter not in before)]
        try:
            yield
        finally:
            self.evaluation = before


def counters(data: Any) -> list[DropCounter]:
    """The counters of a prepared data set or of a dict of them. Data sets that are no streams have none."""
    parts = data.values() if isinstance(data, dict) else [data]
    return [getattr(part, ATTRIBUTE) for part in parts if hasattr(part, ATTRIBUTE)]
