"""The fused operator: hidden states and rows in, ORPO loss out, gradients registered with autograd.

    orpo::linear_orpo          hidden_RD, W_VD, rows -> loss and its parts               Eqs. 1-7
    orpo::linear_orpo_backward upstream gradient     -> dX, dW, db                       Eq. 8

They are custom operators so that torch.compile sees one node with known shapes: how many rows count, and all that
depends on it, stays inside. E rows are described, N <= E of them count (fewer only where labels are read in a graph);
arrays that are saved for backward have E places of which the first N are used, and N itself travels in a CPU tensor.
Kept exponentials (kept.py) are flat buffers whose sizes R, E and the budget decide.

Letters: R hidden states, E described rows, N kept rows, P pairs, S = 2P sequences, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import schedule
from .form import load_form
from .head import Head, Needs
from .kept import Kept, buffers
from .matmul import accumulation_dtype, matmul, operator_body, saved_dtype, widened_matmul
from .rows import Rows, check_sequences, check_targets, that_count


def _pad(values: Tensor, size: int) -> Tensor:
    if values.shape[-1] == size:
        return values
    return torch.nn.functional.pad(values, (0, size - values.shape[-1]))


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
    picks_2N = torch.stack([chosen_N, ~chosen_N]).to(dtype)
    # Divided at the end: 1 / n is not a number of bfloat16, and would be off by 2^-9 in every term.
    if x_ND.is_cuda:
        sums_2D = matmul(picks_2N.to(x_ND.dtype), x_ND, dtype)
    else:
        # A CPU's narrow matmul would round its sums, or be emulated.
        sums_2D = widened_matmul(picks_2N, x_ND, dtype)
    return sums_2D / picks_2N.sum(1, keepdim=True).clamp(min=1)


@torch.library.custom_op("orpo::linear_orpo", mutates_args=())
@operator_body
def linear_orpo(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    rows_E: Tensor,
    targets_E: Tensor,
    sequence_E: Tensor,
    in_response_E: Tensor,
    in_nll_E: Tensor,
    *,
    num_nll_tokens: float | None,
    num_pairs: float | None,
    pairs: int,
    all_rows_count: bool,
    check_order: bool,
    beta: float,
    nll_weight: float,
    logit_scale: float,
    logit_softcap: float | None,
    logits_budget: int,
    strip_bytes: int,
    backend: str,
    needs: list[bool],
    head_frozen: bool,
) -> tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
]:
    """loss, nll_loss, odds_ratio_loss, mean_logp_S, log_odds_P, pair_mask_P, mean_hidden_2D; then what backward needs:
    counts (rows, kept columns; on the host), index_2E, token_4E, exps and maxima where gradients are still to be
    computed, else finished dX_RD, dW_VD, db_V."""
    head, wants = Head(weight_VD, bias_V, logit_scale, logit_softcap), Needs(*needs)
    # Contiguous: kernels step through them one element after the other.
    arrays = (t.contiguous() for t in (rows_E, targets_E, sequence_E, in_response_E, in_nll_E))
    rows = Rows(*arrays, pairs)
    if check_order:
        check_sequences(rows)
    if not all_rows_count:
        rows = that_count(rows)
    check_targets(rows.targets_N, weight_VD.shape[0])
    x_ND, size = hidden_RD[rows.rows_N], rows_E.shape[0]
    keep = schedule.keeping(x_ND, size, hidden_RD, weight_VD, logits_budget, backend, head_frozen)
    be = load_form(backend, x_ND, rows.targets_N, head, strip_bytes, keep.columns)
    dtype = accumulation_dtype(hidden_RD, weight_VD)
    if schedule.uses_bins(logits_budget, backend):
        # Each bin counts its own rows alone. As floating point: an integer tensor would turn what it divides into
        # torch's default dtype.
        num_nll_tokens = num_nll_tokens or rows.in_nll_N.sum(dtype=dtype).clamp(min=1)
        num_pairs = num_pairs or _count_pairs(rows).to(dtype).clamp(min=1)
    settings = dict(beta=beta, nll_weight=nll_weight, num_nll_tokens=num_nll_tokens, num_pairs=num_pairs)
    exps, maxima = buffers(x_ND, keep.tiles if wants.any else 0, torch.promote_types(x_ND.dtype, weight_VD.dtype))
    kept = Kept(keep.columns, exps, maxima) if wants.any and keep.columns else None
    logp_N, lse_2N, result, grads = schedule.forward(
        be, x_ND, rows, head, settings, wants, head_frozen, logits_budget, strip_bytes, keep, kept
    )

    counts, index_2E = torch.tensor([0, 0]), rows.rows_N.new_empty(0)
    token_4E, dx_RD, dw_VD, db_V = (logp_N.new_empty(0) for _ in range(4))
    if schedule.recomputes(wants, logits_budget, backend):
        counts = torch.tensor([x_ND.shape[0], keep.columns])
        index_2E = _pad(torch.stack([rows.rows_N, rows.targets_N]), size)
        token_4E = _pad(torch.cat([logp_N[None], lse_2N, result.coef_N[None]]), size)
    elif wants.any:
        # The gradient of a frozen head's hidden states is finished, and nothing is left to keep.
        kept, (exps, maxima) = None, buffers(x_ND, 0, exps.dtype)
        if wants.hidden:
            dx_RD = _scatter_rows(grads.x_ND, rows.rows_N, hidden_RD, saved_dtype(hidden_RD))
        if wants.weight:
            dw_VD = grads.weight_VD.to(saved_dtype(weight_VD))
        if wants.bias:
            db_V = grads.bias_V.to(saved_dtype(bias_V))
    return (
        result.loss,
        result.nll_loss,
        result.odds_ratio_loss,
        result.mean_logp_S,
        result.log_odds_P,
        result.pair_mask_P,
        _mean_hidden(x_ND, rows, dtype),
        counts,
        index_2E,
        token_4E,
        exps,
        maxima,
        dx_RD,
        dw_VD,
        db_V,
    )


@linear_orpo.register_fake
def _(hidden_RD, weight_VD, bias_V, rows_E, targets_E, *_, pairs, needs, logits_budget, backend, **__):
    wants, size = Needs(*needs), rows_E.shape[0]
    dtype = accumulation_dtype(hidden_RD, weight_VD)
    recompute = schedule.recomputes(wants, logits_budget, backend)
    tiles = schedule.kept_tiles(size, hidden_RD, weight_VD, logits_budget, backend) if recompute else 0

    def floats(*shape: int) -> Tensor:
        return hidden_RD.new_empty(shape, dtype=dtype)

    def saved(t: Tensor | None, wanted: bool) -> Tensor:
        return t.new_empty(t.shape, dtype=saved_dtype(t)) if wanted and not recompute else floats(0)

    return (
        floats(),
        floats(),
        floats(),
        floats(2 * pairs),
        floats(pairs),
        hidden_RD.new_empty(pairs, dtype=torch.bool),
        floats(2, hidden_RD.shape[1]),
        torch.empty(2, dtype=torch.int64, device="cpu"),
        rows_E.new_empty((2, size) if recompute else 0),
        floats(4, size) if recompute else floats(0),
        *buffers(hidden_RD, tiles, torch.promote_types(hidden_RD.dtype, weight_VD.dtype)),
        saved(hidden_RD, wants.hidden),
        saved(weight_VD, wants.weight),
        saved(bias_V, wants.bias),
    )


@torch.library.custom_op("orpo::linear_orpo_backward", mutates_args=())
@operator_body
def linear_orpo_backward(
    grad_loss: Tensor,
    hidden_RD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    counts: Tensor,
    index_2E: Tensor,
    token_4E: Tensor,
    exps: Tensor,
    maxima: Tensor,
    dx_RD: Tensor,
    dw_VD: Tensor,
    db_V: Tensor,
    *,
    logit_scale: float,
    logit_softcap: float | None,
    logits_budget: int,
    strip_bytes: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dX_RD, dW_VD, db_V (empty where not wanted) for an upstream gradient of the loss."""
    wants = Needs(*needs)
    if not schedule.recomputes(wants, logits_budget, backend):
        # Out of place: with retain_graph the same saved gradients are scaled again.
        saved = ((dx_RD, hidden_RD), (dw_VD, weight_VD), (db_V, bias_V))
        return tuple(
            (t * grad_loss).to(like.dtype) if wanted else torch.empty_like(t)
            for (t, like), wanted in zip(saved, needs, strict=True)
        )
    n, columns = counts.tolist()
    rows_N, targets_N = index_2E[:, :n]
    logp_N, lse_2N, coef_N = token_4E[0, :n], token_4E[1:3, :n].contiguous(), token_4E[3, :n]
    head = Head(weight_VD, bias_V, logit_scale, logit_softcap)
    x_ND, coef_N = hidden_RD[rows_N], coef_N * grad_loss
    be = load_form(backend, x_ND, targets_N, head, strip_bytes, columns)
    kept = Kept(columns, exps, maxima) if columns else None
    grads = schedule.backward_by_strips(be, x_ND, targets_N, logp_N, lse_2N, coef_N, head, wants, strip_bytes, kept)
    return (
        _scatter_rows(grads.x_ND, rows_N, hidden_RD, hidden_RD.dtype) if wants.hidden else coef_N.new_empty(0),
        grads.weight_VD if wants.weight else coef_N.new_empty(0),
        grads.bias_V if wants.bias else coef_N.new_empty(0),
    )


