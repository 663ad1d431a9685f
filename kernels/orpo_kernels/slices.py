"""Sequences whose positions lie on the ranks of a group: all that the ranks tell one another.

    a_s = sum_r sum_{n in s on r} logp_n / sum_r len_sr,   and the NLL's sum and count likewise      (Eqs. 3, 5)

From these on each rank has the whole loss, and in coef_n the gradient of its own rows (Eq. 7). Which positions a rank
has does not matter, nor whether it has any: only sums are taken. Whole sequences are slices without a group.

Letters: N rows, S sequences, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from orpo_kernels.groups import Group
from orpo_kernels.rows import Rows, refuse

T = TypeVar("T")


@dataclass(frozen=True)
class Slices(Group):
    """This rank's slices of the sequences of which the other ranks of a group have the rest; "": they are whole."""

    def agree(self, check: Callable[[], T], rows: Rows, head_group: str = "") -> T:
        """What `check` returns, which one rank alone may refuse.

        Raises:
            ValueError: that of `check`, on the ranks of the group too, which would wait for this one in their sums; the
                ranks have different numbers of pairs; or `head_group` has another rank of this group.
        """
        if not self.name:
            return check()
        if head_group:
            ranks, others = (dist.get_process_group_ranks(group.group) for group in (self, Group(head_group)))
            # Each rank's rows would be added up once for every rank that has the same ones.
            if len(set(ranks) & set(others)) > 1:
                raise ValueError(
                    f"cp_group has the ranks {ranks} and tp_group {others}: those of one have different positions, "
                    "those of the other the same ones, and two ranks cannot do both"
                )
        result, error = None, None
        try:
            result = check()
        except ValueError as raised:
            error = raised
        refused_G, pairs_G = self.gather(rows.rows_N.new_tensor([error is not None, rows.pairs]))
        if error is not None:
            raise error
        refuse((refused_G == 0).all(), "another rank of cp_group refuses its rows, and says why")
        refuse(
            (pairs_G == rows.pairs).all(),
            "the ranks of cp_group have different numbers of pairs: each has a slice, empty or not, of every sequence",
        )
        return result

    def whole_mean(self, sums_2D: Tensor, count_21: Tensor) -> Tensor:
        """(2, D): sums_2D, used up, over count_21, of all ranks; a count in a group may be 0."""
        if not self.name:
            return sums_2D.div_(count_21)
        both = self.sum_(torch.cat([sums_2D, count_21.to(sums_2D.dtype)], 1))
        # Not in place: a part of `both` has its strides, and the operator says that its results have their own.
        return both[:, :-1] / both[:, -1:].clamp(min=1)


WHOLE = Slices()
