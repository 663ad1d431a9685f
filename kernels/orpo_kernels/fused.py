"""The fused operator: hidden states and rows in, ORPO loss out, gradients registered with autograd.

    orpo::linear_orpo          hidden_RD, W_VD, rows -> loss and its parts               Eqs. 1-7
    orpo::linear_orpo_backward upstream gradient     -> dX, dW, db                       Eq. 8

They are custom operators so that torch.compile sees one node with known shapes. Kept exponentials (kept.py) are flat
buffers whose sizes N and the budget decide.

Letters: R hidden states, N rows, P pairs, S = 2P sequences, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from orpo_kernels import strips
from orpo_kernels.cpu import bins
from orpo_kernels.head import Gradients, Head, Needs
from orpo_kernels.kept import Kept, buffers, clear_padding
from orpo_kernels.matmul import accumulation_dtype, matmul, operator_body, saved_dtype, widened_matmul
from orpo_kernels.plan import Plan, Way, make_plan
from orpo_kernels.reference import Objective
from orpo_kernels.rows import Rows, check_rows
from orpo_kernels.settings import Numbers


class Output(NamedTuple):
    """What the operator returns, as a list: the results, and what backward needs of it, empty where it needs none.

    Attributes:
        loss, nll_loss, odds_ratio_loss, mean_logp_S, log_odds_P, pair_mask_P: as `reference.Objective`.
        mean_hidden_2D: mean hidden state of the chosen and of the rejected rows.
        logp_N, lse_2N, coef_N, exps, maxima: where gradients are still to be computed.
        dx_RD, dw_VD, db_V: where they are finished, for an upstream gradient of 1.
    """

    loss: Tensor
    nll_loss: Tensor
    odds_ratio_loss: Tensor
    mean_logp_S: Tensor
    log_odds_P: Tensor
    pair_mask_P: Tensor
    mean_hidden_2D: Tensor
    logp_N: Tensor
    lse_2N: Tensor
    coef_N: Tensor
    exps: Tensor
    maxima: Tensor
    dx_RD: Tensor
    dw_VD: Tensor
    db_V: Tensor


def _scatter_rows(dx_ND: Tensor, rows_N: Tensor, hidden_RD: Tensor, dtype: torch.dtype) -> Tensor:
    """dX back at the places of its rows. An index occurs at most twice, and x + y == y + x: no order to depend on."""
    return torch.zeros_like(hidden_RD, dtype=dtype, memory_format=torch.contiguous_format).index_add_(
        0, rows_N, dx_ND.to(dtype)
    )


def _count_pairs(rows: Rows) -> Tensor:
    """Pairs with at least one response token on either side."""
    # Not by a boolean index, whose size the host of a GPU would have to wait for.
    scored_S = torch.zeros(2 * rows.pairs, dtype=torch.int32, device=rows.sequence_N.device)
    scored_S = scored_S.scatter_reduce(0, rows.sequence_N, rows.in_response_N.int(), "amax")
    return (scored_S[: rows.pairs] * scored_S[rows.pairs :]).sum()


def _mean_hidden(x_ND: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """Mean hidden state of the chosen and of the rejected rows: all that a mean over logits needs (metrics)."""
    chosen_N = rows.sequence_N < rows.pairs
    picks_2N = torch.stack([chosen_N, ~chosen_N])
    if not rows.all_count:
        picks_2N &= rows.in_response_N | rows.in_nll_N
    picks_2N = picks_2N.to(dtype)
    # Divided at the end: 1 / n is not a number of bfloat16, and would be off by 2^-9 in every term.
    if x_ND.is_cuda:
        sums_2D = matmul(picks_2N.to(x_ND.dtype), x_ND, dtype)
    else:
        # A CPU's narrow matmul would round its sums, or be emulated.
        sums_2D = widened_matmul(picks_2N, x_ND, dtype)
    return sums_2D / picks_2N.sum(1, keepdim=True).clamp(min=1)


@torch.library.custom_op("orpo::linear_orpo", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
@operator_body
def linear_orpo(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows: list[Tensor],
    numbers: Tensor,
    *,
    pairs: int,
    source: str,
    all_count: bool,
    logits_budget: int | None,
    strip_bytes: int | None,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """`Output`, for the arrays of `Rows`, `LossSettings.numbers`, a source as in `check_rows`, and `Needs`."""
    settings, wants = Numbers.read(numbers), Needs(*needs)
    head = settings.head(weight_VD, bias_V)
    # Contiguous: kernels step through them one element after the other.
    rows = Rows(*rows, pairs, all_count).map(Tensor.contiguous)
    check_rows(rows, hidden_RD.shape[0], weight_VD.shape[0], source)
    x_ND, dtype = hidden_RD[rows.rows_N], accumulation_dtype(hidden_RD, weight_VD)
    plan = make_plan(x_ND, weight_VD, len(x_ND), wants, logits_budget, strip_bytes, backend)
    exps, maxima = buffers(x_ND, plan.row_tiles if wants.any else 0, torch.promote_types(x_ND.dtype, weight_VD.dtype))
    kept = Kept(plan.columns, exps, maxima) if wants.any and plan.columns else None
    logp_N, lse_2N, result, grads = _forward(plan, x_ND, rows, head, settings, kept)
    output = Output(*result[:6], _mean_hidden(x_ND, rows, dtype), *(logp_N.new_empty(0) for _ in range(8)))
    if plan.recomputes:
        clear_padding(exps, maxima, plan.rows, plan.columns)
        output = output._replace(logp_N=logp_N, lse_2N=lse_2N, coef_N=result.coef_N, exps=exps, maxima=maxima)
    else:
        # The gradient of a frozen head's hidden states is finished, and nothing is left to keep.
        exps, maxima = buffers(x_ND, 0, exps.dtype)
        finished = _finished(grads, rows, hidden_RD, weight_VD, bias_V, wants)
        output = output._replace(exps=exps, maxima=maxima, **finished)
    return list(output)


def _forward(
    plan: Plan, x_ND: Tensor, rows: Rows, head: Head, numbers: Numbers, kept: Kept | None
) -> tuple[Tensor, Tensor | None, Objective, Gradients]:
    """Stages 1 and 2, and stage 3 where it can be done at once: (logp_N, lse_2N, objective, gradients).

    lse_2N is None for tiles; gradients are complete, for an upstream gradient of 1, unless the plan `recomputes`.
    """
    if plan.way == Way.TILES:
        dtype = accumulation_dtype(x_ND, head.weight_VD)
        # Each bin counts its own rows alone. As floating point: an integer tensor would turn what it divides into
        # torch's default dtype.
        num_nll_tokens = numbers.num_nll_tokens or rows.in_nll_N.sum(dtype=dtype).clamp(min=1)
        num_pairs = numbers.num_pairs or _count_pairs(rows).to(dtype).clamp(min=1)
        settings = numbers.of_objective() | dict(num_nll_tokens=num_nll_tokens, num_pairs=num_pairs)
        logp_N, gradients = bins.forward(plan, x_ND, rows, head, settings)
        return logp_N, None, plan.stages.objective(logp_N, rows, **settings), gradients
    stats, u_ND = strips.token_stats(plan, x_ND, rows.targets_N, head, kept)
    objective = plan.stages.objective(stats[0], rows, **numbers.of_objective())
    dx_ND = None if u_ND is None else u_ND.mul_(head.scale * objective.coef_N[:, None])
    return *stats, objective, Gradients(x_ND=dx_ND)


def _finished(
    grads: Gradients, rows: Rows, hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, wants: Needs
) -> dict[str, Tensor]:
    """The gradients of `Output` that are wanted, in the dtypes in which they wait for an upstream gradient."""
    finished = {}
    if wants.hidden:
        finished["dx_RD"] = _scatter_rows(grads.x_ND, rows.rows_N, hidden_RD, saved_dtype(hidden_RD))
    if wants.weight:
        finished["dw_VD"] = grads.weight_VD.to(saved_dtype(weight_VD))
    if wants.bias:
        finished["db_V"] = grads.bias_V.to(saved_dtype(bias_V))
    return finished


@linear_orpo.register_fake
def _(hidden_RD, weight_VD, bias_V, rows, numbers, *, pairs, needs, logits_budget, strip_bytes, backend, **_):
    wants, n = Needs(*needs), rows[0].shape[0]
    dtype, tiles, recompute = accumulation_dtype(hidden_RD, weight_VD), 0, False
    # A frozen head leaves nothing to backward, whatever its plan, which would ask for the number of rows.
    if wants.head:
        plan = make_plan(hidden_RD, weight_VD, n, wants, logits_budget, strip_bytes, backend)
        recompute, tiles = plan.recomputes, plan.row_tiles

    def floats(*shape: int) -> Tensor:
        return hidden_RD.new_empty(shape, dtype=dtype)

    def saved(t: Tensor | None, wanted: bool) -> Tensor:
        return t.new_empty(t.shape, dtype=saved_dtype(t)) if wanted and not recompute else floats(0)

    return [
        floats(),
        floats(),
        floats(),
        floats(2 * pairs),
        floats(pairs),
        hidden_RD.new_empty(pairs, dtype=torch.bool),
        floats(2, hidden_RD.shape[1]),
        floats(n if recompute else 0),
        floats(2, n) if recompute else floats(0),
        floats(n if recompute else 0),
        *buffers(hidden_RD, tiles, torch.promote_types(hidden_RD.dtype, weight_VD.dtype)),
        saved(hidden_RD, wants.hidden),
        saved(weight_VD, wants.weight),
        saved(bias_V, wants.bias),
    ]


def _backward_plan(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    rows_N: Tensor,
    logits_budget: int | None,
    strip_bytes: int | None,
    backend: str,
    needs: list[bool],
) -> Plan:
    """The forward's: where backward computes anything, the head is trained."""
    wants = Needs(*needs)
    return make_plan(hidden_RD, weight_VD, rows_N.shape[0], wants, logits_budget, strip_bytes, backend)


