"""What ranks send each other: the collectives of torch.distributed, counted by kind as they are called."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# torch's operators that send something: those of a process group, and those inside a compiled graph.
NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
# Of these namespaces, those that send nothing, or no tensor.
SILENT = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_")


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called in its block, those of backward included.

    Attributes:
        calls: kind -> how often this rank took part in one, for example ``{"allreduce": 3}``.
        bytes: kind -> the sum of their tensors' sizes: of those before or after it, whichever are larger.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # Asked again, of the collectives that it is made of.
            return NotImplemented
        results = func(*args, **(kwargs or {}))
        kind = func._schema.name.partition("::")[2]
        if func.namespace in NAMESPACES and kind not in SILENT:
            # The two namespaces write one kind in two ways.
            kind = kind.strip("_").replace("all_", "all")
            self.calls[kind] += 1
            self.bytes[kind] += max(map(_size, (*args, results)), default=0)
        return results

    def describe(self) -> str:
        """For example "allreduce 3 (1,204 bytes), broadcast 1 (8 bytes)"; "none"."""
        parts = (f"{kind} {count} ({self.bytes[kind]:,} bytes)" for kind, count in sorted(self.calls.items()))
        return ", ".join(parts) or "none"


def _size(argument: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(argument) if isinstance(leaf, Tensor))
