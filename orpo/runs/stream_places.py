"""Where a run is in the stream that it trains on: in its checkpoints, and where it goes on after one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerState

from orpo.files import write_whole
from orpo.ranks import from_rank_0

# In a checkpoint, where the place is known.
PLACE = "stream_place.json"


class StreamPlaces(Trainer):
    """``Trainer`` that goes on in a stream after the rows that are done, and does not read them again where it can."""

    # Of the pairs to train on, where they are a stream: `place` and `go_on_after`, as orpo.data.whole_batches has them.
    _train_stream: Any = None

    def _go_on_in_stream(self, state: TrainerState, checkpoint: Path) -> tuple[int, int]:
        """(passes that are done, batches of the next one that are), the stream set to the place behind them.

        Args:
            state: of the run when it saved `checkpoint`.
        """
        passes, batches = self._position_in_stream(state)
        if self._train_stream is not None and batches:
            # Rank 0 decides: ranks that read together have to begin together.
            place = from_rank_0(self.accelerator, lambda: _read(checkpoint / PLACE))
            if place is not None:
                self._train_stream.go_on_after(batches, place)
        return passes, batches

    def _position_in_stream(self, state: TrainerState) -> tuple[int, int]:
        # Trainer does not know a stream's length, and takes all steps of the run for one epoch: in the second pass over
        # a stream, it would skip all batches of both passes in the first one, and begin the second from its first row.
        # The epoch that it noted is the number of finished passes, plus the last one's batches as a share of the run's.
        passes = math.ceil(state.epoch) - 1
        batches = round((state.epoch - passes) * state.max_steps * self.args.gradient_accumulation_steps)
        return passes, 0 if self.args.ignore_data_skip else batches

    def _save_rng_state(self, output_dir: str) -> None:
        """``Trainer``'s; beside the random states, the place in the stream."""
        super()._save_rng_state(output_dir)
        if self._train_stream is None or not self.args.should_save:
            return
        _, batches = self._position_in_stream(self.state)
        if (place := self._train_stream.place(batches)) is not None:
            write_whole(Path(output_dir, PLACE), json.dumps(place) + "\n")


def _read(file: Path) -> dict[str, Any] | None:
    """The state of a stream; None for a checkpoint without it."""
    return json.loads(file.read_text("utf-8")) if file.is_file() else None
