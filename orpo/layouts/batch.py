"""What the loss needs of a batch in any layout: the rows that count, and how many there are.

Letters: P pairs, S = 2P sequences (chosen first, then rejected), T tokens of a sequence, N kept rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from orpo_kernels.rows import Rows
from torch import Tensor

from orpo.ranks import data_ranks
from orpo.tokens.pretokenized import NOT_COUNTED

NLL_SPANS = ("prompt_and_chosen", "chosen")


@dataclass(frozen=True)
class NLLSpan:
    """Which tokens of the chosen sequence the NLL scores.

    Attributes:
        prompt: score the prompt as well as the answer (TRL and the paper's code).
        skip_token_id: a token that the NLL never scores, or None. The paper's code masks every end-of-sequence token.
    """

    prompt: bool = True
    skip_token_id: int | None = None


WHOLE_CHOSEN = NLLSpan()


class Counts(NamedTuple):
    """The denominators of means: NLL tokens, pairs, rows of chosen and of rejected sequences; or shares of these."""

    nll_tokens: float
    pairs: float
    chosen_rows: float
    rejected_rows: float


@dataclass(frozen=True)
class PairBatch:
    """What the loss needs of a batch besides hidden states.

    Attributes:
        rows: the five row arrays.
        num_nll_tokens: rows that the NLL scores.
        num_pairs: pairs whose answers both have tokens.
        pair_ids: int64 (P,), each pair's position in the prepared data set; -1 where it has none,
            ``NOT_COUNTED`` where it fills the last batch of a stream.
        num_chosen_rows: rows of chosen sequences; the others are those of rejected ones.

    The counts are Python numbers, since reading them off a device would stall it.
    """

    rows: Rows
    num_nll_tokens: int
    num_pairs: int
    pair_ids: Tensor
    num_chosen_rows: int

    @property
    def counts(self) -> Counts:
        """All counts, for the means."""
        rejected = len(self.rows.rows_N) - self.num_chosen_rows
        return Counts(self.num_nll_tokens, self.num_pairs, self.num_chosen_rows, rejected)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        """The same batch with its row arrays on `device`; `pair_ids` stay where they are."""
        return replace(self, rows=self.rows.to(device, non_blocking))

    def first(self, pairs: int) -> PairBatch:
        """The same batch with rows of its first `pairs` pairs only. Reads counts off the device."""
        r = self.rows
        kept = r.sequence_N % r.pairs < pairs
        rows = r.map(lambda array: array[kept])
        answered = torch.zeros(2 * r.pairs, dtype=torch.bool, device=kept.device)
        answered[rows.sequence_N[rows.in_response_N]] = True
        num_pairs = int(answered.reshape(2, r.pairs).all(dim=0).sum())
        chosen = int((rows.sequence_N < r.pairs).sum())
        return PairBatch(rows, int(rows.in_nll_N.sum()), num_pairs, self.pair_ids, chosen)

    def pin_memory(self) -> PairBatch:
        """The same batch in page-locked memory. torch's DataLoader calls this by name."""
        return replace(self, rows=self.rows.map(Tensor.pin_memory))


class RowBuilder:
    """Collects the rows of a batch, one sequence after the other."""

    def __init__(self, pairs: int, nll: NLLSpan) -> None:
        self.pairs = pairs
        self.nll = nll
        self.columns: list[tuple[np.ndarray, ...]] = []
        self.response_tokens = np.zeros(2 * pairs, dtype=np.int64)

    def add(
        self, sequence: int, source_T: np.ndarray, ids_T: np.ndarray, prompt_length: int, mask_T: np.ndarray | None
    ) -> None:
        """Adds sequence number `sequence` (rejected: ``pairs + p``); call in ascending order.

        Args:
            source_T: int64 (T,), where the hidden state of each token lies in ``hidden.reshape(-1, D)``.
            ids_T: int64 (T,), the tokens. Token t is predicted from the hidden state of token t - 1.
            prompt_length: tokens before the answer.
            mask_T: int8 (T,), 1 for tokens of the answer, 0 for others, -1 for those that the NLL leaves out even where
                it scores the prompt. None: all that follows the prompt is the answer.
        """
        targets = ids_T[1:]
        response = np.arange(1, len(ids_T)) >= prompt_length
        if mask_T is not None:
            response = response & (mask_T[1:] > 0)
        scored = np.zeros_like(response)
        if sequence < self.pairs:
            scored = response | self.nll.prompt
            if mask_T is not None:
                scored = scored & (mask_T[1:] >= 0)
            if self.nll.skip_token_id is not None:
                scored = scored & (targets != self.nll.skip_token_id)
        kept = response | scored
        sequence_N = np.full(int(kept.sum()), sequence, dtype=np.int64)
        self.columns.append((source_T[:-1][kept], targets[kept], sequence_N, response[kept], scored[kept]))
        self.response_tokens[sequence] = response.sum()

    def build(self, pair_ids: Iterable[int]) -> PairBatch:
        """The rows collected so far as one batch. Pairs whose id is ``NOT_COUNTED`` stand at its end, without rows."""
        ids = list(pair_ids)
        rows, targets, sequence, response, scored = (np.concatenate(c) for c in zip(*self.columns, strict=True))
        both_sides = (self.response_tokens.reshape(2, self.pairs) > 0).all(axis=0)
        batch = PairBatch(
            rows=Rows(
                *(torch.from_numpy(a.astype(np.int64)) for a in (rows, targets, sequence)),
                *(torch.from_numpy(a.astype(bool)) for a in (response, scored)),
                pairs=self.pairs,
            ),
            num_nll_tokens=int(scored.sum()),
            num_pairs=int(both_sides.sum()),
            pair_ids=torch.tensor(ids, dtype=torch.int64),
            num_chosen_rows=int((sequence < self.pairs).sum()),
        )
        return batch.first(ids.index(NOT_COUNTED)) if NOT_COUNTED in ids else batch


def pair_batch(inputs: Mapping[str, Any]) -> PairBatch:
    """The :class:`PairBatch` in a collated batch.

    Raises:
        ValueError: the collator has put none in.
    """
    batch = inputs.get("orpo")
    if not isinstance(batch, PairBatch):
        raise ValueError(
            f"a batch has to hold 'orpo', a PairBatch; this data_collator gives {sorted(inputs)}. "
            "See orpo.layouts.layout for what a collator returns"
        )
    return batch


def without_repeats(batch: PairBatch, accelerator: Accelerator) -> PairBatch:
    """`batch` without the pairs that accelerate repeats to give all ranks equally many in the last batch."""
    loader = accelerator.gradient_state
    ranks = data_ranks(accelerator.parallelism_config, accelerator.num_processes)
    if ranks == 1 or not loader.end_of_dataloader or loader.remainder <= 0:
        return batch
    own = loader.remainder - accelerator.process_index * ranks // accelerator.num_processes * batch.rows.pairs
    return batch.first(min(max(own, 0), batch.rows.pairs))
