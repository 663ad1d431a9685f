"""Weighted means of metrics over micro-batches and ranks, kept on the device until they are read.

A ``.item()`` for every metric of every micro-batch would make the host wait for the device each time; here nothing is
read before :meth:`WeightedMeans.reduce`, which takes one reduction for all metrics together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from orpo.layouts.batch import Counts

# What an evaluation is told by; logits/* are missing where the head has a softcap.
EVALUATED = frozenset(
    (
        *("loss", "nll_loss", "log_odds_ratio", "log_odds_chosen"),
        *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
        *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
        *("runtime", "samples_per_second", "steps_per_second"),
    )
)


class WeightedMeans:
    """Running sums of ``weight * value`` and of the weights, for each name."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}

    def add(self, values: Mapping[str, Tensor], weight: float) -> None:
        """Adds 0-dim means with one weight (a Python number: a tensor would have to be read back)."""
        for name, value in values.items():
            # The mean over nothing does not count, whatever its value.
            self.add_part(name, value * weight if weight else torch.zeros_like(value), weight)

    def add_part(self, name: str, part: Tensor, weight: float) -> None:
        """Adds a 0-dim part of a sum, which already holds its `weight`."""
        part = part.detach().float()
        self.sums[name] = self.sums[name] + part if name in self.sums else part
        self.weights[name] = self.weights.get(name, 0.0) + weight

    def add_batch(self, metrics: Mapping[str, Tensor], weights: Counts) -> None:
        """Adds a batch's metrics by TRL's names: ``logits/*`` are means over rows, the rest over pairs."""
        rows = {"logits/chosen": weights.chosen_rows, "logits/rejected": weights.rejected_rows}
        for name, value in metrics.items():
            self.add({name: value}, rows.get(name, weights.pairs))

    def reduce(self, all_sum: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """The means over all ranks; empties the sums.

        Args:
            all_sum: sums a tensor over the ranks. Every rank has to have added the same names.
            device: where the sums are.
        """
        names = sorted(self.weights)
        if not names:
            return {}
        sums = torch.stack([self.sums[name] for name in names])
        weights = torch.tensor([self.weights[name] for name in names], device=device)
        sums, weights = all_sum(torch.stack([sums, weights])).tolist()
        self.sums.clear()
        self.weights.clear()
        return {name: s / w for name, s, w in zip(names, sums, weights, strict=True) if w}
