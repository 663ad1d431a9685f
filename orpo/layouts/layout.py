"""Turns tokenized pairs into a batch: the model's inputs, and the rows of hidden states that the loss reads.

Letters: P pairs, S = 2P sequences (chosen first, then rejected), T positions, N kept rows.

A layout is a callable ``list of examples -> batch``; an example is one row of `orpo.data.prepare.prepare_dataset`.
In every layout the loss sees the five arrays of :class:`orpo_kernels.rows.Rows` and the trainer a few counts, so that
neither knows which layout made a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from orpo.layouts.batch import WHOLE_CHOSEN, NLLSpan, RowBuilder
from orpo.layouts.prefix_mask import SharedPrefixMask
from orpo.layouts.segments import segments_of


class _Sequence(NamedTuple):
    """A sequence's tokens, how many of them are its prompt, and a mask where not all of its answer counts."""

    ids: np.ndarray
    prompt_length: int
    mask: np.ndarray | None


def sequences_of(examples: list[Mapping[str, Any]]) -> Iterable[_Sequence]:
    """All sequences, chosen ones first."""
    for side in ("chosen", "rejected"):
        for example in examples:
            mask = example.get(f"{side}_mask")
            yield _Sequence(
                np.asarray(example[f"{side}_input_ids"], dtype=np.int64),
                int(example[f"{side}_prompt_length"]),
                None if mask is None or not len(mask) else np.asarray(mask, dtype=np.int8),
            )


@dataclass(frozen=True)
class PaddedLayout:
    """One row per sequence, padded on the right, the chosen half first: ``input_ids`` and ``attention_mask`` (2P, T).

    Attributes:
        pad_token_id: fills the rest of a row. It is masked from attention and has no row in the loss.
        nll: which tokens of the chosen sequence the NLL scores.
        pad_to_multiple_of: T is rounded up to a multiple of this.
    """

    pad_token_id: int
    nll: NLLSpan = WHOLE_CHOSEN
    pad_to_multiple_of: int = 1

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """`examples` -> ``{"input_ids", "attention_mask", "orpo": PairBatch}``."""
        sequences = list(sequences_of(examples))
        longest = max(len(sequence.ids) for sequence in sequences)
        width = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = np.full((len(sequences), width), self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        builder = RowBuilder(len(examples), self.nll)
        for s, (ids, *counted) in enumerate(sequences):
            input_ids[s, : len(ids)] = ids
            attention_mask[s, : len(ids)] = 1
            builder.add(s, s * width + np.arange(len(ids)), ids, *counted)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "orpo": builder.build(example.get("pair_id", -1) for example in examples),
        }


