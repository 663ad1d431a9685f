"""The truth: every stage in plain torch, one function per equation of kernels/README.md.

Works in any floating dtype; the tests run it in float64. It builds the full (N, V) logits and is meant to be read and
compared with, not to train with.

Letters: P pairs, S = 2P sequences, N kept rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.rows import Rows

# Smallest 1 - exp(a) that the odds may be divided by: far below any mean log-probability that matters, so that it acts
# only where 1 - exp(a) is zero, and large enough for 1 / Q_EPS times a hidden state to stay finite in float32.
Q_EPS = 1e-30


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact to rounding for every x (torch's own becomes the identity above a threshold of 20)."""
    # Not max(x, 0) + log1p(exp(-|x|)): autograd takes its slope at 0 for 1, where it is 1/2.
    return torch.logaddexp(x, x.new_zeros(()))


def logits(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Eq. 1: z_NV = cap(scale * (x W^T + b))."""
    u_NV = x_ND @ weight_VD.T
    if bias_V is not None:
        u_NV = u_NV + bias_V
    u_NV = scale * u_NV
    return u_NV if softcap is None else softcap * torch.tanh(u_NV / softcap)


def token_stats(z_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 2: (logp_N, lse_2N), lse = lse_2N[0] + lse_2N[1], of which the first is one of the row's logits.

    The target is left out of the sum, so that logp keeps its relative precision near 0.
    """
    target_N1 = targets_N.long()[:, None]
    others_NV = z_NV.scatter(1, target_N1, -torch.inf)
    max_N = others_NV.amax(1)
    max_N = max_N.masked_fill(max_N == -torch.inf, 0)
    others_N = torch.logsumexp(others_NV - max_N[:, None], dim=1)
    z_y_N = z_NV.gather(1, target_N1)[:, 0] - max_N
    # lse as z_y - logp would be NaN for a target whose own logit is -inf.
    return -softplus(others_N - z_y_N), torch.stack([max_N, torch.logaddexp(others_N, z_y_N)])


class Objective(NamedTuple):
    """What stage 2 returns: the loss, its parts, and coef_N, the only thing that stage 3 knows about them."""

    loss: Tensor
    nll_loss: Tensor
    odds_ratio_loss: Tensor
    mean_logp_S: Tensor
    log_odds_P: Tensor
    pair_mask_P: Tensor
    coef_N: Tensor


def one_minus_exp(a: Tensor) -> Tensor:
    """Eq. 3: q = 1 - exp(a) for a mean log-probability a <= 0, never below Q_EPS."""
    return (-torch.expm1(a)).clamp(min=Q_EPS)


def log_odds_ratio(a_w: Tensor, a_l: Tensor) -> Tensor:
    """Eq. 4: r = (a_w - a_l) - (log q_w - log q_l), the log odds ratio of chosen over rejected."""
    return (a_w - a_l) - (one_minus_exp(a_w).log() - one_minus_exp(a_l).log())


def odds_ratio_grad(a_w: Tensor, a_l: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 6 without beta / P: (d/da_w, d/da_l) of softplus(-r).

    This is minus the delta(d) * h(d) of the paper's Eqs. 8-10, which differentiate +log sigmoid. Quotients are taken
    before products: q_l * M alone underflows where both answers are nearly certain.
    """
    q_w, q_l = one_minus_exp(a_w), one_minus_exp(a_l)
    shift = torch.maximum(a_w, a_l)
    e_w, e_l = torch.exp(a_w - shift), torch.exp(a_l - shift)
    m = q_w * e_l + e_w * q_l
    return -(e_l / m), (q_w / m) * (e_l / q_l)


def objective(
    logp_N: Tensor,
    rows: Rows,
    *,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    num_nll_tokens: float | None = None,
    num_pairs: float | None = None,
) -> Objective:
    """Eqs. 3-7: from log-probabilities to the loss and its derivative by each of them.

    A pair with an empty answer has no odds: it is left out of the sum and of the count.
    """
    settings = dict(beta=beta, nll_weight=nll_weight, num_nll_tokens=num_nll_tokens, num_pairs=num_pairs)
    return objective_of_sums(answer_sums(logp_N, rows), rows, **settings)


def answer_sums(logp_N: Tensor, rows: Rows) -> Tensor:
    """(4, S): the sum over each sequence's response, its length, and the same two of the NLL (Eqs. 3, 5)."""
    masks_2N = torch.stack([rows.in_response_N, rows.in_nll_N])
    # `where` and not a product: a row outside the mask may hold -inf, and 0 * -inf is NaN.
    values_4N = torch.stack([torch.where(masks_2N, logp_N, 0.0), masks_2N.to(logp_N.dtype)], 1).flatten(0, 1)
    return logp_N.new_zeros(4, 2 * rows.pairs).index_add(1, rows.sequence_N, values_4N)


def objective_of_sums(
    sums_4S: Tensor,
    rows: Rows,
    *,
    beta: float,
    nll_weight: float,
    num_nll_tokens: float | None,
    num_pairs: float | None,
) -> Objective:
    """`objective` from `answer_sums`, of which the rows may have a part; coef_N is that of the rows."""
    P, dtype = rows.pairs, sums_4S.dtype
    logp_sum_S, length_S, nll_sum_S, nll_count_S = sums_4S
    mean_logp_S = logp_sum_S / length_S.clamp(min=1)
    a_w, a_l = mean_logp_S[:P], mean_logp_S[P:]
    pair_mask_P = (length_S[:P] > 0) & (length_S[P:] > 0)

    nll_count = nll_count_S.sum().clamp(min=1) if num_nll_tokens is None else num_nll_tokens
    pair_count = pair_mask_P.sum(dtype=dtype).clamp(min=1) if num_pairs is None else num_pairs
    nll_loss = -nll_sum_S.sum() / nll_count
    r_P = torch.where(pair_mask_P, log_odds_ratio(a_w, a_l), 0.0)
    odds_ratio_loss = torch.where(pair_mask_P, softplus(-r_P), 0.0).sum() / pair_count

    grad_w, grad_l = (torch.where(pair_mask_P, beta / pair_count * g, 0.0) for g in odds_ratio_grad(a_w, a_l))
    grad_per_token_S = torch.cat([grad_w, grad_l]) / length_S.clamp(min=1)
    response_N, nll_N = rows.in_response_N.to(dtype), rows.in_nll_N.to(dtype)
    coef_N = -nll_N * nll_weight / nll_count + response_N * grad_per_token_S[rows.sequence_N]
    return Objective(
        loss=nll_weight * nll_loss + beta * odds_ratio_loss,
        nll_loss=nll_loss,
        odds_ratio_loss=odds_ratio_loss,
        mean_logp_S=mean_logp_S,
        log_odds_P=r_P,
        pair_mask_P=pair_mask_P,
        coef_N=coef_N,
    )


def logit_grad(z_NV: Tensor, logp_N: Tensor, lse_2N: Tensor, targets_N: Tensor, softcap: float | None = None) -> Tensor:
    """Eq. 8: g_NV = ([v = y] - p) * cap'(z), with the target's 1 - p_y taken from logp, where it does not cancel."""
    g_NV = -torch.exp(z_NV - lse_2N[0, :, None] - lse_2N[1, :, None])
    g_NV = g_NV.scatter(1, targets_N.long()[:, None], -torch.expm1(logp_N)[:, None])
    return g_NV if softcap is None else g_NV * (1 - (z_NV / softcap) ** 2)


def orpo(
    x_ND: Tensor,
    weight_VD: Tensor,
    rows: Rows,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    **objective_kwargs: float | None,
) -> tuple[Objective, Tensor, Tensor, Tensor]:
    """The three stages in a row: (objective, dX_ND, dW_VD, db_V), Eqs. 1-8, for already gathered rows x_ND."""
    z_NV = logits(x_ND, weight_VD, bias_V, scale, softcap)
    logp_N, lse_2N = token_stats(z_NV, rows.targets_N)
    result = objective(logp_N, rows, **objective_kwargs)
    weighted_NV = scale * result.coef_N[:, None] * logit_grad(z_NV, logp_N, lse_2N, rows.targets_N, softcap)
    return result, weighted_NV @ weight_VD, weighted_NV.T @ x_ND, weighted_NV.sum(0)
