"""Running maximum and sum of a row's logits, read part by part (Eq. 2).

Letters: N rows, K columns of a part.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orpo_kernels import reference
from orpo_kernels.head import Head

_LOG2_E = math.log2(math.e)


def exp_(z: Tensor) -> Tensor:
    """exp(z) in place, z at most 0 up to rounding; in float32 off by |z| 5e-8 of itself, much where it is small only.

    As a power of 2: for that torch has vector code, its exp took 2.6 times as long (AMD EPYC).
    """
    return z.mul_(_LOG2_E).exp2_()


def finite(max_N: Tensor) -> Tensor:
    """The maximum to subtract: a row with no finite logit (yet) has -inf, and -inf - -inf is NaN."""
    return max_N.masked_fill(max_N == -torch.inf, 0)


def stats_of(max_N: Tensor, sum_N: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """(logp_N, lse_2N), Eq. 2, of all logits but the target's, sum_n exp max_n being that of their exponentials.

    lse = lse_2N[0] + lse_2N[1], both relative to the maximum until then: what all logits have in common would take the
    digits of their sum.
    """
    max_N = finite(max_N)
    others_N, target_N = sum_N.log(), target_N - max_N
    return -reference.softplus(others_N - target_N), torch.stack([max_N, torch.logaddexp(others_N, target_N)])


class RunningStats:
    """Stage 1 over strips: running maximum and sum of exponentials without the target, and the target's logit."""

    def __init__(self, n: int, like: Tensor, dtype: torch.dtype) -> None:
        self.max_N = like.new_full((n,), -torch.inf, dtype=dtype)
        self.sum_N = like.new_zeros(n, dtype=dtype)
        self.target_N = like.new_zeros(n, dtype=dtype)

    def add(self, block: slice, z: Tensor) -> Tensor:
        """Fold a block's logits in; z becomes exp(z - the new maximum). Returns exp(old maximum - new maximum)."""
        new_max = torch.maximum(self.max_N[block], z.amax(1))
        shift = finite(new_max)
        rescale = torch.exp(self.max_N[block] - shift)
        exp_(z.sub_(shift[:, None]))
        self.sum_N[block] = self.sum_N[block] * rescale + z.sum(1)
        self.max_N[block] = new_max
        return rescale

    def finish(self, targets_N: Tensor, head: Head) -> tuple[Tensor, Tensor]:
        """(logp_N, lse_2N), Eq. 2, of all columns of the head, those of other ranks included."""
        parts = self.max_N[None], self.sum_N[None], self.target_N
        max_1N, sum_1N, target_N = head.shard.whole_stats(*parts, targets_N)
        return stats_of(max_1N[0], sum_1N[0], target_N)
