"""Which hidden states matter: every batch layout reduced to the same five arrays.

Letters: P pairs, S = 2P sequences (chosen p, its rejected partner P + p), N kept rows, V vocabulary.

A row is one prediction that counts: a hidden state and the token that it should predict. Padding and the rejected prompt
have no row, so they never reach a matmul.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The five row arrays of a batch of pairs.

    Attributes:
        rows_N: int64 (N,). Row n reads ``hidden.reshape(-1, D)[rows_N[n]]``. An index may repeat: the last prompt token of
            a prefix-shared pair predicts the first token of both answers.
        targets_N: int64 (N,), the token that row n predicts, in ``[0, V)``.
        sequence_N: int64 (N,), non-decreasing, in ``[0, 2 * pairs)``; sequence ``p`` is the chosen answer of pair ``p``,
            ``pairs + p`` its rejected one.
        in_response_N: bool (N,), the row belongs to the mean log-probability of its answer (Eq. 3).
        in_nll_N: bool (N,), the row belongs to the NLL (Eq. 5).
        pairs: P, the number of pairs, whether or not each of them has rows.
    """

    rows_N: Tensor
    targets_N: Tensor
    sequence_N: Tensor
    in_response_N: Tensor
    in_nll_N: Tensor
    pairs: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Rows:
        """The same rows on `device`."""
        arrays = (self.rows_N, self.targets_N, self.sequence_N, self.in_response_N, self.in_nll_N)
        return Rows(*(a.to(device, non_blocking=non_blocking) for a in arrays), pairs=self.pairs)
