"""Which hidden states matter: every batch layout reduced to the same five arrays.

Letters: P pairs, S = 2P sequences (chosen p, its rejected partner P + p), N kept rows, V vocabulary.

A row is one prediction that counts: a hidden state and the token that it should predict. Padding and the rejected
prompt have no row, so they never reach a matmul.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

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
        all_count: every row has a mask set. False where that cannot be known: then a row without one has coefficient 0.
        bounds: the smallest and the largest target, where the host knows them; -1 for one below it, and the largest
            int32 for one above that.
    """

    rows_N: Tensor
    targets_N: Tensor
    sequence_N: Tensor
    in_response_N: Tensor
    in_nll_N: Tensor
    pairs: int
    all_count: bool = True
    bounds: tuple[int, int] | None = None

    @property
    def arrays(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.rows_N, self.targets_N, self.sequence_N, self.in_response_N, self.in_nll_N

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Rows:
        """The same rows on `device`."""
        return self.map(lambda array: array.to(device, non_blocking=non_blocking))

    def map(self, change: Callable[[Tensor], Tensor]) -> Rows:
        """The same with `change` made to each of the five arrays."""
        return Rows(*map(change, self.arrays), self.pairs, self.all_count, self.bounds)


def rows_from_labels(
    labels: Tensor, nll_labels: Tensor | None, ignore_index: int, shift: bool, backend: str = "torch"
) -> Rows:
    """The rows of a padded batch that count; makes the host wait for how many they are.

    In a graph nobody can wait: there every position is a row, and `all_count` is False.

    Args:
        labels: (2P, T) response tokens, chosen half first, `ignore_index` elsewhere; aligned with the input ids when
            `shift`, with the hidden states otherwise.
        nll_labels: (P, T) or (2P, T), what the NLL scores; the rejected half is ignored. None: the chosen `labels`.
        ignore_index: the label that counts nowhere.
        shift: position t predicts labels[:, t + 1].
        backend: of `plan.BACKENDS`.
    """
    if backend == "triton" and not _stands_for_sizes(labels):
        # Found by name: without triton nothing of gpu/ can be imported.
        made_by = importlib.import_module("orpo_kernels.gpu.label_rows")
        return made_by.rows_from_labels(labels, nll_labels, ignore_index, shift)
    P, T = labels.shape[0] // 2, labels.shape[1]
    labels = _predicted(labels, ignore_index, shift)
    positions = torch.arange(2 * P * T, device=labels.device).view(2 * P, T)
    sequences = torch.arange(2 * P, device=labels.device)[:, None].expand(2 * P, T)
    response = labels != ignore_index
    if nll_labels is None:
        nll = response & (sequences < P)
        return _that_count(Rows(*(a.reshape(-1) for a in (positions, labels, sequences, response, nll)), pairs=P))

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
    return _that_count(Rows(*arrays, pairs=P))


def _that_count(rows: Rows) -> Rows:
    counts_N = rows.in_response_N | rows.in_nll_N
    if _stands_for_sizes(counts_N):
        return replace(rows, targets_N=torch.where(counts_N, rows.targets_N, 0), all_count=False)
    index = counts_N.nonzero()[:, 0]
    return rows.map(lambda array: array[index])


def _stands_for_sizes(t: Tensor) -> bool:
    """Whether there are no numbers to count: in a graph, and of tensors without any."""
    return torch.compiler.is_compiling() or t.is_meta or isinstance(t, FakeTensor)


def without_others(hidden_RD: Tensor, rows: Rows) -> Tensor:
    """`hidden_RD` with zeros where no row counts: there it may hold NaN, which a coefficient of 0 would let through."""
    counts_N = (rows.in_response_N | rows.in_nll_N).int()
    counts_R = hidden_RD.new_zeros(hidden_RD.shape[0], dtype=torch.int32).index_add(0, rows.rows_N, counts_N)
    return torch.where(counts_R[:, None] > 0, hidden_RD, 0)


def count_pairs(rows: Rows) -> Tensor:
    """Pairs with at least one response token on either side."""
    # Not by a boolean index, whose size the host of a GPU would have to wait for.
    scored_S = torch.zeros(2 * rows.pairs, dtype=torch.int32, device=rows.sequence_N.device)
    scored_S = scored_S.scatter_reduce(0, rows.sequence_N, rows.in_response_N.int(), "amax")
    return (scored_S[: rows.pairs] * scored_S[rows.pairs :]).sum()


def _predicted(labels: Tensor, ignore_index: int, shift: bool) -> Tensor:
    """The token that each position predicts, int64; the last position predicts nothing when labels are shifted."""
    labels = labels.long()
    if not shift or labels.shape[1] == 0:
        return labels
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)


