"""Stages 1 and 3 around the library's matmul: the strip form of triton_backend.py.

Interface and all other parts are the same. The library writes the logits of one strip in float32, and the kernels sweep
over them. Beside a strip of logits its gradient is stored, so that strips are narrower than those of the fused form:
together both stay within `strip_bytes`. No exponentials are kept: every logit is computed twice.

Letters: N rows, D hidden size, W columns of a strip.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import triton_backend
from .head import Head, strip_width, strips
from .logit_grad import strip_grad
from .logit_stats import add_strip_stats, start_strip_stats
from .matmul import raw_logits
from .odds_ratio import combine, objective
from .triton_backend import (
    TILES,
    compute_dtype,
    grad_coefficient,
    head_grad_operand,
    operands,
    strip_head_grad,
)

__all__ = [
    "TILES",
    "compute_dtype",
    "grad_coefficient",
    "head_grad_operand",
    "logit_grad",
    "objective",
    "strip_element_bytes",
    "strip_head_grad",
    "token_stats",
]


def strip_element_bytes(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> int:
    """Bytes that one logit of a strip takes: float32 raw logits, and g beside them where it is narrower."""
    size = compute_dtype(x_dtype, weight_dtype).itemsize
    return size if size == 4 else 4 + size


def token_stats(
    x_ND: Tensor, targets_N: Tensor, head: Head, strip_bytes: int, columns: int = 0, kept: None = None
) -> tuple[Tensor, Tensor]:
    """Stage 1: (logp_N, lse_2N), from one strip of logits after the other; `columns` change nothing here."""
    n, v = x_ND.shape[0], head.weight_VD.shape[0]
    if n == 0:
        return x_ND.new_zeros(0, dtype=torch.float32), x_ND.new_zeros((2, 0), dtype=torch.float32)
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


def library_grad(
    x_ND: Tensor,
    targets_N: Tensor,
    lse_2N: Tensor,
    target_grad_N: Tensor,
    row_scale_N: Tensor | None,
    head: Head,
) -> Tensor:
    """fused_grad's call and result, from logits that the library's matmul wrote."""
    z_NW = raw_logits(x_ND, head.weight_VD)
    return strip_grad(z_NW, targets_N, lse_2N, target_grad_N, row_scale_N, head, x_ND.dtype)


logit_grad = partial(triton_backend.logit_grad, grad=library_grad)
