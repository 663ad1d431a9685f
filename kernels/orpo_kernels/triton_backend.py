"""Stages 1 to 3 with Triton: the interface of torch_backend.py over logit_stats.py, odds_ratio.py and logit_grad.py.

Strips go through the fused form here, through the library's matmul in triton_strip_backend.py; form.py chooses.

Letters: N rows, D hidden size, V vocabulary, W columns of a strip.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .head import Head, strip_width, strips
from .logit_grad import logit_grad as fused_grad
from .logit_grad import strip_grad
from .logit_stats import add_strip_stats, logit_stats, start_strip_stats
from .matmul import WeightedRows, add_matmul, raw_logits
from .odds_ratio import combine, objective

__all__ = ["objective"]

# float16 g holds the target's entry, a row's largest, between 2^14 and 2^15.
_ROW_EXPONENT = 14
# 1 - p_y below this is not scaled up any further: the scale itself has to stay finite in float32.
_SMALLEST = 2.0**-100


def compute_dtype(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the matmuls: the wider of the two operands'."""
    return torch.promote_types(x_dtype, weight_dtype)


def strip_element_bytes(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> int:
    """Bytes that one logit of a recomputed strip takes: only its gradient leaves the chip."""
    return compute_dtype(x_dtype, weight_dtype).itemsize


def tile_element_bytes(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> int:
    """Bytes that one logit of a tile takes: float32 raw logits, and g beside them where it is narrower."""
    size = compute_dtype(x_dtype, weight_dtype).itemsize
    return size if size == 4 else 4 + size


def operands(x_ND: Tensor, head: Head) -> tuple[Tensor, Head]:
    """x and the bias contiguous, and both operands in one dtype."""
    dtype = compute_dtype(x_ND.dtype, head.weight_VD.dtype)
    bias_V = None if head.bias_V is None else head.bias_V.contiguous()
    head = Head(head.weight_VD.to(dtype), bias_V, head.scale, head.softcap)
    return x_ND.to(dtype).contiguous(), head


def _row_scale(logp_N: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The power of two that float16 rows of g carry; None for dtypes with float32's range."""
    if dtype != torch.float16:
        return None
    return torch.exp2(_ROW_EXPONENT - torch.floor(torch.log2((-torch.expm1(logp_N)).clamp(min=_SMALLEST))))


def token_stats(x_ND: Tensor, targets_N: Tensor, head: Head, strip_bytes: int) -> tuple[Tensor, Tensor]:
    """Stage 1: (logp_N, lse_N); logits exist only as tiles on the chip."""
    if x_ND.shape[0] == 0:
        return tuple(x_ND.new_zeros(0, dtype=torch.float32) for _ in range(2))
    x_ND, head = operands(x_ND, head)
    return combine(*logit_stats(x_ND, targets_N, head))


def logit_grad(
    x_ND: Tensor,
    targets_N: Tensor,
    logp_N: Tensor,
    lse_N: Tensor,
    head: Head,
    first: int,
    last: int,
    grad: Callable[..., Tensor] = fused_grad,
) -> tuple[Tensor, Tensor]:
    """Stage 3: (g_NW, weight_WD) for columns [first, last), logits recomputed by `grad`, called as fused_grad."""
    x_ND, head = operands(x_ND, head.strip(first, last))
    if x_ND.shape[0] == 0:
        return x_ND.new_empty((0, last - first)), head.weight_VD
    row_scale_N = _row_scale(logp_N, x_ND.dtype)
    return grad(x_ND, targets_N - first, lse_N, -torch.expm1(logp_N), row_scale_N, head), head.weight_VD


def tile_memory(rows: int, x_ND: Tensor, head: Head, with_grad: bool) -> None:
    """None: a GPU's allocator hands the memory of one tile out to the next by itself."""


def tile_stats(x_ND: Tensor, targets_N: Tensor, head: Head, memory_NV: None) -> tuple[Tensor, Tensor]:
    """Stage 1 on a tile over the whole vocabulary: (logp_N, lse_N), bit for bit those of `tile_stats_and_grad`."""
    _, logp_N, lse_N = _tile(*operands(x_ND, head), targets_N)
    return logp_N, lse_N


def tile_stats_and_grad(x_ND: Tensor, targets_N: Tensor, head: Head, memory_NV: None) -> tuple[Tensor, Tensor, Tensor]:
    """Stages 1 and 3 on a tile over the whole vocabulary: (logp_N, lse_N, g_NV)."""
    x_ND, head = operands(x_ND, head)
    z_NV, logp_N, lse_N = _tile(x_ND, head, targets_N)
    if x_ND.shape[0] == 0:
        return logp_N, lse_N, z_NV.to(x_ND.dtype)
    row_scale_N = _row_scale(logp_N, x_ND.dtype)
    return logp_N, lse_N, strip_grad(z_NV, targets_N, lse_N, -torch.expm1(logp_N), row_scale_N, head, x_ND.dtype)


def _tile(x_ND: Tensor, head: Head, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(raw logits z_NV, logp_N, lse_N)."""
    z_NV, stats = raw_logits(x_ND, head.weight_VD), start_strip_stats(x_ND)
    if x_ND.shape[0] == 0:
        return z_NV, stats[2], stats[2].clone()
    add_strip_stats(z_NV, targets_N, head, stats)
    return z_NV, *combine(*stats)


def frozen_head_stats(x_ND: Tensor, targets_N: Tensor, head: Head, strip_bytes: int) -> tuple[Tensor, Tensor]:
    """Stage 1 for a frozen head: (logp_N, lse_N), bit for bit those of `frozen_head_stats_and_grad`."""
    logp_N, lse_N, _ = _frozen_head(x_ND, targets_N, head, strip_bytes, with_grad=False)
    return logp_N, lse_N


def frozen_head_stats_and_grad(
    x_ND: Tensor, targets_N: Tensor, head: Head, strip_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Stages 1 and 3 in one pass for a frozen head: (logp_N, lse_N, u_ND), u = sum_v g_v W_v before its coefficient.

    The sum over v != y of exp(z - running maximum) * cap' * W_v follows the maximum as it rises, so no logit is
    computed twice; the target's own term is added at the end from its exact 1 - p_y.
    """
    return _frozen_head(x_ND, targets_N, head, strip_bytes, with_grad=True)


def _frozen_head(
    x_ND: Tensor, targets_N: Tensor, head: Head, strip_bytes: int, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    (n, d), v = x_ND.shape, head.weight_VD.shape[0]
    stats = max_1N, _, target_N = start_strip_stats(x_ND)
    u_ND = x_ND.new_zeros((n, d), dtype=torch.float32)
    if n == 0:
        return target_N, target_N.clone(), u_ND
    dtype = compute_dtype(x_ND.dtype, head.weight_VD.dtype)
    zeros_N = torch.zeros_like(target_N)
    # exp(z - maximum) <= 1: float16 keeps entries down to 4e-12 of the largest with this.
    row_scale_N = torch.full_like(target_N, 2.0**_ROW_EXPONENT) if dtype == torch.float16 else None
    for first, last in strips(v, strip_width(n, v, tile_element_bytes(x_ND.dtype, head.weight_VD.dtype), strip_bytes)):
        x, strip_head = operands(x_ND, head.strip(first, last))
        z_NW = raw_logits(x, strip_head.weight_VD)
        old_max_N = max_1N[0].clone()
        add_strip_stats(z_NW, targets_N - first, strip_head, stats)
        if with_grad:
            shift_N = _finite(max_1N[0])
            e_NW = strip_grad(z_NW, targets_N - first, shift_N, zeros_N, row_scale_N, strip_head, dtype)
            u_ND.mul_(torch.exp(old_max_N - shift_N)[:, None])
            add_matmul(u_ND, e_NW, strip_head.weight_VD)
            del e_NW
        # Or this strip would still be alive while the next one is computed.
        del z_NW
    logp_N, lse_N = combine(*stats)
    if not with_grad:
        return logp_N, lse_N, None
    u_ND.mul_((torch.exp(_finite(max_1N[0]) - lse_N) / (1.0 if row_scale_N is None else row_scale_N))[:, None])
    slope_N = 1.0 if head.softcap is None else 1 - (target_N / head.softcap) ** 2
    u_ND.addcmul_(head.weight_VD[targets_N].float(), (-torch.expm1(logp_N) * slope_N)[:, None])
    return logp_N, lse_N, u_ND


def _finite(max_N: Tensor) -> Tensor:
    """The maximum as something to subtract: 0 where a row has seen no finite logit."""
    return max_N.masked_fill(max_N == -torch.inf, 0)


def grad_coefficient(coef_N: Tensor, logp_N: Tensor, dtype: torch.dtype) -> Tensor:
    """coef_N as it applies to g as stored in `dtype`: float16 rows of g carry a power of two."""
    row_scale_N = _row_scale(logp_N, dtype)
    return coef_N if row_scale_N is None else coef_N / row_scale_N


def head_grad_operand(x_ND: Tensor, coef_N: Tensor, head: Head) -> WeightedRows:
    """What `strip_head_grad` needs for every strip of one backward pass."""
    return WeightedRows(x_ND, coef_N, compute_dtype(x_ND.dtype, head.weight_VD.dtype))


def strip_head_grad(g_NW: Tensor, operand: WeightedRows, dw_WD: Tensor | None, db_W: Tensor | None) -> None:
    """dW = g^T (coef * x), db = g^T coef for one strip, written once."""
    if dw_WD is not None:
        dw_WD.copy_(operand.weight_grad(g_NW, dw_WD.dtype))
    if db_W is not None:
        db_W.copy_(operand.bias_grad(g_NW, db_W.dtype))