@torch.library.custom_op("orpo::linear_orpo_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
@operator_body
def linear_orpo_backward(
    grad_loss: Tensor,
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows_N: Tensor,
    targets_N: Tensor,
    numbers: Tensor,
    saved: list[Tensor],
    *,
    logits_budget: int | None,
    strip_bytes: int | None,
    backend: str,
    needs: list[bool],
) -> list[Tensor]:
    """[dX_RD, dW_VD, db_V], empty where not wanted, for an upstream gradient; saved is `Output` from logp_N on."""
    wants = Needs(*needs)
    plan = _backward_plan(hidden_RD, weight_VD, rows_N, logits_budget, strip_bytes, backend, needs)
    logp_N, lse_2N, coef_N, exps, maxima, *finished = saved
    if not plan.recomputes:
        # Out of place: with retain_graph the same saved gradients are scaled again.
        pairs = zip(finished, (hidden_RD, weight_VD, bias_V), needs[:3], strict=True)
        return [(t * grad_loss).to(like.dtype) if wanted else torch.empty_like(t) for t, like, wanted in pairs]
    head = Numbers.read(numbers).head(weight_VD, bias_V)
    kept = Kept(plan.columns, exps, maxima) if plan.columns else None
    x_ND, coef_N, targets_N = hidden_RD[rows_N], coef_N * grad_loss, targets_N.contiguous()
    grads = strips.backward(plan, x_ND, targets_N, logp_N, lse_2N, coef_N, head, kept)
    return [
        _scatter_rows(grads.x_ND, rows_N, hidden_RD, hidden_RD.dtype) if wants.hidden else coef_N.new_empty(0),
        grads.weight_VD if wants.weight else coef_N.new_empty(0),
        grads.bias_V if wants.bias else coef_N.new_empty(0),
    ]


@linear_orpo_backward.register_fake
def _(grad_loss, hidden_RD, weight_VD, bias_V, rows_N, targets_N, numbers, saved, *, needs, **_):
    inputs = zip((hidden_RD, weight_VD, bias_V), needs[:3], strict=True)
    return [t.new_empty(t.shape) if wanted else saved[0].new_empty(0) for t, wanted in inputs]


_BACKWARD_SETTINGS = ("logits_budget", "strip_bytes", "backend", "needs")


def _save_for_backward(ctx, inputs, keyword_only_inputs, output) -> None:
    # Autograd would make a (V, D) tensor of zeros for the finished gradient among the outputs, which has no gradient.
    ctx.set_materialize_grads(False)
    hidden_RD, weight_VD, bias_V, rows, numbers = inputs
    ctx.save_for_backward(hidden_RD, weight_VD, bias_V, rows[0], rows[1], numbers, *output[7:])
    ctx.settings = {name: keyword_only_inputs[name] for name in _BACKWARD_SETTINGS}
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, upstream):
    (grad_loss, *_), needs = upstream, ctx.settings["needs"]
    grads = [None] * 3
    # Undefined where nothing that is differentiated came from the loss.
    if grad_loss is not None:
        grads = _gradients(grad_loss, ctx.saved_tensors, ctx.settings)
    return *(g if wanted else None for g, wanted in zip(grads, needs[:3], strict=True)), [None] * 5, None


