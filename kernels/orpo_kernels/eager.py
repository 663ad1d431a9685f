"""The loss without a custom operator around it, whose wrapper takes a third of the host's time, where nobody sees one.

It is the operator's computation (fused.py) under a plain autograd function, in which kept exponentials need not outlive
the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orpo_kernels import fused, saved
from orpo_kernels.matmul import operator_body
from orpo_kernels.rows import Rows

_forward = operator_body(fused.forward)


@operator_body
def _backward(grad_loss: Tensor, tensors: tuple[Tensor | None, ...], settings: dict) -> tuple[Tensor | None, ...]:
    plan = saved.call_plan(tensors[0], tensors[1], tensors[3].shape[0], **settings)
    return fused.backward(plan, grad_loss, *tensors[:6], tensors[6:], group=settings["group"], overwrite=True)


def is_unseen(*tensors: Tensor | None) -> bool:
    """Whether nothing looks at this call's operators: no compiler, dispatch mode, functorch transform, and no tensor
    that is meta or of a subclass.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or any(type(t) not in (Tensor, torch.nn.Parameter) or t.is_meta for t in tensors if t is not None)
    )


class LinearORPO(torch.autograd.Function):
    """`orpo::linear_orpo`: the first seven of `fused.Output`, of which the loss is differentiable, once."""

    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, bias_V, rows: Rows, numbers: Tensor, source: str, settings: dict):
        output, _ = _forward(hidden_RD, weight_VD, bias_V, rows, numbers, source, **settings)
        inputs = hidden_RD, weight_VD, bias_V, rows.arrays, numbers
        saved.save_for_backward(ctx, inputs, settings, output)
        ctx.mark_non_differentiable(*output[1:7])
        return tuple(output[:7])

    @staticmethod
    def backward(ctx, grad_loss, *_):
        # Undefined where nothing that is differentiated came from the loss.
        if grad_loss is None:
            return (None,) * 7
        tensors, settings = ctx.saved_tensors, ctx.settings
        # For a second derivative the operator is recorded, and refuses.
        if not torch.is_grad_enabled() and is_unseen(grad_loss) and saved.recomputes(tensors, settings):
            grads = _backward(grad_loss, tensors, settings)
        else:
            grads = saved.by_operator(grad_loss, tensors, settings)
        wanted = zip(grads, settings["needs"][:3], strict=True)
        return *(grad if needed else None for grad, needed in wanted), None, None, None, None


def linear_orpo(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows: Rows,
    numbers: Tensor,
    source: str,
    settings: dict,
) -> fused.Output:
    """`fused.linear_orpo`, as an operator where somebody looks at operators; `settings` are its other arguments."""
    if is_unseen(hidden_RD, weight_VD, bias_V):
        return fused.Output(*LinearORPO.apply(hidden_RD, weight_VD, bias_V, rows, numbers, source, settings))
    named = dict(pairs=rows.pairs, source=source, all_count=rows.all_count, **settings)
    return fused.Output(*fused.linear_orpo(hidden_RD, weight_VD, bias_V, list(rows.arrays), numbers, **named))