@linear_orpo_backward.register_fake
def _(grad_loss, hidden_RD, weight_VD, bias_V, counts, index_2E, token_4E, *_, needs, **__):
    none = token_4E.new_empty(0)
    return tuple(
        t.new_empty(t.shape) if wanted else none
        for t, wanted in zip((hidden_RD, weight_VD, bias_V), needs, strict=True)
    )


_BACKWARD_SETTINGS = ("logit_scale", "logit_softcap", "logits_budget", "strip_bytes", "backend", "needs")


def _save_for_backward(ctx, inputs, keyword_only_inputs, output) -> None:
    # Autograd would make a (V, D) tensor of zeros for the finished gradient among the outputs, which has no gradient.
    ctx.set_materialize_grads(False)
    hidden_RD, weight_VD, bias_V = inputs[:3]
    ctx.save_for_backward(hidden_RD, weight_VD, bias_V, *output[7:])
    ctx.settings = {name: keyword_only_inputs[name] for name in _BACKWARD_SETTINGS}
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_loss, *_):
    needs, saved = ctx.settings["needs"], ctx.saved_tensors
    recomputed = schedule.recomputes(Needs(*needs), ctx.settings["logits_budget"], ctx.settings["backend"])
    if recomputed or _graph_is_kept() or type(grad_loss) is not Tensor:
        grads = torch.ops.orpo.linear_orpo_backward(grad_loss, *saved, **ctx.settings)
    else:
        # Nobody will ask for the finished gradients again: a scaled copy would cost as much memory once more.
        finished = zip(saved[-3:], saved[:3], needs, strict=True)
        grads = [_scaled_(t, grad_loss).to(like.dtype) if wanted else None for t, like, wanted in finished]
    return *(g if wanted else None for g, wanted in zip(grads, needs, strict=True)), *(None,) * 5


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
