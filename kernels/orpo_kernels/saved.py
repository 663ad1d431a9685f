"""What the backward of a call of the loss finds: tensors, settings, and gradients that may be finished already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from orpo_kernels.head import Needs
from orpo_kernels.plan import Plan, make_plan

_BACKWARD_SETTINGS = ("logits_budget", "strip_bytes", "backend", "needs", "group", "sequence_group")


def save_for_backward(ctx, inputs: tuple, settings: dict, output: Sequence[Tensor | None]) -> None:
    """What the backward of a call needs of its inputs, its keyword arguments and its `Output`."""
    # Autograd would make a (V, D) tensor of zeros for the finished gradient among the outputs, which has no gradient.
    ctx.set_materialize_grads(False)
    hidden_RD, weight_VD, bias_V, rows, numbers = inputs
    ctx.save_for_backward(hidden_RD, weight_VD, bias_V, rows[0], rows[1], numbers, *output[7:])
    ctx.settings = {name: settings[name] for name in _BACKWARD_SETTINGS}


def call_plan(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    rows: int,
    *,
    logits_budget: int | None,
    strip_bytes: int | None,
    backend: str,
    needs: list[bool],
    group: str,
    sequence_group: str = "",
) -> Plan:
    """The one plan of a forward and its backward, over so many rows; of `sequence_group` other ranks have the rest."""
    settings = logits_budget, strip_bytes, backend
    parts = dict(has_pairs=not sequence_group, is_shard=bool(group))
    return make_plan(hidden_RD, weight_VD, rows, Needs(*needs), *settings, **parts)


def by_operator(grad_loss: Tensor, saved: tuple[Tensor | None, ...], settings: dict) -> list[Tensor | None]:
    """The gradients of what `save_for_backward` has saved, by the operator unless they are finished."""
    if recomputes(saved, settings) or _graph_is_kept() or type(grad_loss) is not Tensor:
        kept = [saved[0].new_empty(0) if t is None else t for t in saved[6:]]
        return torch.ops.orpo.linear_orpo_backward(grad_loss, *saved[:6], kept, **settings)
    # Nobody will ask for the finished gradients again: a scaled copy would cost as much memory once more.
    finished = zip(saved[-3:], saved[:3], settings["needs"][:3], strict=True)
    return [_scaled_(t, grad_loss).to(like.dtype) if wanted else None for t, like, wanted in finished]


def recomputes(saved: tuple[Tensor | None, ...], settings: dict) -> bool:
    """Whether there is anything to compute but the product with the upstream gradient."""
    # The head's needs alone first, as in the shapes above.
    trained = any(settings["needs"][1:3])
    return trained and call_plan(saved[0], saved[1], saved[3].shape[0], **settings).recomputes


def _graph_is_kept() -> bool:
    """Whether another backward may follow (`retain_graph`); where torch does not say, yes."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def _scaled_(finished: Tensor, grad_loss: Tensor) -> Tensor:
    # On a CPU reading the factor costs nothing, and it nearly always is 1.
    if grad_loss.is_cpu and grad_loss.item() == 1:
        return finished
    return finished.mul_(grad_loss)
