"""Which hidden states matter: every batch layout reduced to the same five arrays.

Letters: P pairs, S = 2P sequences (chosen p, its rejected partner P + p), N kept rows, V vocabulary.

A row is one prediction that counts: a hidden state and the token that it should predict. Padding and the rejected
prompt have no row, so they never reach a matmul.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class Rows:
    """The five row arrays of a batch of pairs.

    Attributes:
        rows_N: int64 (N,). Row n reads ``hidden.reshape(-1, D)[rows_N[n]]``. An index may repeat: the last prompt token
            of a prefix-shared pair predicts the first token of both answers.
        targets_N: int64 (N,), the token that row n predicts, in ``[0, V)``.
        sequence_N: int64 (N,), non-decreasing, in ``[0, 2 * pairs)``; sequence ``p`` is the chosen answer of pair
            ``p``, ``pairs + p`` its rejected one.
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


def rows_from_labels(labels: Tensor, nll_labels: Tensor | None, ignore_index: int, shift: bool) -> Rows:
    """Describe a padded batch: every position, those that do not count with both masks false. No host synchronisation.

    Args:
        labels: (2P, T) response tokens, chosen half first, `ignore_index` elsewhere; aligned with the input ids when
            `shift`, with the hidden states otherwise.
        nll_labels: (P, T) or (2P, T), what the NLL scores; the rejected half is ignored. None: the chosen `labels`.
        ignore_index: the label that counts nowhere.
        shift: position t predicts labels[:, t + 1].
    """
    P, T = labels.shape[0] // 2, labels.shape[1]
    labels = _predicted(labels, ignore_index, shift)
    positions = torch.arange(2 * P * T, device=labels.device).view(2 * P, T)
    sequences = torch.arange(2 * P, device=labels.device)[:, None].expand(2 * P, T)
    response = labels != ignore_index
    if nll_labels is None:
        nll = response & (sequences < P)
        return Rows(*(a.reshape(-1) for a in (positions, labels, sequences, response, nll)), pairs=P)

    nll_labels = _predicted(nll_labels[:P], ignore_index, shift)
    chosen = labels[:P]
    nll = nll_labels != ignore_index
    merged = torch.where(response[:P], chosen, nll_labels)
    # Where both score a position but not the same token, the second token needs a row of its own.
    other = nll & response[:P] & (nll_labels != chosen)
    none = torch.zeros_like(nll)
    chosen_half = (
        torch.cat([positions[:P], positions[:P]], 1),
        torch.cat([merged, nll_labels], 1),
        torch.cat([sequences[:P], sequences[:P]], 1),
        torch.cat([response[:P], none], 1),
        torch.cat([nll & ~other, other], 1),
    )
    rejected_half = (positions[P:], labels[P:], sequences[P:], response[P:], torch.zeros_like(response[P:]))
    arrays = (torch.cat([a.reshape(-1), b.reshape(-1)]) for a, b in zip(chosen_half, rejected_half, strict=True))
    return Rows(*arrays, pairs=P)


def _predicted(labels: Tensor, ignore_index: int, shift: bool) -> Tensor:
    """The token that each position predicts, int64; the last position predicts nothing when labels are shifted."""
    labels = labels.long()
    if not shift or labels.shape[1] == 0:
        return labels
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)


def check_sequences(rows: Rows) -> None:
    """Refuse rows that are not sorted by sequence: their sums would be taken over the wrong spans."""
    if rows.sequence_N.numel() == 0:
        return
    last = 2 * rows.pairs - 1
    inside = (rows.sequence_N[0] >= 0) & (rows.sequence_N[-1] <= last)
    good = inside & (rows.sequence_N[1:] >= rows.sequence_N[:-1]).all()
    message = f"rows.sequence_N has to be sorted, from 0 to at most {last} for {rows.pairs} pairs"
    if good.device.type == "cpu":
        if not good:
            raise ValueError(message)
    else:
        torch._assert_async(good, message)


def check_targets(targets: Tensor, vocabulary: int) -> None:
    """Refuse a target outside the vocabulary; on a GPU without making the host wait."""
    if targets.numel() == 0:
        return
    low, high = targets.aminmax()
    if targets.device.type == "cpu":
        for token in (int(low), int(high)):
            if not 0 <= token < vocabulary:
                raise ValueError(f"labels holds the token {token}, but lm_head_weight has {vocabulary} rows")
    else:
        inside = (low >= 0) & (high < vocabulary)
        torch._assert_async(inside, f"labels holds a token outside the {vocabulary} rows of lm_head_weight")


def can_be_counted(rows: Rows) -> bool:
    """Whether it can be known now how many rows count: not in a graph, nor of tensors that stand for sizes alone."""
    mask_N = rows.in_response_N
    return not (torch.compiler.is_compiling() or mask_N.is_meta or isinstance(mask_N, FakeTensor))


def that_count(rows: Rows) -> Rows:
    """The rows with at least one mask set; makes the host wait for how many they are."""
    index = (rows.in_response_N | rows.in_nll_N).nonzero()[:, 0]
    arrays = (rows.rows_N, rows.targets_N, rows.sequence_N, rows.in_response_N, rows.in_nll_N)
    return Rows(*(a[index] for a in arrays), pairs=rows.pairs)
