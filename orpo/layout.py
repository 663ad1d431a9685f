"""How tokenized pairs become one batch: the model's inputs, and the rows of hidden states that the loss reads.

Letters: P pairs, S = 2P sequences (chosen first, then rejected), T positions, N kept rows.

A layout is a callable ``list of examples -> batch``; an example is one row of :func:`orpo.data.prepare_dataset`.
Whatever the arrangement of tokens in memory, the loss sees the five arrays of :class:`orpo_kernels.rows.Rows` and the
trainer two counts, so that neither knows which layout made a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from orpo_kernels.rows import Rows
from torch import Tensor

from orpo.attention import CHOSEN, PROMPT, REJECTED, SharedPrefixMask

NLL_SPANS = ("prompt_and_chosen", "chosen")


@dataclass(frozen=True)
class NLLSpan:
    """Which tokens of the chosen sequence the NLL scores.

    Attributes:
        prompt: score the prompt as well as the answer (TRL and the paper's code).
        skip_token_id: a token that the NLL leaves out wherever it stands, or None. The paper's code masks every
            end-of-sequence token.
    """

    prompt: bool = True
    skip_token_id: int | None = None


@dataclass(frozen=True)
class PairBatch:
    """What the loss needs of a batch besides hidden states.

    Attributes:
        rows: the five row arrays.
        num_nll_tokens: rows that the NLL scores.
        num_pairs: pairs with response tokens on both sides.
        pair_ids: int64 (P,), the position of each pair in the prepared data set; -1 where it has none.

    The counts are Python numbers, taken where the arrays are made: reading them off a device would stall it.
    """

    rows: Rows
    num_nll_tokens: int
    num_pairs: int
    pair_ids: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PairBatch:
        """The same batch with its row arrays on `device`; the ids stay where they are."""
        return PairBatch(self.rows.to(device, non_blocking), self.num_nll_tokens, self.num_pairs, self.pair_ids)

    def first(self, pairs: int) -> PairBatch:
        """The same batch with rows of its first `pairs` pairs only. Reads counts off the device."""
        r = self.rows
        kept = r.sequence_N % r.pairs < pairs
        arrays = (r.rows_N, r.targets_N, r.sequence_N, r.in_response_N, r.in_nll_N)
        rows = Rows(*(a[kept] for a in arrays), pairs=r.pairs)
        answered = torch.zeros(2 * r.pairs, dtype=torch.bool, device=kept.device)
        answered[rows.sequence_N[rows.in_response_N]] = True
        num_pairs = int(answered.reshape(2, r.pairs).all(dim=0).sum())
        return PairBatch(rows, int(rows.in_nll_N.sum()), num_pairs, self.pair_ids)

    def pin_memory(self) -> PairBatch:
        """The same batch in page-locked memory. torch's DataLoader calls this by name."""
        arrays = (getattr(self.rows, f.name) for f in fields(Rows))
        pinned = Rows(*(a.pin_memory() if isinstance(a, Tensor) else a for a in arrays))
        return PairBatch(pinned, self.num_nll_tokens, self.num_pairs, self.pair_ids)


class RowBuilder:
    """Collects the rows of a batch, one sequence after the other."""

    def __init__(self, pairs: int, nll: NLLSpan) -> None:
        self.pairs = pairs
        self.nll = nll
        self.columns: list[tuple[np.ndarray, ...]] = []
        self.response_tokens = np.zeros(2 * pairs, dtype=np.int64)

    def add(self, sequence: int, source_T: np.ndarray, ids_T: np.ndarray, prompt_length: int) -> None:
        """Adds sequence number `sequence` (rejected: ``pairs + p``); call in ascending order.

        Args:
            source_T: int64 (T,), where the hidden state of each token lies in ``hidden.reshape(-1, D)``.
            ids_T: int64 (T,), the tokens. Token t is predicted from the hidden state of token t - 1.
            prompt_length: tokens before the answer.
        """
        targets = ids_T[1:]
        response = np.arange(1, len(ids_T)) >= prompt_length
        scored = np.zeros_like(response)
        if sequence < self.pairs:
            scored = response | self.nll.prompt
            if self.nll.skip_token_id is not None:
                scored = scored & (targets != self.nll.skip_token_id)
        kept = response | scored
        sequence_N = np.full(int(kept.sum()), sequence, dtype=np.int64)
        self.columns.append((source_T[:-1][kept], targets[kept], sequence_N, response[kept], scored[kept]))
        self.response_tokens[sequence] = response.sum()

    def build(self, pair_ids: Iterable[int]) -> PairBatch:
        """The rows collected so far as one batch."""
        rows, targets, sequence, response, scored = (np.concatenate(c) for c in zip(*self.columns, strict=True))
        both_sides = (self.response_tokens.reshape(2, self.pairs) > 0).all(axis=0)
        return PairBatch(
            rows=Rows(
                *(torch.from_numpy(a.astype(np.int64)) for a in (rows, targets, sequence)),
                *(torch.from_numpy(a.astype(bool)) for a in (response, scored)),
                pairs=self.pairs,
            ),
            num_nll_tokens=int(scored.sum()),
            num_pairs=int(both_sides.sum()),
            pair_ids=torch.tensor(list(pair_ids), dtype=torch.int64),
        )


def _sequences(examples: list[Mapping[str, Any]]) -> Iterable[tuple[np.ndarray, int]]:
    """(tokens, prompt length) of every sequence, chosen ones first."""
    for side in ("chosen", "rejected"):
        for example in examples:
            yield np.asarray(example[f"{side}_input_ids"], dtype=np.int64), int(example[f"{side}_prompt_length"])


@dataclass(frozen=True)
class PaddedLayout:
    """One row per sequence, padded on the right, the chosen half first: ``input_ids`` and ``attention_mask`` (2P, T).

    Attributes:
        pad_token_id: what fills the rest of a row. It is masked from attention and has no row in the loss.
        nll: which tokens of the chosen sequence the NLL scores.
        pad_to_multiple_of: T is rounded up to a multiple of this.
    """

    pad_token_id: int
    nll: NLLSpan = NLLSpan()
    pad_to_multiple_of: int = 1

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """`examples` -> ``{"input_ids", "attention_mask", "orpo": PairBatch}``."""
        sequences = list(_sequences(examples))
        longest = max(len(ids) for ids, _ in sequences)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = np.full((len(sequences), width), self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        builder = RowBuilder(len(examples), self.nll)
        for s, (ids, prompt_length) in enumerate(sequences):
            input_ids[s, : len(ids)] = ids
            attention_mask[s, : len(ids)] = 1
            builder.add(s, s * width + np.arange(len(ids)), ids, prompt_length)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "orpo": builder.build(example.get("pair_id", -1) for example in examples),
        }


def _pack(lengths: list[int], width: int) -> list[list[int]]:
    """Items into as few rows of `width` as first-fit finds, the longest first."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((r for r, left in enumerate(room) if left >= lengths[i]), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(width)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


@dataclass(frozen=True)
class PackedLayout:
    """Sequences one behind the other, positions restarting, without an attention mask: ``input_ids`` (B, T).

    transformers finds the sequences by their positions. FlashAttention's variable-length kernels want one row
    (`single_row`) and never look across a boundary; elsewhere T is the longest sequence and shorter ones fill the rows.

    Attributes:
        pad_token_id, nll: as in :class:`PaddedLayout`.
        single_row: all sequences in one row, with no padding at all.
    """

    pad_token_id: int
    nll: NLLSpan = NLLSpan()
    single_row: bool = False

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """`examples` -> ``{"input_ids", "position_ids", "orpo": PairBatch}``."""
        sequences = list(_sequences(examples))
        lengths = [len(ids) for ids, _ in sequences]
        packed = _pack(lengths, sum(lengths) if self.single_row else max(lengths))
        width = max(sum(lengths[s] for s in row) for row in packed)
        input_ids = np.full((len(packed), width), self.pad_token_id, dtype=np.int64)
        position_ids = np.zeros_like(input_ids)
        starts = np.zeros(len(sequences), dtype=np.int64)
        for r, row in enumerate(packed):
            t = 0
            for s in row:
                input_ids[r, t : t + lengths[s]] = sequences[s][0]
                position_ids[r, t : t + lengths[s]] = np.arange(lengths[s])
                starts[s] = r * width + t
                t += lengths[s]
            # Counted from 0 again, padding is a sequence of its own, which nothing reads.
            position_ids[r, t:] = np.arange(width - t)
        builder = RowBuilder(len(examples), self.nll)
        for s, (ids, prompt_length) in enumerate(sequences):
            builder.add(s, starts[s] + np.arange(len(ids)), ids, prompt_length)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": torch.from_numpy(position_ids),
            "orpo": builder.build(example.get("pair_id", -1) for example in examples),
        }


@dataclass(frozen=True)
class SharedLayout:
    """A pair as [prompt | chosen | rejected], the prompt once; several pairs to a row where that saves padding.

    What both sequences begin with is shared, up to the shorter prompt: answers never share tokens, although theirs may
    be equal, and prompts that differ (a merge over the boundary, a cut) share what is equal of them. The last shared
    token predicts the first of both answers, so its hidden state is read twice.

    Attributes:
        pad_token_id, nll: as in :class:`PaddedLayout`.
    """

    pad_token_id: int
    nll: NLLSpan = NLLSpan()

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """`examples` -> ``{"input_ids", "position_ids", "attention_mask": SharedPrefixMask, "orpo": PairBatch}``."""
        sequences = list(_sequences(examples))
        pairs = list(zip(sequences[: len(examples)], sequences[len(examples) :], strict=True))
        shared = [_common_prompt(*pair) for pair in pairs]
        lengths = [len(c) + len(r) - n for ((c, _), (r, _)), n in zip(pairs, shared, strict=True)]
        width = max(lengths)
        packed = _pack(lengths, width)
        input_ids = np.full((len(packed), width), self.pad_token_id, dtype=np.int64)
        position_ids = np.zeros_like(input_ids)
        branch = np.full(input_ids.shape, 3 * len(examples), dtype=np.int32)
        starts = np.zeros(len(examples), dtype=np.int64)
        for r, row in enumerate(packed):
            t = 0
            for p in row:
                (chosen, _), (rejected, _) = pairs[p]
                n, middle, end = shared[p], t + len(chosen), t + lengths[p]
                input_ids[r, t:middle], input_ids[r, middle:end] = chosen, rejected[n:]
                position_ids[r, t:middle], position_ids[r, middle:end] = (
                    np.arange(len(chosen)),
                    np.arange(n, len(rejected)),
                )
                branch[r, t : t + n] = 3 * p + PROMPT
                branch[r, t + n : middle] = 3 * p + CHOSEN
                branch[r, middle:end] = 3 * p + REJECTED
                starts[p] = r * width + t
                t = end
            position_ids[r, t:] = np.arange(width - t)
        builder = RowBuilder(len(examples), self.nll)
        for s, (ids, prompt_length) in enumerate(sequences):
            p = s % len(examples)
            source = starts[p] + np.arange(len(ids))
            if s >= len(examples):
                source[shared[p] :] += len(pairs[p][0][0]) - shared[p]
            builder.add(s, source, ids, prompt_length)
        position_BT = torch.from_numpy(position_ids)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": position_BT,
            "attention_mask": SharedPrefixMask(torch.from_numpy(branch), position_BT),
            "orpo": builder.build(example.get("pair_id", -1) for example in examples),
        }


def _common_prompt(chosen: tuple[np.ndarray, int], rejected: tuple[np.ndarray, int]) -> int:
    """How many tokens of the prompt both sequences of a pair begin with."""
    n = min(chosen[1], rejected[1])
    differs = np.flatnonzero(chosen[0][:n] != rejected[0][:n])
    return int(differs[0]) if len(differs) else n


LAYOUTS: dict[str, Callable[..., Callable[[list[Mapping[str, Any]]], dict[str, Any]]]] = {
    "padded": PaddedLayout,
    "packed": PackedLayout,
    "shared": SharedLayout,
}


def make_layout(name: str, **options: Any) -> Callable[[list[Mapping[str, Any]]], dict[str, Any]]:
    """The layout called `name`, one of ``LAYOUTS``.

    Raises:
        ValueError: there is no layout of that name.
    """
    if name not in LAYOUTS:
        raise ValueError(f"layout is {name!r}; it has to be one of {', '.join(sorted(LAYOUTS))}")
    return LAYOUTS[name](**options)
