"""Stage 1: what the loss needs to know about each row's logits, without storing them.

    z_nv = cap(scale * (x_n . W_v + b_v))                          (Eq. 1)
    m_n, s_n, z_{n,y_n}:  sum_{v != y_n} exp z_nv = s_n exp m_n    (Eq. 2, the target left out)

    x_ND, weight_VD [bias_V], targets_N  ->  max_KN, sum_KN, target_N        fused: K splits of the vocabulary
    z_NW (a strip, by the library)       ->  max_N, sum_N, target_N updated  strip form

Logits are float32 from the matmul's accumulator on; in the fused form they exist only as one tile per program. Stage 2
combines the K partial sums.

Letters: N rows, D hidden size, V vocabulary, K splits, W columns of a strip.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .device_math import apply_head, grouped_block, raw_logits
from .head import Head
from .tuning import TIMED_ROWS


@triton.jit
def fold_logits(z_NV, offs_v, end, targets_N, max_N, sum_N, target_N):
    """Fold one tile into running (max, sum of exponentials, target's logit); columns from `end` on are void."""
    is_target_NV = offs_v[None, :] == targets_N[:, None]
    target_N += tl.sum(tl.where(is_target_NV, z_NV, 0.0), 1)
    z_NV = tl.where(is_target_NV | (offs_v >= end)[None, :], float("-inf"), z_NV)
    new_max_N = tl.maximum(max_N, tl.max(z_NV, 1))
    # While a row has seen no finite logit its maximum is -inf, and -inf - -inf is NaN.
    shift_N = tl.where(new_max_N == float("-inf"), 0.0, new_max_N)
    sum_N = sum_N * tl.exp(max_N - shift_N) + tl.sum(tl.exp(z_NV - shift_N[:, None]), 1)
    return new_max_N, sum_N, target_N


@triton.jit
def logit_stats_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    targets_ptr,
    max_ptr,
    sum_ptr,
    target_ptr,
    N,
    D,
    V,
    split_columns,
    stride_wv,
    stride_wd,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
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
        max_N, sum_N, target_N = fold_logits(z_NV, offs_v, end, targets_N, max_N, sum_N, target_N)

    out = split.to(tl.int64) * N + offs_n
    tl.store(max_ptr + out, max_N, mask=row_mask)
    tl.store(sum_ptr + out, sum_N, mask=row_mask)
    # Exactly one split holds a row's target, so its logit has one writer.
    tl.store(target_ptr + offs_n, target_N, mask=row_mask & (targets_N >= start) & (targets_N < end))


@triton.jit
def strip_stats_kernel(
    z_ptr,
    bias_ptr,
    targets_ptr,
    max_ptr,
    sum_ptr,
    target_ptr,
    N,
    columns,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = offs_n < N
    targets_N = tl.load(targets_ptr + offs_n, mask=row_mask, other=-1).to(tl.int32)
    max_N = tl.load(max_ptr + offs_n, mask=row_mask, other=float("-inf"))
    sum_N = tl.load(sum_ptr + offs_n, mask=row_mask, other=0.0)
    target_N = tl.load(target_ptr + offs_n, mask=row_mask, other=0.0)
    # int64: a tile over the whole vocabulary may hold more than 2^31 logits.
    z_rows = z_ptr + offs_n.to(tl.int64)[:, None] * columns
    for column in range(0, columns, BLOCK_V):
        offs_v = column + tl.arange(0, BLOCK_V)
        z_NV = tl.load(z_rows + offs_v[None, :], mask=row_mask[:, None] & (offs_v < columns)[None, :], other=0.0)
        z_NV = apply_head(z_NV, bias_ptr, offs_v, columns, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
        max_N, sum_N, target_N = fold_logits(z_NV, offs_v, columns, targets_N, max_N, sum_N, target_N)
    tl.store(max_ptr + offs_n, max_N, mask=row_mask)
    tl.store(sum_ptr + offs_n, sum_N, mask=row_mask)
    tl.store(target_ptr + offs_n, target_N, mask=row_mask)


def logit_stats(x_ND: Tensor, targets_N: Tensor, head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """Fused form: float32 (max_KN, sum_KN, target_N). x_ND is contiguous and of the weight's dtype."""
    assert x_ND.is_contiguous() and targets_N.is_contiguous() and x_ND.dtype == head.weight_VD.dtype
    candidates = configs.matmul_candidates(x_ND, head.weight_VD)
    few_ND, few_N = x_ND[:TIMED_ROWS], targets_N[:TIMED_ROWS]
    config = configs.fastest("logit_stats", candidates, x_ND, head, lambda c: _logit_stats(few_ND, few_N, head, c))
    return _logit_stats(x_ND, targets_N, head, config)


def _logit_stats(
    x_ND: Tensor, targets_N: Tensor, head: Head, config: configs.MatmulConfig
) -> tuple[Tensor, Tensor, Tensor]:
    (n, d), v = x_ND.shape, head.weight_VD.shape[0]
    blocks_n = triton.cdiv(n, config.block_n)
    cores = configs.multiprocessors(x_ND.device)
    splits, split_columns = configs.vocabulary_splits(blocks_n, v, config.block_v, cores)
    max_KN = x_ND.new_empty((splits, n), dtype=torch.float32)
    sum_KN = torch.empty_like(max_KN)
    target_N = x_ND.new_empty(n, dtype=torch.float32)
    logit_stats_kernel[(blocks_n * splits,)](
        *config.operands(x_ND, head.weight_VD),
        head.bias_V,
        targets_N,
        max_KN,
        sum_KN,
        target_N,
        N=n,
        D=d,
        V=v,
        split_columns=split_columns,
        stride_wv=head.weight_VD.stride(0),
        stride_wd=head.weight_VD.stride(1),
        scale=head.scale,
        softcap=head.softcap or 0.0,
        HAS_BIAS=head.bias_V is not None,
        HAS_SOFTCAP=head.softcap is not None,
        INPUT_PRECISION=configs.input_precision(),
        EVEN_D=d % config.block_d == 0,
        **config.launch_options(),
    )
    return max_KN, sum_KN, target_N


def start_strip_stats(x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(max_1N, sum_1N, target_N) before the first strip."""
    n = x_ND.shape[0]
    max_1N = x_ND.new_full((1, n), -torch.inf, dtype=torch.float32)
    return max_1N, torch.zeros_like(max_1N), x_ND.new_zeros(n, dtype=torch.float32)


def add_strip_stats(z_NW: Tensor, targets_N: Tensor, head: Head, stats: tuple[Tensor, Tensor, Tensor]) -> None:
    """Strip form: fold raw float32 logits x W^T into `stats`, in place; targets and head are relative to the strip."""
    assert z_NW.is_contiguous() and targets_N.is_contiguous() and z_NW.dtype == torch.float32
    candidates = configs.rows_candidates(z_NW.shape[1])
    few_NW, few_N = z_NW[:TIMED_ROWS], targets_N[:TIMED_ROWS]

    def launch(config: configs.RowsConfig) -> None:
        # `stats` must not see this strip twice.
        _add_strip_stats(few_NW, few_N, head, start_strip_stats(few_NW), config)

    _add_strip_stats(z_NW, targets_N, head, stats, configs.fastest("strip_stats", candidates, z_NW, head, launch))


def _add_strip_stats(
    z_NW: Tensor, targets_N: Tensor, head: Head, stats: tuple[Tensor, Tensor, Tensor], config: configs.RowsConfig
) -> None:
    n, columns = z_NW.shape
    max_1N, sum_1N, target_N = stats
    strip_stats_kernel[(triton.cdiv(n, config.block_n),)](
        z_NW,
        head.bias_V,
        targets_N,
        max_1N,
        sum_1N,
        target_N,
        N=n,
        columns=columns,
        scale=head.scale,
        softcap=head.softcap or 0.0,
        HAS_BIAS=head.bias_V is not None,
        HAS_SOFTCAP=head.softcap is not None,
        **config.launch_options(),
    )