def _pack(lengths: list[int], width: int) -> list[list[int]]:
    """Packs items into rows of `width` by first-fit, the longest first."""
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

    transformers tells the sequences apart by their positions. FlashAttention's variable-length kernels want one row
    (`single_row`); elsewhere T is the longest sequence, and shorter ones share rows.

    Attributes:
        pad_token_id, nll: as in :class:`PaddedLayout`.
        single_row: all sequences in one row, with no padding at all.
    """

    pad_token_id: int
    nll: NLLSpan = WHOLE_CHOSEN
    single_row: bool = False

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """`examples` -> ``{"input_ids", "position_ids", "orpo": PairBatch}``."""
        sequences = list(sequences_of(examples))
        lengths = [len(sequence.ids) for sequence in sequences]
        packed = _pack(lengths, sum(lengths) if self.single_row else max(lengths))
        width = max(sum(lengths[s] for s in row) for row in packed)
        input_ids = np.full((len(packed), width), self.pad_token_id, dtype=np.int64)
        position_ids = np.zeros_like(input_ids)
        starts = np.zeros(len(sequences), dtype=np.int64)
        for r, row in enumerate(packed):
            t = 0
            for s in row:
                input_ids[r, t : t + lengths[s]] = sequences[s].ids
                position_ids[r, t : t + lengths[s]] = np.arange(lengths[s])
                starts[s] = r * width + t
                t += lengths[s]
            # Positions from 0 make the padding a sequence of its own, which nothing reads.
            position_ids[r, t:] = np.arange(width - t)
        builder = RowBuilder(len(examples), self.nll)
        for s, (ids, *counted) in enumerate(sequences):
            builder.add(s, starts[s] + np.arange(len(ids)), ids, *counted)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": torch.from_numpy(position_ids),
            "orpo": builder.build(example.get("pair_id", -1) for example in examples),
        }


class _Branches(NamedTuple):
    """A prompt once, and behind it the answers of one pair, or of several pairs of that prompt.

    Attributes:
        prompt: the tokens that all of its sequences begin with.
        answers: the tokens behind it, each answer once, in the order of their places.
        of_pair: pair -> the numbers in `answers` of its chosen and of its rejected answer.
    """

    prompt: np.ndarray
    answers: list[np.ndarray]
    of_pair: dict[int, list[int]]

    @property
    def length(self) -> int:
        return len(self.prompt) + sum(map(len, self.answers))


@dataclass(frozen=True)
class SharedLayout:
    """A pair as [prompt | chosen | rejected], the prompt once; several pairs to a row where that saves padding.

    The sequences share the tokens that both begin with, up to the end of the shorter prompt: answers never share
    tokens, and prompts that differ (a token over the boundary, a cut) share their equal start. The last shared token
    predicts the first token of both answers, so its hidden state is read twice. Pairs of one prompt share it, and an
    answer that several of them have, where that makes the batch smaller.

    Attributes:
        pad_token_id, nll: as in :class:`PaddedLayout`.
        single_row: all pairs in one row, with no padding at all, and with segments for FlashAttention.
        shares_prompts: tells a sampler that pairs of one prompt belong in one batch.
    """

    pad_token_id: int
    nll: NLLSpan = WHOLE_CHOSEN
    single_row: bool = False
    shares_prompts: ClassVar[bool] = True

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """`examples` -> ``{"input_ids", "position_ids", "attention_mask": SharedPrefixMask, "orpo": PairBatch}``."""
        sequences = list(sequences_of(examples))
        longest = max(len(sequence.ids) for sequence in sequences)
        pairs = list(zip(sequences[: len(examples)], sequences[len(examples) :], strict=True))
        # No longer than a pair without a prompt: the probe tries windows up to that length. Those of FlashAttention do
        # not leave a segment, which no group makes longer.
        most = len(sequences) * longest if self.single_row else 2 * longest
        layouts = [_packed(_branches(pairs, tokens), self.single_row) for tokens in (most, 0)]
        groups, packed, width = min(layouts, key=lambda layout: len(layout[1]) * layout[2])
        input_ids = np.full((len(packed), width), self.pad_token_id, dtype=np.int64)
        position_ids = np.zeros_like(input_ids)
        branches = 1 + max(len(group.answers) for group in groups)
        branch = np.full(input_ids.shape, branches * len(groups), dtype=np.int32)
        sources: dict[int, np.ndarray] = {}
        for r, row in enumerate(packed):
            t = 0
            for g in row:
                prompt, answers, of_pair = groups[g]
                starts = []
                for b, part in enumerate((prompt, *answers)):
                    starts.append(t)
                    here = slice(t, t := t + len(part))
                    input_ids[r, here] = part
                    position_ids[r, here] = np.arange(len(part)) + (len(prompt) if b else 0)
                    branch[r, here] = branches * g + b
                for p, sides in of_pair.items():
                    for side, a in enumerate(sides):
                        places = (np.arange(len(part)) + starts[b] for b, part in ((0, prompt), (1 + a, answers[a])))
                        sources[side * len(examples) + p] = r * width + np.concatenate([*places])
            position_ids[r, t:] = np.arange(width - t)
        builder = RowBuilder(len(examples), self.nll)
        for s, (ids, *counted) in enumerate(sequences):
            builder.add(s, sources[s], ids, *counted)
        position_BT, tokens = torch.from_numpy(position_ids), sum(group.length for group in groups)
        segments = segments_of(branch, branches) if self.single_row else None
        mask = SharedPrefixMask(torch.from_numpy(branch), position_BT, longest, tokens, branches, segments)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": position_BT,
            "attention_mask": mask,
            "orpo": builder.build(example.get("pair_id", -1) for example in examples),
        }


def _packed(groups: list[_Branches], single_row: bool) -> tuple[list[_Branches], list[list[int]], int]:
    """(groups, which of them stand in each row, the width of a row)."""
    lengths = [group.length for group in groups]
    width = sum(lengths) if single_row else max(lengths)
    return groups, _pack(lengths, width), width


def _branches(pairs: list[tuple[_Sequence, _Sequence]], most: int) -> list[_Branches]:
    """The pairs, with those of one prompt in one group as long as it has no more than `most` tokens."""
    groups: list[_Branches] = []
    of_prompt: dict[bytes, _Branches] = {}
    for p, pair in enumerate(pairs):
        n = _common_prompt(*pair)
        prompt, answers = pair[0].ids[:n], [sequence.ids[n:] for sequence in pair]
        group = of_prompt.get(prompt.tobytes())
        new = answers if group is None else [a for a in answers if _place(a, group.answers) is None]
        if group is None or group.length + sum(map(len, new)) > most:
            group, new = _Branches(prompt, [], {}), answers
            groups.append(group)
            of_prompt[prompt.tobytes()] = group
        group.answers.extend(new)
        group.of_pair[p] = [_place(a, group.answers) for a in answers]
    return groups


def _place(answer: np.ndarray, answers: list[np.ndarray]) -> int | None:
    return next((i for i, other in enumerate(answers) if np.array_equal(answer, other)), None)


def _common_prompt(chosen: _Sequence, rejected: _Sequence) -> int:
    """How many tokens of the prompt the sequences of a pair share at their start."""
    n = min(chosen.prompt_length, rejected.prompt_length)
    differs = np.flatnonzero(chosen.ids[:n] != rejected.ids[:n])
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
