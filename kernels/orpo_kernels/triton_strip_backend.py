"""Stages 1 and 3 around the library's matmul: the strip form of triton_backend.py.

Interface and all other parts are the same. The library writes the logits of one strip in float32, and the kernels sweep
over them. Beside a strip of logits its gradient is stored, so that strips are narrower than those of the fused form:
together both stay within `strip_bytes`.

Letters: N rows, D hidden size, W columns of a strip.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .head import Head, strip_width, strips
from .logit_grad import strip_grad
from .logit_stats import add_strip_stats, start_strip_stats
from .matmul import raw_logits
from .odds_ratio import combine, objective
from .triton_backend import (
    compute_dtype,
    frozen_head_stats,
    frozen_head_stats_and_grad,
    grad_coefficient,
    head_grad_operand,
    operands,
    row_scale,
    strip_head_grad,
    tile_element_bytes,
    tile_stats,
    tile_stats_and_grad,
)

__all__ = [
    "compute_dtype",
    "frozen_head_stats",
    "frozen_head_stats_and_grad",
    "grad_coefficient",
    "head_grad_operand",
    "logit_grad",
    "objective",
    "strip_element_bytes",
    "strip_head_grad",
    "tile_element_bytes",
    "tile_stats",
    "tile_stats_and_grad",
    "token_stats",
]

# Raw logits and their gradient are alive together, as in a tile.
strip_element_bytes = tile_element_bytes


def token_stats(x_ND: Tensor, targets_N: Tensor, head: Head, strip_bytes: int) -> tuple[Tensor, Tensor]:
    """Stage 1: (logp_N, lse_N), from one strip of logits after the other."""
    n, v = x_ND.shape[0], head.weight_VD.shape[0]
    if n == 0:
        return tuple(x_ND.new_zeros(0, dtype=torch.float32) for _ in range(2))
    stats = start_strip_stats(x_ND)
    # As wide as those of stage 3, though no gradient is stored here: the library computes the same logits again only
    # for the same shape.
    width = strip_width(n, v, strip_element_bytes(x_ND.dtype, head.weight_VD.dtype), strip_bytes)
    for first, last in strips(v, width):
        x, strip_head = operands(x_ND, head.strip(first, last))
        z_NW = raw_logits(x, strip_head.weight_VD)
        add_strip_stats(z_NW, targets_N - first, strip_head, stats)
        # Or this strip would still be alive while the next one is computed.
        del z_NW
    return combine(*stats)


def logit_grad(
    x_ND: Tensor, targets_N: Tensor, logp_N: Tensor, lse_N: Tensor, head: Head, first: int, last: int
) -> tuple[Tensor, Tensor]:
    """Stage 3: (g_NW, weight_WD) for columns [first, last), logits recomputed."""
    x_ND, head = operands(x_ND, head.strip(first, last))
    if x_ND.shape[0] == 0:
        return x_ND.new_empty((0, last - first)), head.weight_VD
    z_NW = raw_logits(x_ND, head.weight_VD)
    row_scale_N = row_scale(logp_N, x_ND.dtype)
    target_grad_N = -torch.expm1(logp_N)
    return strip_grad(z_NW, targets_N - first, lse_N, target_grad_N, row_scale_N, head, x_ND.dtype), head.weight_VD
