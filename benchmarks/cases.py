"""Shapes to measure on: the heads of real models, and batches of pairs with a given share of prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One batch in front of one head: P pairs of T positions of which `prompt` belong to the prompt."""

    name: str
    pairs: int
    positions: int
    prompt: int
    hidden_size: int
    vocabulary: int


CASES = {
    case.name: case
    for case in (
        Case("smollm2", 4, 256, 96, 576, 49152),
        Case("qwen2.5-0.5b", 2, 1024, 384, 896, 151936),
        Case("tiny", 2, 16, 6, 32, 500),
    )
}


@dataclass
class Batch:
    """What a trainer has in its hands when it needs the loss."""

    hidden: Tensor
    weight: Tensor
    input_ids: Tensor
    labels: Tensor

    def double(self) -> Batch:
        """The same numbers in float64, for the truth."""
        return Batch(self.hidden.detach().double(), self.weight.detach().double(), self.input_ids, self.labels)

    def requiring_grad(self) -> Batch:
        """Fresh gradients on both operands."""
        for tensor in (self.hidden, self.weight):
            tensor.requires_grad_().grad = None
        return self


def make_batch(case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Batch:
    """Hidden states of which half point at their target, so that likely and unlikely tokens both occur."""
    g = torch.Generator().manual_seed(seed)
    shape = 2 * case.pairs, case.positions
    input_ids = torch.randint(0, case.vocabulary, shape, generator=g)
    weight = torch.randn(case.vocabulary, case.hidden_size, generator=g) * case.hidden_size**-0.5
    hidden = torch.randn(*shape, case.hidden_size, generator=g)
    likely = torch.rand(shape[0], shape[1] - 1, generator=g) < 0.5
    hidden[:, :-1][likely] += 8 * weight[input_ids[:, 1:][likely]]
    labels = input_ids.clone()
    labels[:, : case.prompt] = -100
    return Batch(hidden.to(dtype).to(device), weight.to(dtype).to(device), input_ids.to(device), labels.to(device))