def _gradients(grad_loss: Tensor, saved: tuple[Tensor | None, ...], settings: dict) -> list[Tensor | None]:
    # The head's needs alone first, as in the shapes above.
    trained = any(settings["needs"][1:3])
    recomputes = trained and _backward_plan(saved[0], saved[1], saved[3], **settings).recomputes
    if recomputes or _graph_is_kept() or type(grad_loss) is not Tensor:
        return torch.ops.orpo.linear_orpo_backward(grad_loss, *saved[:6], list(saved[6:]), **settings)
    # Nobody will ask for the finished gradients again: a scaled copy would cost as much memory once more.
    finished = zip(saved[-3:], saved[:3], settings["needs"][:3], strict=True)
    return [_scaled_(t, grad_loss).to(like.dtype) if wanted else None for t, like, wanted in finished]


def _graph_is_kept() -> bool:
    """Whether another backward may follow (`retain_graph`); where torch does not say, yes."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or ask()


def _scaled_(finished: Tensor, grad_loss: Tensor) -> Tensor:
    # On a CPU reading the factor costs nothing, and it nearly always is 1.
    if grad_loss.is_cpu and grad_loss.item() == 1:
        return finished
    return finished.mul_(grad_loss)


linear_orpo.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.orpo.linear_orpo, get_raw=True)
def _(hidden_RD, weight_VD, _, rows, *__, needs, logits_budget, strip_bytes, backend, **___) -> int:
    n, wants = rows[0].shape[0], Needs(*needs)
    plan = make_plan(hidden_RD, weight_VD, n, wants, logits_budget, strip_bytes, backend)
    return plan.forward_flops(hidden_RD.shape[1])


@register_flop_formula(torch.ops.orpo.linear_orpo_backward, get_raw=True)
def _(_, hidden_RD, weight_VD, __, rows_N, *___, needs, logits_budget, strip_bytes, backend, **____) -> int:
    plan = _backward_plan(hidden_RD, weight_VD, rows_N, logits_budget, strip_bytes, backend, needs)
    return plan.backward_flops(hidden_RD.shape[1])
