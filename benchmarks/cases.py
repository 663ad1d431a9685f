"""Shapes to measure on: the heads of real models, and batches of pairs with a given share of prompt and padding.

How long real pairs are was counted on 1,794 pairs of HH-RLHF (harmless-base, test; github.com/anthropics/hh-rlhf) with
SmolLM2's tokenizer, BOS and EOS included; the prompt counts once there, a batch of sequences holds it twice. The data
does not ship: pairs are drawn to match.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Vocabulary and hidden size of the matrix that the loss multiplies with. Phi-2's bias and Gemma 2's softcap are left
# out, since most peers have neither.
HEADS = {
    "OPT-350M": (50272, 512),
    "SmolLM2-135M": (49152, 576),
    "Phi-2": (51200, 2560),
    "Llama-2-7B": (32000, 4096),
    "Mistral-7B-v0.3": (32768, 4096),
    "Llama-3-8B": (128256, 4096),
    "Qwen2.5-0.5B": (151936, 896),
    "Gemma-2-2B": (256000, 2304),
}
# Pairs and positions that two CPU cores finish in seconds: the real sequence length for the two small heads, fewer
# tokens for the others. Vocabulary and hidden size are never scaled.
CPU_BATCH = {
    "OPT-350M": (4, 256),
    "SmolLM2-135M": (4, 256),
    "Phi-2": (2, 128),
    "Llama-2-7B": (2, 128),
    "Mistral-7B-v0.3": (2, 128),
    "Qwen2.5-0.5B": (2, 128),
    "Llama-3-8B": (2, 64),
    "Gemma-2-2B": (2, 64),
}
PROMPT_SHARES = (0.0, 0.25, 0.5, 0.75)

# Tokens at the quantiles 0, 5 %, ..., 100 %.
QUANTILES = {
    "prompt": (13, 18, 20, 23, 26, 33, 48, 63, 74, 85, 98, 110, 121, 136, 151, 170, 190, 226, 272, 345, 836),
    "chosen": (2, 7, 9, 11, 13, 15, 18, 20, 23, 25, 28, 31, 35, 41, 46, 54, 62, 74, 89, 118, 270),
    "rejected": (2, 7, 10, 13, 15, 18, 21, 24, 28, 32, 36, 41, 47, 52, 58, 65, 75, 87, 109, 145, 557),
}
# Correlation of the logarithms, about equal for each two of the three.
CORRELATION = 0.25

Lengths = tuple[int, int, int]


def quantile(name: str, share: float) -> int:
    """Tokens at `share` in [0, 1], straight between the counted quantiles."""
    table = QUANTILES[name]
    at = min(max(share, 0.0), 1.0) * (len(table) - 1)
    below = min(int(at), len(table) - 2)
    return round(table[below] + (at - below) * (table[below + 1] - table[below]))


def draw(pairs: int, seed: int = 0, longest: int | None = None) -> list[Lengths]:
    """(prompt, chosen, rejected) tokens of `pairs` pairs; those over `longest` tokens are drawn anew.

    Raises:
        ValueError: no pair of the distribution is as short as `longest`.
    """
    shortest = QUANTILES["prompt"][0] + 2
    if longest is not None and longest < shortest:
        raise ValueError(f"longest is {longest}; the shortest pair has {shortest} tokens")
    g, out = random.Random(seed), []
    while len(out) < pairs:
        # One part that the three share gives them their correlation.
        common = math.sqrt(CORRELATION) * g.gauss(0, 1)
        normals = (common + math.sqrt(1 - CORRELATION) * g.gauss(0, 1) for _ in QUANTILES)
        lengths = tuple(
            quantile(name, 0.5 * math.erfc(-x / math.sqrt(2))) for name, x in zip(QUANTILES, normals, strict=True)
        )
        if longest is None or lengths[0] + max(lengths[1:]) <= longest:
            out.append(lengths)
    return out


@dataclass(frozen=True)
class Case:
    """One batch in front of one head: P pairs of T positions of which `prompt` belong to the prompt.

    `lengths`, where given, are (prompt, chosen, rejected) tokens of each pair; the rest of T is padding.
    """

    name: str
    pairs: int
    positions: int
    prompt: int
    hidden_size: int
    vocabulary: int
    lengths: tuple[Lengths, ...] | None = field(default=None, repr=False)

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """(prompt, prompt and answer) tokens of each of the 2P sequences, chosen first."""
        if self.lengths is None:
            return [(self.prompt, self.positions)] * (2 * self.pairs)
        return [(p, p + (c, r)[side]) for side in (0, 1) for p, c, r in self.lengths]

    @property
    def rows(self) -> int:
        """Rows that count: every chosen token but the first, and the rejected answers."""
        halves = self.sequences[: self.pairs], self.sequences[self.pairs :]
        return sum(total - 1 for _, total in halves[0]) + sum(total - max(p, 1) for p, total in halves[1])


def head_case(
    head: str,
    prompt_share: float,
    pairs: int | None = None,
    positions: int | None = None,
    size: tuple[int, int] | None = None,
) -> Case:
    """A batch without padding in front of the head of a real model, or of `size` (V, D) under any name."""
    vocabulary, hidden_size = size or HEADS[head]
    default_pairs, default_positions = CPU_BATCH.get(head, (4, 256))
    positions = positions or default_positions
    return Case(head, pairs or default_pairs, positions, round(prompt_share * positions), hidden_size, vocabulary)


def real_case(head: str, pairs: int, seed: int = 0) -> Case:
    """A padded batch of pairs as long as those of real preference data."""
    vocabulary, hidden_size = HEADS[head]
    lengths = draw(pairs, seed)
    positions = max(p + max(c, r) for p, c, r in lengths)
    return Case(head, pairs, positions, 0, hidden_size, vocabulary, tuple(lengths))


TINY = Case("tiny", 2, 16, 6, 32, 500)
CASES = {
    case.name: case
    for case in (
        Case("smollm2", 4, 256, 96, 576, 49152),
        Case("qwen2.5-0.5b", 2, 1024, 384, 896, 151936),
        TINY,
        Case("tiny padded", 3, 24, 0, 32, 500, ((6, 5, 9), (10, 14, 3), (4, 2, 8))),
    )
}


@dataclass
class Batch:
    """What a trainer has in its hands when it needs the loss.

    hidden (2P, T, D), weight (V, D), input_ids (2P, T). labels (2P, T) are the answers, nll_labels (2P, T) prompt and
    answer; both are -100 elsewhere.
    """

    hidden: Tensor
    weight: Tensor
    input_ids: Tensor
    labels: Tensor
    nll_labels: Tensor

    def requiring_grad(self, head: bool = True) -> Batch:
        """Fresh gradients on both operands, or on the hidden states alone."""
        self.hidden.requires_grad_().grad = None
        self.weight.requires_grad_(head).grad = None
        return self

    @property
    def scored(self) -> Tensor:
        """(2P, T) targets of the rows that count: all of a chosen sequence, the answer of a rejected one."""
        pairs = self.labels.shape[0] // 2
        return torch.cat([self.nll_labels[:pairs], self.labels[pairs:]])


def make_batch(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Batch:
    """Hidden states of which half point at their target, so that likely and unlikely tokens both occur."""
    g = torch.Generator().manual_seed(seed)
    shape = 2 * case.pairs, case.positions
    input_ids = torch.randint(0, case.vocabulary, shape, generator=g)
    weight = torch.randn(case.vocabulary, case.hidden_size, generator=g).mul_(case.hidden_size**-0.5)
    hidden = torch.randn(*shape, case.hidden_size, generator=g)
    likely = torch.rand(shape[0], shape[1] - 1, generator=g) < 0.5
    hidden[:, :-1][likely] += 8 * weight[input_ids[:, 1:][likely]]
    labels, nll_labels = input_ids.clone(), input_ids.clone()
    for s, (prompt, total) in enumerate(case.sequences):
        labels[s, :prompt] = -100
        labels[s, total:] = -100
        nll_labels[s, total:] = -100
    tensors = hidden.to(dtype), weight.to(dtype), input_ids, labels, nll_labels
    return Batch(*(tensor.to(device) for tensor in tensors))
