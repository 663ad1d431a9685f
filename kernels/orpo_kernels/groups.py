"""A process group by its name, as an operator's schema can have it, and the two calls that the loss makes of one.

Letters: G ranks of the group, K numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """The group of this name; "": this rank alone, which asks nobody.

    Every method of it and of its kinds is a call of all ranks, with tensors of the same shape.
    """

    name: str = ""

    @property
    def group(self) -> dist.ProcessGroup:
        return dist.distributed_c10d._resolve_process_group(self.name)

    def sum_(self, t: Tensor) -> Tensor:
        """t, in place, summed over the ranks."""
        if self.name and t.numel():
            dist.all_reduce(t, group=self.group)
        return t

    def gather(self, own_K: Tensor) -> Tensor:
        """(K, G): the numbers of every rank of a group with a name, in the order of its ranks."""
        group = self.group
        all_K = [torch.empty_like(own_K) for _ in range(group.size())]
        dist.all_gather(all_K, own_K, group=group)
        return torch.stack(all_K, 1)