# The name of the weight beside each argument that tokens come from, for the messages.
_WEIGHTS = {"labels": "lm_head_weight", "target": "lin_weight", "targets": "weight", "rows": "lm_head_weight"}


def check_rows(rows: Rows, hidden_rows: int, vocabulary: int | Tensor, source: str) -> None:
    """Refuse rows that the stages would misread; on a GPU without making the host wait.

    Args:
        hidden_rows: R, the number of hidden states.
        vocabulary: V; a tensor where it is summed over ranks, of which the host of a GPU does not know.
        source: the argument that the rows come from: "labels" or "target", which are read in order, or "rows".
    """
    if source == "rows" and rows.rows_N.numel():
        last = 2 * rows.pairs - 1
        inside = (rows.sequence_N[0] >= 0) & (rows.sequence_N[-1] <= last)
        good = inside & (rows.sequence_N[1:] >= rows.sequence_N[:-1]).all()
        refuse(good, _unsorted(rows))
        low, high = rows.rows_N.aminmax()
        refuse((low >= 0) & (high < hidden_rows), _unread(hidden_rows))
    check_targets(rows.targets_N, vocabulary, source, rows.in_response_N)


def refuse_by_flags(good_3: Tensor, rows: Rows, hidden_rows: int, vocabulary: int, source: str) -> None:
    """`check_rows` where a kernel has answered: sequences are sorted, rows have hidden states, targets are tokens."""
    if source == "rows":
        refuse(good_3[0], _unsorted(rows))
        refuse(good_3[1], _unread(hidden_rows))
    if not good_3.is_cpu:
        refuse(good_3[2], _no_token(vocabulary, source))
    elif not good_3[2]:
        _refuse_token(rows.targets_N, vocabulary, source, rows.in_response_N)


def check_bounds(rows: Rows, vocabulary: int, source: str) -> None:
    """Refuse a target outside the vocabulary where the host knows the smallest and the largest one."""
    low, high = rows.bounds
    if low < 0 or high >= vocabulary:
        _refuse_token(rows.targets_N, vocabulary, source, rows.in_response_N)


def check_targets(
    targets_N: Tensor, vocabulary: int | Tensor, source: str, in_response_N: Tensor | None = None
) -> None:
    """Refuse a target outside the vocabulary, in the words of `source`: "targets", or as `check_rows` has it."""
    if targets_N.numel() == 0:
        return
    low, high = targets_N.aminmax()
    good = (low >= 0) & (high < vocabulary)
    if not good.is_cpu:
        refuse(good, _no_token(vocabulary, source))
    elif not good:
        _refuse_token(targets_N, int(vocabulary), source, in_response_N)


def _refuse_token(targets_N: Tensor, vocabulary: int, source: str, in_response_N: Tensor | None) -> None:
    first = ((targets_N < 0) | (targets_N >= vocabulary)).nonzero()[0, 0]
    name = _name(source)
    if source in ("labels", "target") and not in_response_N[first]:
        name = f"nll_{name}"
    raise ValueError(f"{name} holds the token {int(targets_N[first])}, {_limit(vocabulary, source)}")


def _name(source: str) -> str:
    return "rows.targets_N" if source == "rows" else source


def _limit(vocabulary: int | str, source: str) -> str:
    return f"but {_WEIGHTS[source]} has {vocabulary} rows"


def _no_token(vocabulary: int | Tensor, source: str) -> str:
    limit = _limit("fewer" if isinstance(vocabulary, Tensor) else vocabulary, source)
    return f"{_name(source)} holds a token outside the vocabulary, {limit}"


def _unsorted(rows: Rows) -> str:
    # Their sums would be taken over the wrong spans.
    return f"rows.sequence_N has to be sorted, from 0 to at most {2 * rows.pairs - 1} for {rows.pairs} pairs"


def _unread(hidden_rows: int) -> str:
    # A negative index would read from the end.
    return f"rows.rows_N has to be in [0, {hidden_rows}), as hidden has rows"


def refuse(good: Tensor, message: str) -> None:
    """Raise ValueError unless `good`, a bool (); on a GPU stop the device there, without making the host wait."""
    if good.is_cpu:
        if not good:
            raise ValueError(message)
    else:
        torch._assert_async(good, message)
