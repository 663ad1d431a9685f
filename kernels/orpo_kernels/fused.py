"""The fused operator: hidden states and rows in, ORPO loss out, gradients registered with autograd.

    orpo::linear_orpo          hidden_RD, W_VD, rows -> loss and its parts               Eqs. 1-7
    orpo::linear_orpo_backward upstream gradient     -> dX, dW, db                       Eq. 8

They are custom operators so that torch.compile, and whatever else looks at operators, sees one node with known shapes.
Where nobody looks, eager.py runs the same without their wrapper. Kept exponentials (kept.py) are flat buffers whose
sizes N and the budget decide. `group` is the name of the process group over whose ranks the head is cut (shard.py), ""
for none: then V are this rank's columns. `sequence_group` is that of the ranks that have the sequences' other positions
(slices.py), "" for none: then R and N are this rank's, and the loss is that of all of them.

Letters: R hidden states, N rows, P pairs, S = 2P sequences, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from orpo_kernels import strips
from orpo_kernels.cpu import bins
from orpo_kernels.head import Gradients, Head, Needs
from orpo_kernels.kept import Kept, buffers, clear_padding
from orpo_kernels.matmul import accumulation_dtype, operator_body, saved_dtype
from orpo_kernels.plan import Plan, Way
from orpo_kernels.reference import Objective
from orpo_kernels.rows import Rows, check_rows, count_pairs
from orpo_kernels.saved import by_operator, call_plan, save_for_backward
from orpo_kernels.settings import Numbers
from orpo_kernels.slices import Slices


class Output(NamedTuple):
    """What the operator returns, as a list: the results, and what backward needs of it, empty where it needs none.

    Within an operator None stands for what is empty.

    Attributes:
        loss, nll_loss, odds_ratio_loss, mean_logp_S, log_odds_P, pair_mask_P: as `reference.Objective`.
        mean_hidden_2D: mean hidden state of the chosen and of the rejected rows.
        logp_N, lse_2N, coef_N, exps, maxima: where gradients are still to be computed.
        targets_N: there, those of this rank's columns, where it has not all of them.
        dx_RD, dw_VD, db_V: where they are finished, for an upstream gradient of 1.
    """

    loss: Tensor
    nll_loss: Tensor
    odds_ratio_loss: Tensor
    mean_logp_S: Tensor
    log_odds_P: Tensor
    pair_mask_P: Tensor
    mean_hidden_2D: Tensor
    logp_N: Tensor | None = None
    lse_2N: Tensor | None = None
    coef_N: Tensor | None = None
    exps: Tensor | None = None
    maxima: Tensor | None = None
    targets_N: Tensor | None = None
    dx_RD: Tensor | None = None
    dw_VD: Tensor | None = None
    db_V: Tensor | None = None


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
    group: str = "",
    sequence_group: str = "",
) -> list[Tensor]:
    """`Output`, for the arrays of `Rows`, `LossSettings.numbers`, a source as in `check_rows`, and `Needs`.

    A source of "checked" is not checked again.
    """
    settings = dict(logits_budget=logits_budget, strip_bytes=strip_bytes, backend=backend)
    settings |= dict(needs=needs, group=group, sequence_group=sequence_group)
    rows = Rows(*rows, pairs, all_count)
    output, plan = forward(hidden_RD, weight_VD, bias_V, rows, numbers, source, **settings)
    if output.exps is None:
        exps, maxima = buffers(hidden_RD, 0, torch.promote_types(hidden_RD.dtype, weight_VD.dtype))
        output = output._replace(exps=exps, maxima=maxima)
    else:
        clear_padding(output.exps, output.maxima, plan.rows, plan.columns)
    if output.targets_N is None:
        output = output._replace(targets_N=rows.targets_N.new_empty(0))
    return [output.loss.new_empty(0) if t is None else t for t in output]


def forward(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows: Rows,
    numbers: Tensor,
    source: str,
    **settings,
) -> tuple[Output, Plan]:
    """What `linear_orpo` computes, and by which plan; `settings` are its other arguments."""
    numbers, wants, group = Numbers.read(numbers), Needs(*settings["needs"]), settings["group"]
    head, slices = numbers.head(weight_VD, bias_V, group), Slices(settings["sequence_group"])
    # Contiguous: kernels step through them one element after the other.
    rows, n = rows.map(Tensor.contiguous), rows.rows_N.shape[0]

    def place() -> tuple[Plan, Tensor]:
        # Before anything that one rank alone could refuse: the others would wait for it.
        vocabulary, targets_N = head.shard.place(weight_VD.shape[0], rows.targets_N)
        plan = call_plan(hidden_RD, weight_VD, n, **settings)
        if source != "checked":
            check = check_rows if group else plan.stages.check
            check(rows, hidden_RD.shape[0], vocabulary, source)
        return plan, targets_N

    plan, targets_N = slices.agree(place, rows, group)
    rows = replace(rows, targets_N=targets_N)
    x_ND, dtype = hidden_RD[rows.rows_N], accumulation_dtype(hidden_RD, weight_VD)
    kept = None
    if wants.any and plan.columns:
        exps_dtype = torch.promote_types(x_ND.dtype, weight_VD.dtype)
        kept = Kept(plan.columns, *buffers(x_ND, plan.row_tiles, exps_dtype), overwrite=not plan.recomputes)
    logp_N, lse_2N, result, grads = _forward(plan, x_ND, rows, head, numbers, kept, slices)
    output = Output(*result[:6], plan.stages.mean_hidden(x_ND, rows, dtype, slices))
    if not plan.recomputes:
        # The gradient of a frozen head's hidden states is finished, and nothing is left to keep.
        return output._replace(**_finished(plan, grads, rows, hidden_RD, weight_VD, bias_V, wants)), plan
    output = output._replace(logp_N=logp_N, lse_2N=lse_2N, coef_N=result.coef_N)
    if group:
        output = output._replace(targets_N=targets_N)
    return output if kept is None else output._replace(exps=kept.exps, maxima=kept.maxima), plan


def _forward(
    plan: Plan, x_ND: Tensor, rows: Rows, head: Head, numbers: Numbers, kept: Kept | None, slices: Slices
) -> tuple[Tensor, Tensor | None, Objective, Gradients]:
    """Stages 1 and 2, and stage 3 where it can be done at once: (logp_N, lse_2N, objective, gradients).

    lse_2N is None for tiles; gradients are complete, for an upstream gradient of 1, unless the plan `recomputes`.
    """
    if plan.way == Way.TILES:
        dtype = accumulation_dtype(x_ND, head.weight_VD)
        # Each bin counts its own rows alone. As floating point: an integer tensor would turn what it divides into
        # torch's default dtype.
        num_nll_tokens = numbers.num_nll_tokens or rows.in_nll_N.sum(dtype=dtype).clamp(min=1)
        num_pairs = numbers.num_pairs or count_pairs(rows).to(dtype).clamp(min=1)
        settings = numbers.of_objective() | dict(num_nll_tokens=num_nll_tokens, num_pairs=num_pairs)
        logp_N, gradients = bins.forward(plan, x_ND, rows, head, settings)
        return logp_N, None, plan.stages.objective(logp_N, rows, **settings), gradients
    stats, u_ND = strips.token_stats(plan, x_ND, rows.targets_N, head, kept)
    objective = plan.stages.objective(stats[0], rows, slices=slices, **numbers.of_objective())
    coef_N = None if u_ND is None else head.scale * objective.coef_N
    return *stats, objective, Gradients(x_ND=u_ND, x_coef_N=coef_N)


def _finished(
    plan: Plan, grads: Gradients, rows: Rows, hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, wants: Needs
) -> dict[str, Tensor]:
    """The gradients of `Output` that are wanted, in the dtypes in which they wait for an upstream gradient."""
    finished = {}
    if wants.hidden:
        dtype = saved_dtype(hidden_RD)
        finished["dx_RD"] = plan.stages.placed(grads.x_ND, grads.x_coef_N, rows.rows_N, hidden_RD, dtype)
    if wants.weight:
        finished["dw_VD"] = grads.weight_VD.to(saved_dtype(weight_VD))
    if wants.bias:
        finished["db_V"] = grads.bias_V.to(saved_dtype(bias_V))
    return finished


@linear_orpo.register_fake
def _(hidden_RD, weight_VD, bias_V, rows, numbers, *, pairs, needs, group="", source, all_count, **settings):
    wants, n = Needs(*needs), rows[0].shape[0]
    dtype, tiles, recompute = accumulation_dtype(hidden_RD, weight_VD), 0, False
    # A frozen head leaves nothing to backward, whatever its plan, which would ask for the number of rows.
    if wants.head:
        plan = call_plan(hidden_RD, weight_VD, n, needs=needs, group=group, **settings)
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
        rows[1].new_empty(n if recompute and group else 0),
        saved(hidden_RD, wants.hidden),
        saved(weight_VD, wants.weight),
        saved(bias_V, wants.bias),
    ]


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
    group: str = "",
    sequence_group: str = "",
) -> list[Tensor]:
    """[dX_RD, dW_VD, db_V], empty where not wanted, for an upstream gradient; saved is `Output` from logp_N on."""
    settings = dict(logits_budget=logits_budget, strip_bytes=strip_bytes, backend=backend)
    settings |= dict(needs=needs, group=group, sequence_group=sequence_group)
    plan = call_plan(hidden_RD, weight_VD, rows_N.shape[0], **settings)
    if not plan.recomputes:
        # Out of place: with retain_graph the same saved gradients are scaled again.
        pairs = zip(saved[6:], (hidden_RD, weight_VD, bias_V), needs[:3], strict=True)
        return [(t * grad_loss).to(like.dtype) if wanted else torch.empty_like(t) for t, like, wanted in pairs]
    inputs = hidden_RD, weight_VD, bias_V, rows_N, targets_N, numbers
    grads = backward(plan, grad_loss, *inputs, saved, group=group)
    return [saved[0].new_empty(0) if t is None else t for t in grads]


def backward(
    plan: Plan,
    grad_loss: Tensor,
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows_N: Tensor,
    targets_N: Tensor,
    numbers: Tensor,
    saved: Sequence[Tensor | None],
    *,
    group: str,
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dX_RD, dW_VD, db_V), None where not wanted, of a plan that `recomputes`.

    `overwrite`: kept exponentials may be used up, of which a second backward makes the same.
    """
    logp_N, lse_2N, coef_N, exps, maxima, own_targets_N = saved[:6]
    head = Numbers.read(numbers).head(weight_VD, bias_V, group)
    kept = Kept(plan.columns, exps, maxima, overwrite) if plan.columns else None
    # Contiguous: kernels step through them one element after the other.
    rows_N, targets_N = rows_N.contiguous(), own_targets_N if group else targets_N.contiguous()
    x_ND = hidden_RD[rows_N]
    grads = strips.backward(plan, x_ND, targets_N, logp_N, lse_2N, coef_N, head, kept, upstream=grad_loss)
    dx_RD = None
    if plan.needs.hidden:
        dx_RD = plan.stages.placed(grads.x_ND, grads.x_coef_N, rows_N, hidden_RD, hidden_RD.dtype)
    return dx_RD, grads.weight_VD, grads.bias_V


