"""Stage 1: what the loss needs to know about each row's logits, without storing them.

    z_nv = cap(scale * (x_n . W_v + b_v))                          (Eq. 1)
    m_n, s_n, z_{n,y_n}:  sum_{v != y_n} exp z_nv = s_n exp m_n    (Eq. 2, the target left out)

    x_ND, weight_VD [bias_V], targets_N  ->  max_KN, sum_KN, target_N        of K splits of the vocabulary
                                             and exps_NC of the first C columns, where they are kept (kept_grad.py)

Logits are float32 from the matmul's accumulator on, and exist only as one tile per program. Stage 2 combines the K
partial sums.

Letters: N rows, D hidden size, V vocabulary, K splits, C kept columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.gpu import tiles
from orpo_kernels.gpu.device_math import apply_head, grouped_block, raw_logits
from orpo_kernels.gpu.kept_grad import store_exps
from orpo_kernels.gpu.tuning import TIMED_ROWS
from orpo_kernels.head import Head
from orpo_kernels.kept import TILE, Kept, buffers


@triton.jit
def fold_logits(
    z_NV, offs_v, end, targets_N, max_N, sum_N, target_N, softcap, HAS_SOFTCAP: tl.constexpr, KEEPS: tl.constexpr
):
    """Fold one tile into running (max, sum of exponentials, target's logit); columns from `end` on are void.

    Also returns what the exponentials are relative to, and what is kept of them (kept_grad.py).
    """
    is_target_NV = offs_v[None, :] == targets_N[:, None]
    target_N += tl.sum(tl.where(is_target_NV, z_NV, 0.0), 1)
    z_NV = tl.where(is_target_NV | (offs_v >= end)[None, :], float("-inf"), z_NV)
    new_max_N = tl.maximum(max_N, tl.max(z_NV, 1))
    # While a row has seen no finite logit its maximum is -inf, and -inf - -inf is NaN.
    shift_N = tl.where(new_max_N == float("-inf"), 0.0, new_max_N)
    sum_N = sum_N * tl.exp(max_N - shift_N)
    e_NV = tl.exp(z_NV - shift_N[:, None])
    sum_N += tl.sum(e_NV, 1)
    if KEEPS and HAS_SOFTCAP:
        # From z and not from `tanh_and_slope`, which would take as many registers as z until the maximum is known.
        t_NV = z_NV * (1.0 / softcap)
        # z of what is left out is -inf.
        e_NV *= tl.maximum(1.0 - t_NV * t_NV, 0.0)
    return new_max_N, sum_N, target_N, shift_N, e_NV


@triton.jit
def logit_stats_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    max_ptr,
    sum_ptr,
    target_ptr,
    exps_ptr,
    maxima_ptr,
    N,
    D,
    V,
    split_columns,
    stride_wv,
    stride_wd,
    scale,
    softcap,
    stride_exps,
    exps_scale,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    KEEPS: tl.constexpr,
    KEPT_TILE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    block_n, split = grouped_block(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, split_columns), GROUP_N)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = offs_n < N
    targets_N = tl.load(targets_ptr + offs_n, mask=row_mask, other=-1).to(tl.int32)
    max_N = tl.full([BLOCK_N], float("-inf"), tl.float32)
    sum_N = tl.zeros([BLOCK_N], tl.float32)
    target_N = tl.zeros([BLOCK_N], tl.float32)
    start = split * split_columns
    end = tl.minimum(start + split_columns, V)
    for first in range(start, end, BLOCK_V):
        offs_v = first + tl.arange(0, BLOCK_V)
        z_NV = raw_logits(
            x_ptr,
            weight_ptr,
            block_n * BLOCK_N,
            first,
            N,
            D,
            V,
            stride_wv,
            stride_wd,
            INPUT_PRECISION,
            EVEN_D,
            BLOCK_N,
            BLOCK_V,
            BLOCK_D,
            DESCRIPTORS,
        )
        z_NV = apply_head(z_NV, bias_ptr, offs_v, V, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        max_N, sum_N, target_N, shift_N, e_NV = fold_logits(
            z_NV, offs_v, end, targets_N, max_N, sum_N, target_N, softcap, HAS_SOFTCAP, KEEPS
        )
        if KEEPS:
            store_exps(
                e_NV,
                shift_N,
                exps_ptr,
                maxima_ptr,
                block_n * BLOCK_N,
                offs_n,
                first,
                offs_v,
                end,
                row_mask,
                N,
                stride_exps,
                exps_scale,
                KEPT_TILE,
                BLOCK_N,
                BLOCK_V,
            )

    out = split.to(tl.int64) * N + offs_n
    tl.store(max_ptr + out, max_N, mask=row_mask)
    tl.store(sum_ptr + out, sum_N, mask=row_mask)
    # Exactly one split holds a row's target, so its logit has one writer.
    tl.store(target_ptr + offs_n, target_N, mask=row_mask & (targets_N >= start) & (targets_N < end))


def logit_stats(
    x_ND: Tensor, targets_N: Tensor, head: Head, columns: int = 0, kept: Kept | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """float32 (max_KN, sum_KN, target_N). x_ND is contiguous and of the weight's dtype.

    The first `columns` columns are a launch of their own, which fills `kept` where it is given. Without it they still
    are: partial sums, and with them the last bits of the loss, depend on where a launch ends.
    """
    assert x_ND.is_contiguous() and targets_N.is_contiguous() and x_ND.dtype == head.weight_VD.dtype
    candidates = tiles.matmul_candidates(x_ND, head.weight_VD, columns > 0, head.softcap is not None)
    few_ND, few_N = x_ND[:TIMED_ROWS], targets_N[:TIMED_ROWS]
    scratch = kept

    def launch(config: tiles.MatmulConfig) -> None:
        nonlocal scratch
        if scratch is None and columns:
            # With stores, as a call with a gradient: an evaluation that comes first would choose its tile otherwise.
            scratch = Kept(columns, *buffers(x_ND, few_ND.shape[0] * -(-columns // TILE), x_ND.dtype))
        # What it leaves in `kept` is written again below.
        _logit_stats(few_ND, few_N, head, config, columns, scratch)

    config = tiles.fastest("logit_stats, kept" if columns else "logit_stats", candidates, x_ND, head, launch)
    return _logit_stats(x_ND, targets_N, head, config, columns, kept)


def _logit_stats(
    x_ND: Tensor,
    targets_N: Tensor,
    head: Head,
    config: tiles.MatmulConfig,
    columns: int = 0,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    n, v = x_ND.shape[0], head.weight_VD.shape[0]
    blocks_n, cores = triton.cdiv(n, config.block_n), tiles.multiprocessors(x_ND.device)
    ranges = [(first, last) for first, last in ((0, columns), (columns, v)) if last > first]
    grids = [tiles.vocabulary_splits(blocks_n, last - first, config.block_v, cores) for first, last in ranges]
    max_KN = x_ND.new_empty((sum(splits for splits, _ in grids), n), dtype=torch.float32)
    sum_KN = torch.empty_like(max_KN)
    # Exactly one split of one launch holds a row's target.
    target_N = x_ND.new_empty(n, dtype=torch.float32)
    k = 0
    for (first, last), (splits, split_columns) in zip(ranges, grids, strict=True):
        partial = max_KN[k : k + splits], sum_KN[k : k + splits], target_N
        # A target outside [first, last) equals no column of this launch, which then leaves its logit alone.
        targets = targets_N - first if first else targets_N
        _launch(x_ND, targets, head.strip(first, last), config, splits, split_columns, partial, None if first else kept)
        k += splits
    return max_KN, sum_KN, target_N


def _launch(
    x_ND: Tensor,
    targets_N: Tensor,
    head: Head,
    config: tiles.MatmulConfig,
    splits: int,
    split_columns: int,
    partial: tuple[Tensor, Tensor, Tensor],
    kept: Kept | None,
) -> None:
    n, d = x_ND.shape
    assert kept is None or config.block_v % TILE == 0
    logit_stats_kernel[(triton.cdiv(n, config.block_n) * splits,)](
        *config.operands(x_ND, head.weight_VD),
        head.bias_V,
        targets_N,
        *partial,
        None if kept is None else kept.exps,
        None if kept is None else kept.maxima,
        N=n,
        D=d,
        V=head.weight_VD.shape[0],
        split_columns=split_columns,
        stride_wv=head.weight_VD.stride(0),
        stride_wd=head.weight_VD.stride(1),
        scale=head.scale,
        softcap=head.softcap or 0.0,
        stride_exps=0 if kept is None else kept.stride,
        exps_scale=0.0 if kept is None else kept.scale,
        HAS_BIAS=head.bias_V is not None,
        HAS_SOFTCAP=head.softcap is not None,
        KEEPS=kept is not None,
        KEPT_TILE=TILE,
        INPUT_PRECISION=tiles.input_precision(),
        EVEN_D=d % config.block_d == 0,
        **config.launch_options(),
    )
