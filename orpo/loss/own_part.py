"""A head, or sequences, that are cut over ranks, as a caller has them: process groups, or DTensors with one.

Letters: D hidden size, V vocabulary, V_r the rows of rank r.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orpo.loss.call import Names

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_dtensor(tensor: Tensor | None) -> bool:
    """Whether the tensor is a DTensor, without an import of what only these need."""
    return hasattr(tensor, "full_tensor")


def own_part(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup | None, names: Names
) -> tuple[Tensor, Tensor, Tensor | None, str]:
    """(hidden, weight (V_r, D), bias (V_r,)) as tensors of this rank alone, and the name of the group, "" for none.

    Args:
        hidden: (..., D), the same on all ranks; a DTensor has to be replicated.
        weight, bias: this rank's rows; a DTensor has them by ``Shard(0)`` over a mesh of one dimension.
        group: of the ranks that have the other rows, in the order of their ranks. None: the mesh's, or all are here.

    Raises:
        ValueError: another placement or mesh, or a group that is not the mesh's.
    """
    name_of(group, "tp")
    if is_dtensor(weight):
        group = _group_of(weight, names.weight, group)
    if bias is not None and is_dtensor(bias):
        _refuse_without(group, names.bias)
        _group_of(bias, names.bias, group)
    if is_dtensor(hidden):
        _refuse_without(group, names.hidden)
        if not all(placement.is_replicate() for placement in hidden.placements):
            raise ValueError(
                f"{names.hidden} is a DTensor placed as {_placed(hidden)}, and every rank of tp_group needs all rows: "
                f"pass {names.hidden}.redistribute(placements=[Replicate()])"
            )
    # Under no_grad the parts would look frozen, and evaluation would compute otherwise than training.
    with torch.enable_grad():
        weight, bias = (t.to_local() if t is not None and is_dtensor(t) else t for t in (weight, bias))
    if is_dtensor(hidden):
        hidden = hidden.to_local()
    return hidden, weight, bias, name_of(group, "tp")


def name_of(group: ProcessGroup | None, kind: str) -> str:
    """The name of a group, "" for none.

    Raises:
        ValueError: the argument {kind}_group is no process group.
    """
    if group is not None and not hasattr(group, "group_name"):
        raise ValueError(
            f"{kind}_group has to be a ProcessGroup (mesh['{kind}'].get_group()), got {type(group).__name__}"
        )
    return "" if group is None else group.group_name


def _group_of(tensor: Tensor, name: str, group: ProcessGroup | None) -> ProcessGroup:
    mesh, placements = tensor.device_mesh, tensor.placements
    if mesh.ndim != 1 or not placements[0].is_shard(0):
        raise ValueError(
            f"{name} is a DTensor placed as {_placed(tensor)}: the vocabulary may be cut over a mesh of one dimension "
            "(Shard(0)); otherwise call the loss inside the head's forward, where FSDP has gathered the weight "
            "(ORPOTrainer does), or pass full_tensor() of a weight that is not trained"
        )
    of_mesh = mesh.get_group()
    if group is not None and group.group_name != of_mesh.group_name:
        raise ValueError(f"{name} is a DTensor of another mesh than that of tp_group and of the other tensors")
    return of_mesh


def _refuse_without(group: ProcessGroup | None, name: str) -> None:
    if group is None:
        raise ValueError(f"{name} is a DTensor, but the head is not cut over ranks: pass full_tensor()")


def _placed(tensor: Tensor) -> str:
    return f"{tuple(map(str, tensor.placements))} over a mesh of shape {tuple(tensor.device_mesh.shape)}"
