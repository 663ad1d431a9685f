"""A head whose rows lie on the ranks of a group: where this rank's are, and all that the ranks tell one another.

    m_n  = max_r m_nr,   s_n = sum_r s_nr exp(m_nr - m_n),   z_{n,y_n} from the rank that has y_n    (Eq. 2)
    dX_n = sum_r dX_nr                                                                               (Eq. 8)

The rest of a loss is the same number on every rank, or belongs to one rank's columns. A whole head is a shard without a
group, which asks nobody.

Letters: N rows, D hidden size, V vocabulary, K parts of a rank's statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from orpo_kernels.groups import Group
from orpo_kernels.rows import refuse


@dataclass(frozen=True)
class Shard(Group):
    """This rank's place in a group whose ranks have a head's rows in their order; "": all are here."""

    def place(self, columns: int, targets_N: Tensor) -> tuple[int | Tensor, Tensor]:
        """(V, targets_N among the `columns` of this rank, -1 where another rank has them).

        Raises:
            ValueError: a rank has no rows of the head, or ranks were called with other targets.
        """
        if not self.name:
            return columns, targets_N
        # Of the targets their sum: ranks with batches of their own would reduce statistics of different tokens.
        own = (targets_N.new_full((), columns), targets_N.new_full((), targets_N.numel()), targets_N.sum())
        own_3, group = torch.stack(own), self.group
        columns_G, *same_G = self.gather(own_3)
        refuse((columns_G > 0).all(), "a rank of tp_group has no rows of the head: the group has more ranks than rows")
        same = (torch.stack(same_G) == own_3[1:, None]).all()
        refuse(
            same,
            "the ranks of tp_group have different rows: the head is cut over them, and they need the same hidden "
            "states and labels (a head that FSDP has cut is gathered in the head's forward: call the loss there)",
        )
        targets_N = targets_N - columns_G[: group.rank()].sum()
        return columns_G.sum(), torch.where((targets_N >= 0) & (targets_N < columns), targets_N, -1)

    def whole_stats(
        self, max_KN: Tensor, sum_KN: Tensor, target_N: Tensor, targets_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Statistics of the whole vocabulary (Eq. 2) from those of this rank's columns; in a group K is 1 then.

        target_N counts where targets_N, as `place` gives them, have the target here.
        """
        if not self.name:
            return max_KN, sum_KN, target_N
        max_N = max_KN.amax(0)
        # Triton's stage does not come here without a row.
        if max_N.numel():
            dist.all_reduce(max_N, dist.ReduceOp.MAX, group=self.group)
        # A row without a finite logit but its target's has -inf, and -inf - -inf is NaN.
        shift_N = max_N.masked_fill(max_N == -torch.inf, 0)
        sum_N = (sum_KN * torch.exp(max_KN - shift_N)).sum(0)
        both_2N = torch.stack([sum_N, torch.where(targets_N >= 0, target_N, 0)])
        sum_N, target_N = self.sum_(both_2N)
        return max_N[None], sum_N[None], target_N


WHOLE = Shard()
