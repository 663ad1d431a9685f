"""The differentiable primitive under every preference loss: log-probabilities of given tokens, without full logits.

    logp_n = log softmax(cap(scale * (x_n . W^T + b)))[y_n]          Eqs. 1-2, gradients Eq. 8

Letters: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from orpo_kernels import strips
from orpo_kernels.head import Needs
from orpo_kernels.kept import Kept, buffers, clear_padding
from orpo_kernels.matmul import accumulation_dtype, operator_body
from orpo_kernels.plan import Plan, make_plan
from orpo_kernels.rows import check_targets
from orpo_kernels.settings import Numbers


@torch.library.custom_op("orpo::linear_logprobs", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
@operator_body
def linear_logprobs(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    numbers: Tensor,
    *,
    logits_budget: int | None,
    strip_bytes: int | None,
    backend: str,
    needs: list[bool],
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp_N, and for backward lse_2N and, where only x needs a gradient, u_ND with dlogp_n/dx_n = scale * u_n, else
    the exponentials that are kept (exps and maxima, kept.py) and, in a group, the targets of this rank's columns."""
    head, wants = Numbers.read(numbers).head(weight_VD, bias_V, group), Needs(*needs)
    vocabulary, own_targets_N = head.shard.place(weight_VD.shape[0], targets_N.contiguous())
    check_targets(targets_N, vocabulary, "targets")
    plan = _plan(x_ND, weight_VD, wants, logits_budget, strip_bytes, backend, group)
    dtype = torch.promote_types(x_ND.dtype, weight_VD.dtype)
    exps, maxima = buffers(x_ND, plan.row_tiles if wants.any else 0, dtype)
    kept = Kept(plan.columns, exps, maxima, overwrite=not wants.head) if wants.any and plan.columns else None
    (logp_N, lse_2N), u_ND = strips.token_stats(plan, x_ND, own_targets_N, head, kept)
    if wants.head:
        clear_padding(exps, maxima, plan.rows, plan.columns)
    else:
        exps, maxima = buffers(x_ND, 0, dtype)
    own_targets_N = own_targets_N if group and wants.head else targets_N.new_empty(0)
    return logp_N, lse_2N, logp_N.new_empty(0) if u_ND is None else u_ND, exps, maxima, own_targets_N


def _plan(
    x_ND: Tensor,
    weight_VD: Tensor,
    needs: Needs,
    logits_budget: int | None,
    strip_bytes: int | None,
    backend: str,
    group: str,
) -> Plan:
    if logits_budget is None and not needs.frozen:
        # Every call whose backward is still to come would keep exponentials of its own.
        logits_budget = 0
    settings = logits_budget, strip_bytes, backend
    # Of single tokens nothing is known that a tile could be turned into gradients of.
    return make_plan(x_ND, weight_VD, x_ND.shape[0], needs, *settings, has_pairs=False, is_shard=bool(group))


@linear_logprobs.register_fake
def _(x_ND, weight_VD, bias_V, targets_N, numbers, *, needs, group="", **settings):
    dtype, wants = accumulation_dtype(x_ND, weight_VD), Needs(*needs)
    # Not asked where nothing is kept: it compares numbers of rows, which a compiler may not know.
    tiles = _plan(x_ND, weight_VD, wants, group=group, **settings).row_tiles if wants.head else 0
    keeps_u = wants.any and not wants.head
    rows = x_ND.new_empty(x_ND.shape[0], dtype=dtype)
    return (
        rows,
        rows.new_empty(2, x_ND.shape[0]),
        x_ND.new_empty(x_ND.shape if keeps_u else 0, dtype=dtype),
        *buffers(x_ND, tiles, torch.promote_types(x_ND.dtype, weight_VD.dtype)),
        targets_N.new_empty(x_ND.shape[0] if group and wants.head else 0),
    )


@torch.library.custom_op("orpo::linear_logprobs_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
@operator_body
def linear_logprobs_backward(
    grad_N: Tensor,
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    numbers: Tensor,
    saved: list[Tensor],
    *,
    logits_budget: int | None,
    strip_bytes: int | None,
    backend: str,
    needs: list[bool],
    group: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """dX_ND, dW_VD, db_V (empty where not wanted) for upstream gradients grad_N; saved is what the forward returned."""
    logp_N, lse_2N, u_ND, exps, maxima, own_targets_N = saved
    head, wants = Numbers.read(numbers).head(weight_VD, bias_V, group), Needs(*needs)
    if not wants.head:
        dx_ND = (u_ND * (head.scale * grad_N[:, None])).to(x_ND.dtype)
        return dx_ND, logp_N.new_empty(0), logp_N.new_empty(0)
    plan = _plan(x_ND, weight_VD, wants, logits_budget, strip_bytes, backend, group)
    kept = Kept(plan.columns, exps, maxima) if plan.columns else None
    targets_N = own_targets_N if group else targets_N.contiguous()
    grads = strips.backward(plan, x_ND, targets_N, logp_N, lse_2N, grad_N, head, kept)
    return (
        plan.stages.weighted(grads.x_ND, grads.x_coef_N, x_ND.dtype) if wants.hidden else logp_N.new_empty(0),
        grads.weight_VD if wants.weight else logp_N.new_empty(0),
        grads.bias_V if wants.bias else logp_N.new_empty(0),
    )


@linear_logprobs_backward.register_fake
def _(grad_N, x_ND, weight_VD, bias_V, targets_N, numbers, saved, *, needs, **_):
    inputs = (x_ND, weight_VD, bias_V)
    return tuple(
        t.new_empty(t.shape) if wanted else saved[0].new_empty(0) for t, wanted in zip(inputs, needs[:3], strict=True)
    )


def _save_for_backward(ctx, inputs, keyword_only_inputs, output) -> None:
    # Autograd would make an (N, D) tensor of zeros for u_ND, which has no gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)
    ctx.settings = keyword_only_inputs
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_N, *_):
    grads = [None] * 3
    # Undefined where nothing that is differentiated came from the log-probabilities.
    if grad_N is not None:
        inputs, saved = ctx.saved_tensors[:5], list(ctx.saved_tensors[5:])
        grads = torch.ops.orpo.linear_logprobs_backward(grad_N, *inputs, saved, **ctx.settings)
    return *(g if wanted else None for g, wanted in zip(grads, ctx.settings["needs"][:3], strict=True)), None, None


linear_logprobs.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.orpo.linear_logprobs, get_raw=True)
def _(x_ND, weight_VD, *_, needs, group="", out_val=None, **settings) -> int:
    plan = _plan(x_ND, weight_VD, Needs(*needs), group=group, **settings)
    return plan.forward_flops(x_ND.shape[1])


@register_flop_formula(torch.ops.orpo.linear_logprobs_backward, get_raw=True)
def _(_, x_ND, weight_VD, *__, needs, group="", out_val=None, **settings) -> int:
    plan = _plan(x_ND, weight_VD, Needs(*needs), group=group, **settings)
    return plan.backward_flops(x_ND.shape[1])
