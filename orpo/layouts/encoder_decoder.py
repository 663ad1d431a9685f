"""Batches for an encoder-decoder: each prompt once, for the encoder, and both answers, for the decoder.

Letters: P pairs, T tokens of a prompt, U of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from orpo.layouts.batch import WHOLE_CHOSEN, NLLSpan, RowBuilder
from orpo.layouts.layout import sequences_of


@dataclass(frozen=True)
class EncoderDecoderLayout:
    """Prompts (P, T) as ``input_ids`` and ``attention_mask``, answers (2P, U) as ``labels``, the chosen half first.

    All is padded on the right. The decoder's position t predicts token t of its answer.

    Attributes:
        pad_token_id: fills up a prompt, masked from attention.
        nll: which tokens of the chosen answer the NLL scores. The decoder has no prompt to score.
    """

    pad_token_id: int
    nll: NLLSpan = WHOLE_CHOSEN

    def __call__(self, examples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """`examples` -> ``{"input_ids", "attention_mask", "labels", "orpo": PairBatch}``.

        Raises:
            ValueError: a pair has no prompt, or two that differ.
        """
        prompts = [_prompt(example) for example in examples]
        sequences = [*sequences_of(examples)]
        answers = [ids[length:] for ids, length, _ in sequences]
        input_ids = np.full((len(prompts), max(map(len, prompts))), self.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for p, ids in enumerate(prompts):
            input_ids[p, : len(ids)] = ids
            attention_mask[p, : len(ids)] = 1
        labels = np.full((len(answers), max(map(len, answers))), -100, dtype=np.int64)
        builder = RowBuilder(len(examples), self.nll)
        for s, (ids, (_, length, mask)) in enumerate(zip(answers, sequences, strict=True)):
            labels[s, : len(ids)] = ids
            # A prompt of one token stands for the decoder's start token, which predicts the answer's first.
            counted = None if mask is None else np.concatenate([[0], mask[length:]])
            first = s * labels.shape[1]
            builder.add(s, first + np.arange(len(ids) + 1), np.concatenate([ids[:1], ids]), 1, counted)
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(attention_mask),
            "labels": torch.from_numpy(labels),
            "orpo": builder.build(example.get("pair_id", -1) for example in examples),
        }


def _prompt(example: Mapping[str, Any]) -> list[int]:
    chosen, rejected = (
        list(example[f"{side}_input_ids"][: example[f"{side}_prompt_length"]]) for side in ("chosen", "rejected")
    )
    if chosen and chosen == rejected:
        return chosen
    problem = "two prompts that differ" if chosen or rejected else "no prompt"
    row = f"row {example['pair_id']}" if "pair_id" in example else "a row"
    raise ValueError(
        f"{row} of the data set has {problem}, and an encoder reads one for both answers: "
        "leave out such rows, data.filter(...)"
    )
