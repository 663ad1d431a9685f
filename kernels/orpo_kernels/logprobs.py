"""The differentiable primitive under every preference loss: log-probabilities of given tokens, without full logits.

    logp_n = log softmax(cap(scale * (x_n . W^T + b)))[y_n]          Eqs. 1-2, gradients Eq. 8

Letters: N rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import schedule
from .form import load_form
from .head import Needs
from .kept import Kept, buffers, clear_padding, kept_columns
from .matmul import accumulation_dtype, operator_body
from .rows import check_targets
from .settings import Numbers


@torch.library.custom_op("orpo::linear_logprobs", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
@operator_body
def linear_logprobs(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    numbers: Tensor,
    *,
    logits_budget: int,
    strip_bytes: int,
    backend: str,
    needs: list[bool],
    head_frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp_N, and for backward lse_2N and, where only x needs a gradient, u_ND with dlogp_n/dx_n = scale * u_n, else
    the exponentials that are kept (exps and maxima, kept.py)."""
    check_targets(targets_N, weight_VD.shape[0], "targets")
    targets_N = targets_N.contiguous()
    head, wants = Numbers.read(numbers).head(weight_VD, bias_V), Needs(*needs)
    keep = schedule.keeping(x_ND, weight_VD, logits_budget, backend, head_frozen)
    be = load_form(backend, x_ND, targets_N, head, strip_bytes, keep.columns)
    dtype = torch.promote_types(x_ND.dtype, weight_VD.dtype)
    exps, maxima = buffers(x_ND, keep.tiles if wants.any else 0, dtype)
    kept = Kept(keep.columns, exps, maxima) if wants.any and keep.columns else None
    (logp_N, lse_2N), u_ND = schedule.token_stats(
        be, x_ND, targets_N, head, wants, head_frozen, strip_bytes, keep, kept
    )
    if wants.head:
        clear_padding(exps, maxima, x_ND.shape[0], keep.columns)
    else:
        exps, maxima = buffers(x_ND, 0, dtype)
    return logp_N, lse_2N, logp_N.new_empty(0) if u_ND is None else u_ND, exps, maxima


@linear_logprobs.register_fake
def _(x_ND, weight_VD, bias_V, targets_N, numbers, *, needs, logits_budget, backend, **_):
    dtype, wants = accumulation_dtype(x_ND, weight_VD), Needs(*needs)
    keeps_u = wants.any and not wants.head
    rows = x_ND.new_empty(x_ND.shape[0], dtype=dtype)
    tiles = schedule.kept_tiles(x_ND.shape[0], x_ND, weight_VD, logits_budget, backend) if wants.head else 0
    return (
        rows,
        rows.new_empty(2, x_ND.shape[0]),
        x_ND.new_empty(x_ND.shape if keeps_u else 0, dtype=dtype),
        *buffers(x_ND, tiles, torch.promote_types(x_ND.dtype, weight_VD.dtype)),
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
    logp_N: Tensor,
    lse_2N: Tensor,
    u_ND: Tensor,
    exps: Tensor,
    maxima: Tensor,
    *,
    strip_bytes: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dX_ND, dW_VD, db_V (empty where not wanted) for upstream gradients grad_N of logp_N."""
    head, wants = Numbers.read(numbers).head(weight_VD, bias_V), Needs(*needs)
    if not wants.head:
        dx_ND = (u_ND * (head.scale * grad_N[:, None])).to(x_ND.dtype)
        return dx_ND, logp_N.new_empty(0), logp_N.new_empty(0)
    targets_N = targets_N.contiguous()
    columns = kept_columns(x_ND.shape[0], weight_VD.shape[0], maxima.shape[0])
    grads = schedule.backward_by_strips(
        load_form(backend, x_ND, targets_N, head, strip_bytes, columns),
        x_ND,
        targets_N,
        logp_N,
        lse_2N,
        grad_N,
        head,
        wants,
        strip_bytes,
        Kept(columns, exps, maxima) if columns else None,
    )
    return (
        grads.x_ND.to(x_ND.dtype) if wants.hidden else logp_N.new_empty(0),
        grads.weight_VD if wants.weight else logp_N.new_empty(0),
        grads.bias_V if wants.bias else logp_N.new_empty(0),
    )


@linear_logprobs_backward.register_fake
def _(grad_N, x_ND, weight_VD, bias_V, targets_N, numbers, logp_N, *_, needs, **__):
    inputs = (x_ND, weight_VD, bias_V)
    return tuple(
        t.new_empty(t.shape) if wanted else logp_N.new_empty(0) for t, wanted in zip(inputs, needs, strict=True)
    )


def _save_for_backward(ctx, inputs, keyword_only_inputs, output) -> None:
    # Autograd would make an (N, D) tensor of zeros for u_ND, which has no gradient.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)
    dropped = ("head_frozen", "logits_budget")
    ctx.settings = {name: value for name, value in keyword_only_inputs.items() if name not in dropped}
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_N, *_):
    grads = [None] * 3
    # Undefined where nothing that is differentiated came from the log-probabilities.
    if grad_N is not None:
        grads = torch.ops.orpo.linear_logprobs_backward(grad_N, *ctx.saved_tensors, **ctx.settings)
    return *(g if wanted else None for g, wanted in zip(grads, ctx.settings["needs"], strict=True)), None, None


linear_logprobs.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.orpo.linear_logprobs, get_raw=True)
def _(x_ND, weight_VD, *_, needs, logits_budget, backend, head_frozen, **__) -> int:
    # On a CPU log-probabilities have no bins.
    budget = 0 if backend == "torch" else logits_budget
    return schedule.forward_flops(x_ND, weight_VD, Needs(*needs), budget, backend, head_frozen)


@register_flop_formula(torch.ops.orpo.linear_logprobs_backward, get_raw=True)
def _(_, x_ND, weight_VD, *rest, needs, **__) -> int:
    wants, maxima = Needs(*needs), rest[-1]
    return schedule.backward_flops(x_ND, weight_VD, wants, maxima.shape[0]) if wants.head else 0
