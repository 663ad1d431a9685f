"""The plain matmuls, which are left to the library, and the dtypes they run and accumulate in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from orpo_kernels.head import strips

# A head is converted in parts of this size: a copy of all of it would be the largest tensor alive.
_PART_BYTES = 16 * 2**20
# A product is widened in pieces of so many rows: with some others (1,532, not 1,536) oneDNN takes a quarter longer.
_PIECE_ROWS = 512
# Smallest coefficient that float16 rows are scaled up for.
_SMALLEST = 2.0**-100


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 stays float64; everything else is accumulated in float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def tf32_allowed() -> bool:
    """Whether torch may compute float32 matmuls of CUDA in TF32."""
    matmul = torch.backends.cuda.matmul
    # fp32_precision came with torch 2.9; where it was set, as transformers' `tf32=True` does, allow_tf32 raises.
    precision = getattr(matmul, "fp32_precision", None)
    return matmul.allow_tf32 if precision is None else precision == "tf32"


def parts(t_VD: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """(first, last + 1) row of each part of t for which numbers of `dtype` stand beside it."""
    return strips(t_VD.shape[0], max(1, _PART_BYTES // max(1, t_VD.shape[1] * dtype.itemsize)))


def converted_parts(t_VD: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """`parts` where t is of another dtype; one part, which needs no copy, where it is of this one."""
    return strips(t_VD.shape[0], max(1, t_VD.shape[0])) if t_VD.dtype == dtype else parts(t_VD, dtype)


def mean_rows(t_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean over the rows, in `dtype`."""
    if not t_VD.is_cpu:
        return t_VD.mean(0, dtype=dtype)
    # A CPU's sum in another dtype copies its whole input into it.
    total_D = t_VD.new_zeros(t_VD.shape[1], dtype=dtype)
    for first, last in converted_parts(t_VD, dtype):
        total_D += t_VD[first:last].sum(0, dtype=dtype)
    return total_D / t_VD.shape[0]


def saved_dtype(t: Tensor) -> torch.dtype:
    """The dtype in which gradients wait for backward: not float16, which loses what a GradScaler is about to scale."""
    return torch.float32 if t.dtype == torch.float16 else t.dtype


def operator_body(operator: Callable) -> Callable:
    """An operator's body on the device of its first tensor, autocast off.

    Triton launches on the current device, whatever device its tensors are on. The operator has chosen its dtypes, and
    autocast would narrow its fp32 products.
    """

    @functools.wraps(operator)
    def body(first: Tensor, *args, **keywords):
        with torch.cuda.device_of(first), torch.autocast(first.device.type, enabled=False):
            return operator(first, *args, **keywords)

    return body


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with its result in `dtype`, not rounded in between where the library can write its accumulator out."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    if a.dtype == torch.float16:
        # A float16 product may exceed 65504 before it is widened.
        return torch.mm(a.to(dtype), b.to(dtype))
    return torch.mm(a, b).to(dtype)


def add_matmul(accumulator: Tensor, a: Tensor, b: Tensor) -> None:
    """accumulator += a @ b; low-precision products are added to the accumulator, never to one another.

    b of another dtype than a's is converted part by part.
    """
    if a.dtype != b.dtype:
        for first, last in converted_parts(b, a.dtype):
            add_matmul(accumulator, a[:, first:last], b[first:last].to(a.dtype))
    elif accumulator.dtype == a.dtype:
        accumulator.addmm_(a, b)
    elif a.is_cuda and accumulator.dtype == torch.float32:
        # The product's own kernel adds: a separate addition would pass over the accumulator three times.
        torch.addmm(accumulator, a, b, out_dtype=torch.float32, out=accumulator)
    else:
        for first, last in strips(a.shape[0], _PIECE_ROWS):
            accumulator[first:last].add_(matmul(a[first:last], b, accumulator.dtype))


def set_matmul(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, as `add_matmul` adds it."""
    if a.is_cuda and a.dtype == b.dtype and out.dtype in (a.dtype, torch.float32):
        # What the product writes needs no zeros before it.
        if out.dtype == a.dtype:
            torch.mm(a, b, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        add_matmul(out.zero_(), a, b)


def widened_matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, computed in a's dtype without a whole copy of b in it."""
    if a.dtype == b.dtype == torch.bfloat16 != dtype and a.is_cpu:
        product = a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)
        for first, last in strips(a.shape[0], _PIECE_ROWS):
            product[first:last] = torch.mm(a[first:last], b)
        return product
    if a.dtype == b.dtype:
        return matmul(a, b, dtype)
    product = a.new_zeros((a.shape[0], b.shape[1]), dtype=dtype)
    add_matmul(product, a, b)
    return product


class WeightedRows:
    """Rows ready for the head's gradients: g^T (coef * x) and g^T coef.

    The coefficient goes onto x, so that g stays in [-1, 1]. In float16, coefficients are divided by the next power of
    two above the largest of them, or the small ones of a long batch would be lost, and large x would be infinite; the
    products are multiplied by it again.
    """

    def __init__(
        self,
        x_ND: Tensor,
        coef_N: Tensor,
        dtype: torch.dtype,
        weighted: Callable[[Tensor, Tensor, torch.dtype], Tensor] | None = None,
    ) -> None:
        """`weighted`: coef * x in a dtype, without a copy of x in coef's where a backend can."""
        self.norm = None
        if dtype == torch.float16 and coef_N.numel():
            self.norm = torch.exp2(torch.floor(torch.log2(coef_N.abs().amax().clamp(min=_SMALLEST))) + 1)
            coef_N = coef_N / self.norm
        self.x_ND = weighted(x_ND, coef_N, dtype) if weighted else (x_ND * coef_N[:, None]).to(dtype)
        self.coef_N = coef_N

    def weight_grad(self, g_NV: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """g^T (coef * x) in `dtype`, written to `out` where it is given."""
        if out is not None and self.norm is None and g_NV.dtype == dtype:
            return torch.mm(g_NV.T, self.x_ND, out=out)
        product_VD = matmul(g_NV.T, self.x_ND, dtype if self.norm is None else torch.float32)
        if self.norm is not None:
            product_VD = product_VD.mul_(self.norm).to(dtype)
        return product_VD if out is None else out.copy_(product_VD)

    def bias_grad(self, g_NV: Tensor, dtype: torch.dtype) -> Tensor:
        """g^T coef in `dtype`."""
        coef_N1 = self.coef_N[:, None].to(self.x_ND.dtype)
        product_V = matmul(g_NV.T, coef_N1, torch.promote_types(g_NV.dtype, torch.float32))[:, 0]
        return (product_V if self.norm is None else product_V * self.norm).to(dtype)
