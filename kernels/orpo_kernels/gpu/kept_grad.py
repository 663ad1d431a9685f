"""Stage 3 from the exponentials that stage 1 kept (kept.py): the gradient by logit without its logit's matmul.

    e_nv = exp(z_nv - m_nt) cap'(z_nv)                           stored by logit_stats.py, 0 at the target
    g_nv = [v = y_n] (1 - p_y) cap'(z_nv) - e_nv exp(m_nt - lse_n)    (Eq. 8, from what is stored)

m_nt is the row's running maximum when the tile t of TILE columns was computed: e <= 1 whatever the logits are, long
before lse_n is known. e is stored in the dtype of g (float16 times 2^14), and is as exact: rounding is relative in
both. The softcap's slope is stored with it, since the logit that log e gives back is too coarse for 1 - (z / c)^2 where
z is near c.

    exps_NC, max_TN, targets_N, lse_2N, target_grad_N  ->  g_NW, or g_NC in the place of exps_NC

Where g takes the exponentials' place their maxima become infinite, so that a second backward finds it made. It is the
same g: the upstream gradient is not in it.

Letters: N rows, V vocabulary, C kept columns (the first ones), T tiles of them, W columns of a strip.
"""

import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.head import strip_memory
from orpo_kernels.kept import TILE, Kept


@triton.jit
def store_exps(
    e_NV,
    max_N,
    exps_ptr,
    maxima_ptr,
    first_n,
    offs_n,
    first_v,
    offs_v,
    end,
    row_mask,
    N,
    stride,
    scale,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Store one tile of stage 1, whose exponentials are relative to max_N."""
    # int64: N * C may exceed 2^31. One pointer a tile and 32 bits an element: pointers would not fit the registers.
    tile_ptr = exps_ptr + first_n.to(tl.int64) * stride + first_v
    offs = tl.arange(0, BLOCK_N)[:, None] * stride + tl.arange(0, BLOCK_V)[None, :]
    mask = row_mask[:, None] & (offs_v < end)[None, :]
    tl.store(tile_ptr + offs, (e_NV * scale).to(exps_ptr.dtype.element_ty), mask=mask)
    for i in tl.static_range(BLOCK_V // TILE):
        tile = first_v // TILE + i
        # Past the end there is no such tile.
        rows = tl.where(tile * TILE < end, N, 0)
        tl.store(maxima_ptr + tile.to(tl.int64) * N + offs_n, max_N, mask=offs_n < rows)


@triton.jit
def kept_grad_kernel(
    exps_ptr,
    maxima_ptr,
    targets_ptr,
    lse_ptr,
    target_grad_ptr,
    row_scale_ptr,
    g_ptr,
    N,
    first,
    last,
    stride,
    stride_g,
    scale,
    HAS_ROW_SCALE: tl.constexpr,
    OVERWRITE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE: tl.constexpr,
):
    tiles = tl.cdiv(last, TILE) - first // TILE
    offs_n = tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = first // TILE + tl.program_id(0) % tiles
    offs_v = tile * TILE + tl.arange(0, TILE)
    row_mask = offs_n < N
    # A strip may begin and end inside a tile.
    mask = row_mask[:, None] & ((offs_v >= first) & (offs_v < last))[None, :]
    # int64: N * C may exceed 2^31.
    rows = offs_n.to(tl.int64)[:, None]
    stored_NV = tl.load(exps_ptr + rows * stride + offs_v[None, :], mask=mask, other=0.0).to(tl.float32)
    e_NV = stored_NV / scale
    max_N = tl.load(maxima_ptr + tile.to(tl.int64) * N + offs_n, mask=row_mask, other=0.0)
    row_max_N = tl.load(lse_ptr + offs_n, mask=row_mask, other=0.0)
    log_sum_N = tl.load(lse_ptr + N + offs_n, mask=row_mask, other=0.0)
    target_grad_N = tl.load(target_grad_ptr + offs_n, mask=row_mask, other=0.0)
    targets_N = tl.load(targets_ptr + offs_n, mask=row_mask, other=-1).to(tl.int32)
    # Never above 0, but where a tile had no finite logit: there e is 0, and 0 times infinity would be NaN.
    g_NV = -e_NV * tl.exp(tl.minimum(max_N - row_max_N - log_sum_N, 0.0))[:, None]
    g_NV = tl.where(offs_v[None, :] == targets_N[:, None], target_grad_N[:, None], g_NV)
    if HAS_ROW_SCALE:
        g_NV *= tl.load(row_scale_ptr + offs_n, mask=row_mask, other=0.0)[:, None]
    g_NV = tl.where((max_N == float("inf"))[:, None], stored_NV, g_NV)
    if OVERWRITE:
        # Zeros up to the next row: a library may read them, though it leaves them out.
        mask = row_mask[:, None] & (offs_v < stride)[None, :]
        # A warp that comes late would read what an early one has stored.
        tl.debug_barrier()
        infinite_N = tl.full([BLOCK_N], float("inf"), tl.float32)
        tl.store(maxima_ptr + tile.to(tl.int64) * N + offs_n, infinite_N, mask=row_mask)
    g_ptrs = g_ptr + rows * stride_g + (offs_v - first)[None, :]
    tl.store(g_ptrs, g_NV.to(g_ptr.dtype.element_ty), mask=mask)


def kept_grad(
    kept: Kept,
    targets_N: Tensor,
    lse_2N: Tensor,
    target_grad_N: Tensor,
    row_scale_N: Tensor | None,
    first: int,
    last: int,
) -> Tensor:
    """g_NW of the kept columns [first, last) in the dtype of the exponentials; target_grad_N is (1 - p_y) cap'(z_y).

    Where they may be overwritten it is a view of them, and [first, last) all of their columns.
    """
    assert targets_N.is_contiguous() and lse_2N.is_contiguous() and last <= kept.columns
    n = targets_N.shape[0]
    if kept.overwrite:
        assert (first, last) == (0, kept.columns)
        # With the columns up to the next row, which become zeros.
        g_NW = kept.exps[: n * kept.stride].view(n, kept.stride)
    else:
        g_NW = strip_memory(kept.exps, n, last - first)
    block_n = 32
    tiles = triton.cdiv(last, TILE) - first // TILE
    kept_grad_kernel[(triton.cdiv(n, block_n) * tiles,)](
        kept.exps,
        kept.maxima,
        targets_N,
        lse_2N,
        target_grad_N,
        row_scale_N,
        g_NW,
        N=n,
        first=first,
        last=last,
        stride=kept.stride,
        stride_g=g_NW.stride(0),
        scale=kept.scale,
        HAS_ROW_SCALE=row_scale_N is not None,
        OVERWRITE=kept.overwrite,
        BLOCK_N=block_n,
        TILE=TILE,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return g_NW[:, : last - first]