@linear_orpo_backward.register_fake
def _(grad_loss, hidden_RD, weight_VD, bias_V, rows_N, targets_N, numbers, saved, *, needs, **_):
    inputs = zip((hidden_RD, weight_VD, bias_V), needs[:3], strict=True)
    return [t.new_empty(t.shape) if wanted else saved[0].new_empty(0) for t, wanted in inputs]


def _save_for_backward(ctx, inputs, keyword_only_inputs, output) -> None:
    save_for_backward(ctx, inputs, keyword_only_inputs, output)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, upstream):
    (grad_loss, *_), needs = upstream, ctx.settings["needs"]
    grads = [None] * 3
    # Undefined where nothing that is differentiated came from the loss.
    if grad_loss is not None:
        grads = by_operator(grad_loss, ctx.saved_tensors, ctx.settings)
    return *(g if wanted else None for g, wanted in zip(grads, needs[:3], strict=True)), [None] * 5, None


linear_orpo.register_autograd(_backward, setup_context=_save_for_backward)


@register_flop_formula(torch.ops.orpo.linear_orpo, get_raw=True)
def _(hidden_RD, weight_VD, _, rows, *__, pairs, source, all_count, group="", out_val=None, **settings) -> int:
    plan = call_plan(hidden_RD, weight_VD, rows[0].shape[0], group=group, **settings)
    return plan.forward_flops(hidden_RD.shape[1])


@register_flop_formula(torch.ops.orpo.linear_orpo_backward, get_raw=True)
def _(_, hidden_RD, weight_VD, __, rows_N, *___, group="", out_val=None, **settings) -> int:
    plan = call_plan(hidden_RD, weight_VD, rows_N.shape[0], group=group, **settings)
    return plan.backward_flops(hidden_RD.shape[1])
