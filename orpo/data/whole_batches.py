"""A stream as dataloaders read it: equally many pairs for all ranks, and its place after each batch remembered."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from orpo.data.positions import own_copy
from orpo.data.together import together
from orpo.tokens.pretokenized import NOT_COUNTED

# Batches whose places are kept: a dataloader reads ahead of what is trained on by one.
KEPT = 4


class WholeBatches(IterableDataset):
    """A prepared stream, on several ranks filled up to whole batches with pairs that do not count.

    accelerate cuts a data set of this kind by example: every rank reads all of it and takes its part of each batch of
    all ranks. Of a ``datasets.IterableDataset`` it would give each rank files of its own, and ranks with more would
    wait for ever.

    Args:
        stream: a prepared ``datasets.IterableDataset``.
        batch_size: pairs of a batch of one rank.
        ranks: how many there are. They tokenize together, each a part of the rows.
    """

    def __init__(self, stream: Any, batch_size: int, ranks: int) -> None:
        self.batch_size, self.ranks = batch_size * ranks, ranks
        own = own_copy(stream)
        self.stream, self.has_places = stream if own is None else own, own is not None
        # (batches that are read, the state of the stream there)
        self._places: deque[tuple[int, dict[str, Any]]] = deque(maxlen=KEPT)
        self._start: tuple[int, dict[str, Any]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Called by the dataloader: a shuffled stream has another order in each epoch."""
        self.stream.set_epoch(epoch)

    def place(self, batches: int) -> dict[str, Any] | None:
        """The state of the stream after so many batches of this pass, as JSON knows it; None where it is not known.

        It is not known of a shuffle buffer, of what workers of a dataloader read, and of the last batch if the stream
        does not fill it.
        """
        return dict(self._places).get(batches)

    def go_on_after(self, batches: int, state: dict[str, Any]) -> None:
        """Lets the next pass begin after `batches`, in whose place short pairs stand, to be skipped.

        Args:
            state: of :meth:`place`. That of another epoch is not used: the pass begins with the stream then.
        """
        self._start = batches, state

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start, self._start = self._start, None
        self._places.clear()
        batches, iterator, example = 0, None, None
        if start is not None and start[1]["epoch"] == self.stream.epoch:
            self.stream.load_state_dict(start[1])
            iterator = iter(self.stream)
            example = self._next(iterator)
            # It would hold for each reading of this epoch.
            self.stream.load_state_dict(None)
        if example is None:
            # After its last pair there is none to stand for the others.
            iterator = iter(self.stream)
            example = self._next(iterator)
        else:
            batches, short = start[0], _shortened(example)
            for _ in range(batches * self.batch_size):
                yield short
        remembers = self.has_places and get_worker_info() is None
        pairs = batches * self.batch_size
        while example is not None:
            pairs += 1
            if remembers and pairs % self.batch_size == 0:
                self._places.append((pairs // self.batch_size, self.stream.state_dict()))
            yield example
            last, example = example, self._next(iterator)
        if self.ranks > 1:
            for _ in range(-pairs % self.batch_size):
                yield {**last, "pair_id": NOT_COUNTED}

    def _next(self, iterator: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        if self.ranks == 1:
            return next(iterator, None)
        with together():
            return next(iterator, None)


def _shortened(example: Mapping[str, Any]) -> dict[str, Any]:
    """A pair of at most two tokens a side, which costs little to make a batch of."""
    short = {name: value[:2] if isinstance(value, list) else value for name, value in example.items()}
    lengths = {name: min(value, 1) for name, value in example.items() if name.endswith("_prompt_length")}
    return {**short, **lengths}
