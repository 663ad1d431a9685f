"""Stage 2: from the rows' statistics to the loss, and to one coefficient per row, the only thing stage 3 knows of it.

    O_n = log sum_{v != y_n} exp z_nv,  logp_n = -softplus(O_n - z_y),  lse_n = O_n + softplus(z_y - O_n)      (Eq. 2)
    computed for z - m, m the largest logit but the target's; lse as m and lse - m
    a_s = mean of logp_n over the answer s,   q_s = 1 - exp(a_s)                                               (Eq. 3)
    r_p = (a_w - a_l) - (log q_w - log q_l)                                                                    (Eq. 4)
    loss = nll_weight * NLL + beta * mean_p softplus(-r_p)                                                     (Eq. 5)
    coef_n = -[n in NLL] nll_weight / N_nll + [n in response] dL/da_s / len_s, dL/da_s in closed form       (Eqs. 6-7)

    combine_kernel     max_KN, sum_KN, target_N    ->  logp_N, lse_2N       one program a block of rows
    answers_kernel     logp_N, masks, sequence_N   ->  sums_4S, offsets     one program a sequence
    objective_kernel   sums_4S                     ->  coef_N, parts_P      one program a pair

No sum crosses programs, so the result does not depend on their order. Everything is O(N).

Letters: N rows, K vocabulary splits, P pairs, S = 2P sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.gpu.device_math import expm1, softplus
from orpo_kernels.reference import Q_EPS, Objective
from orpo_kernels.rows import Rows
from orpo_kernels.slices import WHOLE, Slices

_BLOCK = 1024


@triton.jit
def combine_kernel(max_ptr, sum_ptr, target_ptr, logp_ptr, lse_ptr, N, splits, BLOCK: tl.constexpr):
    offs_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_n < N
    max_N = tl.full([BLOCK], float("-inf"), tl.float32)
    sum_N = tl.zeros([BLOCK], tl.float32)
    max_ptrs = max_ptr + offs_n
    sum_ptrs = sum_ptr + offs_n
    for _ in range(splits):
        part_max_N = tl.load(max_ptrs, mask=mask, other=float("-inf"))
        part_sum_N = tl.load(sum_ptrs, mask=mask, other=0.0)
        # The pointers move, since an int32 offset K * N could pass 2^31.
        max_ptrs += N
        sum_ptrs += N
        new_max_N = tl.maximum(max_N, part_max_N)
        shift_N = tl.where(new_max_N == float("-inf"), 0.0, new_max_N)
        sum_N = sum_N * tl.exp(max_N - shift_N) + part_sum_N * tl.exp(part_max_N - shift_N)
        max_N = new_max_N
    # Relative to the maximum: what all logits have in common would take the digits of both.
    max_N = tl.where(max_N == float("-inf"), 0.0, max_N)
    others_N = tl.log(sum_N)
    target_N = tl.load(target_ptr + offs_n, mask=mask, other=0.0) - max_N
    tl.store(logp_ptr + offs_n, -softplus(others_N - target_N), mask=mask)
    tl.store(lse_ptr + offs_n, max_N, mask=mask)
    # From the larger of the two: target - logp would be NaN for a target whose own logit is -inf.
    larger_N = tl.maximum(others_N, target_N)
    tl.store(lse_ptr + N + offs_n, larger_N + softplus(-tl.abs(others_N - target_N)), mask=mask)


@triton.jit
def first_row(sequence_ptr, N, s):
    """The first row of a sequence from s on, N where there is none, by halving: sequences are sorted."""
    low = 0
    high = N
    while low < high:
        middle = low + (high - low) // 2
        before = tl.load(sequence_ptr + middle) < s
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def answers_kernel(logp_ptr, response_ptr, nll_ptr, sequence_ptr, offsets_ptr, sums_ptr, N, S, BLOCK: tl.constexpr):
    s = tl.program_id(0)
    start = first_row(sequence_ptr, N, s)
    end = first_row(sequence_ptr, N, s + 1)
    tl.store(offsets_ptr + s, start)
    if s == S - 1:
        tl.store(offsets_ptr + S, end)
    logp_sum = tl.zeros([BLOCK], tl.float32)
    length = tl.zeros([BLOCK], tl.float32)
    nll_sum = tl.zeros([BLOCK], tl.float32)
    nll_count = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, BLOCK):
        offs_n = first + tl.arange(0, BLOCK)
        mask = offs_n < end
        logp = tl.load(logp_ptr + offs_n, mask=mask, other=0.0)
        response = tl.load(response_ptr + offs_n, mask=mask, other=0) != 0
        nll = tl.load(nll_ptr + offs_n, mask=mask, other=0) != 0
        # Selected, not multiplied: a row outside the mask may hold -inf, and 0 * -inf is NaN.
        logp_sum += tl.where(response, logp, 0.0)
        length += tl.where(response, 1.0, 0.0)
        nll_sum += tl.where(nll, logp, 0.0)
        nll_count += tl.where(nll, 1.0, 0.0)
    tl.store(sums_ptr + s, tl.sum(logp_sum, 0))
    tl.store(sums_ptr + S + s, tl.sum(length, 0))
    tl.store(sums_ptr + 2 * S + s, tl.sum(nll_sum, 0))
    tl.store(sums_ptr + 3 * S + s, tl.sum(nll_count, 0))


@triton.jit
def pair_terms(sums_ptr, pairs, P, mask, Q_EPS: tl.constexpr):
    """Eqs. 3, 4 and 6 (without beta / P) for some pairs: a_w, a_l, both lengths, r, d/da_w, d/da_l, both present."""
    S = 2 * P
    length_w = tl.load(sums_ptr + S + pairs, mask=mask, other=0.0)
    length_l = tl.load(sums_ptr + S + P + pairs, mask=mask, other=0.0)
    a_w = tl.load(sums_ptr + pairs, mask=mask, other=0.0) / tl.maximum(length_w, 1.0)
    a_l = tl.load(sums_ptr + P + pairs, mask=mask, other=0.0) / tl.maximum(length_l, 1.0)
    present = (length_w > 0.0) & (length_l > 0.0)
    q_w = tl.maximum(-expm1(a_w), Q_EPS)
    q_l = tl.maximum(-expm1(a_l), Q_EPS)
    r = (a_w - a_l) - (tl.log(q_w) - tl.log(q_l))
    # Relative to the larger one: both exponentials are 0 in float32 for long, unlikely answers.
    shift = tl.maximum(a_w, a_l)
    e_w = tl.exp(a_w - shift)
    e_l = tl.exp(a_l - shift)
    m = q_w * e_l + e_w * q_l
    # Quotients before products: q_l * m underflows where both answers are nearly certain.
    grad_w = -(e_l / m)
    grad_l = (q_w / m) * (e_l / q_l)
    return a_w, a_l, length_w, length_l, tl.where(present, r, 0.0), grad_w, grad_l, present


@triton.jit
def denominators(sums_ptr, P, num_nll_tokens, num_pairs, BLOCK: tl.constexpr):
    """Both as given, or where they are 0 as counted, at least 1."""
    S = 2 * P
    tokens = tl.zeros([BLOCK], tl.float32)
    for first_s in range(0, S, BLOCK):
        offs_s = first_s + tl.arange(0, BLOCK)
        tokens += tl.load(sums_ptr + 3 * S + offs_s, mask=offs_s < S, other=0.0)
    pairs = tl.zeros([BLOCK], tl.float32)
    for first_p in range(0, P, BLOCK):
        offs_p = first_p + tl.arange(0, BLOCK)
        length_w = tl.load(sums_ptr + S + offs_p, mask=offs_p < P, other=0.0)
        length_l = tl.load(sums_ptr + S + P + offs_p, mask=offs_p < P, other=0.0)
        pairs += tl.where((length_w > 0.0) & (length_l > 0.0), 1.0, 0.0)
    counted_tokens = tl.maximum(tl.sum(tokens, 0), 1.0)
    counted_pairs = tl.maximum(tl.sum(pairs, 0), 1.0)
    return (
        tl.where(num_nll_tokens == 0.0, counted_tokens, num_nll_tokens),
        tl.where(num_pairs == 0.0, counted_pairs, num_pairs),
    )


@triton.jit
def objective_kernel(
    sums_ptr,
    response_ptr,
    nll_ptr,
    offsets_ptr,
    coef_ptr,
    mean_logp_ptr,
    log_odds_ptr,
    pair_mask_ptr,
    loss_ptr,
    nll_loss_ptr,
    odds_ratio_loss_ptr,
    P,
    beta,
    nll_weight,
    num_nll_tokens,
    num_pairs,
    Q_EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0)
    S = 2 * P
    num_nll_tokens, num_pairs = denominators(sums_ptr, P, num_nll_tokens, num_pairs, BLOCK)
    a_w, a_l, length_w, length_l, r, grad_w, grad_l, present = pair_terms(sums_ptr, p, P, True, Q_EPS)
    tl.store(mean_logp_ptr + p, a_w)
    tl.store(mean_logp_ptr + P + p, a_l)
    tl.store(log_odds_ptr + p, r)
    tl.store(pair_mask_ptr + p, present)

    nll_coef = -nll_weight / num_nll_tokens
    for side in tl.static_range(2):
        grad = grad_w if side == 0 else grad_l
        length = length_w if side == 0 else length_l
        response_coef = tl.where(present, beta / num_pairs * grad / tl.maximum(length, 1.0), 0.0)
        start = tl.load(offsets_ptr + side * P + p)
        end = tl.load(offsets_ptr + side * P + p + 1)
        for first in range(start, end, BLOCK):
            offs_n = first + tl.arange(0, BLOCK)
            mask = offs_n < end
            response = tl.load(response_ptr + offs_n, mask=mask, other=0) != 0
            nll = tl.load(nll_ptr + offs_n, mask=mask, other=0) != 0
            coef = tl.where(nll, nll_coef, 0.0) + tl.where(response, response_coef, 0.0)
            tl.store(coef_ptr + offs_n, coef, mask=mask)

    if p == 0:
        nll_sum = tl.zeros([BLOCK], tl.float32)
        for first_s in range(0, S, BLOCK):
            offs_s = first_s + tl.arange(0, BLOCK)
            nll_sum += tl.load(sums_ptr + 2 * S + offs_s, mask=offs_s < S, other=0.0)
        odds_sum = tl.zeros([BLOCK], tl.float32)
        for first_p in range(0, P, BLOCK):
            offs_p = first_p + tl.arange(0, BLOCK)
            _, _, _, _, r_P, _, _, present_P = pair_terms(sums_ptr, offs_p, P, offs_p < P, Q_EPS)
            odds_sum += tl.where(present_P, softplus(-r_P), 0.0)
        nll_loss = -tl.sum(nll_sum, 0) / num_nll_tokens
        odds_ratio_loss = tl.sum(odds_sum, 0) / num_pairs
        tl.store(loss_ptr, nll_weight * nll_loss + beta * odds_ratio_loss)
        tl.store(nll_loss_ptr, nll_loss)
        tl.store(odds_ratio_loss_ptr, odds_ratio_loss)


def combine(max_KN: Tensor, sum_KN: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """(logp_N, lse_2N) from the partial statistics of K vocabulary splits; lse = lse_2N[0] + lse_2N[1]."""
    splits, n = max_KN.shape
    logp_N, lse_2N = torch.empty_like(target_N), target_N.new_empty((2, n))
    sizes = dict(N=n, splits=splits, BLOCK=256)
    combine_kernel[(triton.cdiv(n, 256),)](max_KN, sum_KN, target_N, logp_N, lse_2N, **sizes, enable_fp_fusion=True)
    return logp_N, lse_2N


def objective(
    logp_N: Tensor,
    rows: Rows,
    *,
    beta: float,
    nll_weight: float,
    num_nll_tokens: float | None = None,
    num_pairs: float | None = None,
    slices: Slices = WHOLE,
) -> Objective:
    """Stage 2 from log-probabilities (N,), float32, on; rows are sorted by sequence. None: what the rows hold, those
    of other ranks with the rest of the sequences among them.
    """
    p, device = rows.pairs, logp_N.device
    offsets = torch.empty(2 * p + 1, dtype=torch.int32, device=device)
    # The bytes of a bool, without a pass over them: a launch takes the host longer than all rows take the device.
    response_N, nll_N = (mask_N.bool().view(torch.int8) for mask_N in (rows.in_response_N, rows.in_nll_N))
    sums_4S = logp_N.new_empty((4, 2 * p))
    answers_kernel[(2 * p,)](
        logp_N,
        response_N,
        nll_N,
        rows.sequence_N,
        offsets,
        sums_4S,
        N=logp_N.shape[0],
        S=2 * p,
        BLOCK=_BLOCK,
        enable_fp_fusion=True,
    )
    slices.sum_(sums_4S)
    coef_N, mean_logp_S, log_odds_P = torch.empty_like(logp_N), logp_N.new_empty(2 * p), logp_N.new_empty(p)
    pair_mask_P = torch.empty(p, dtype=torch.bool, device=device)
    loss, nll_loss, odds_ratio_loss = (logp_N.new_empty(()) for _ in range(3))
    objective_kernel[(p,)](
        sums_4S,
        response_N,
        nll_N,
        offsets,
        coef_N,
        mean_logp_S,
        log_odds_P,
        pair_mask_P.view(torch.int8),
        loss,
        nll_loss,
        odds_ratio_loss,
        P=p,
        beta=beta,
        nll_weight=nll_weight,
        num_nll_tokens=float(num_nll_tokens or 0),
        num_pairs=float(num_pairs or 0),
        Q_EPS=Q_EPS,
        BLOCK=_BLOCK,
        enable_fp_fusion=True,
    )
    return Objective(loss, nll_loss, odds_ratio_loss, mean_logp_S, log_odds_P, pair_mask_P, coef_N)
