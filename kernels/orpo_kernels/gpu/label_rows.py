"""The rows of a padded batch on its device: what `rows.rows_from_labels` says in torch, in two launches and one wait.

    count_kernel   labels_ST [nll_labels]             ->  found_S4             one program a sequence
    fill_kernel    labels_ST [nll_labels], found_S4   ->  the arrays of Rows   one program a sequence

In between the host waits for found_S4: how many rows there are decides the size of everything that follows. With it
come the smallest and the largest target, so that a token outside the vocabulary is refused before anything reads it.

Letters: P pairs, S = 2P sequences, T positions, N rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.rows import Rows

_BLOCK = 1024
_WARPS = 4


@triton.jit
def read_labels(
    labels_ptr,
    nll_ptr,
    first,
    P,
    T,
    stride_ls,
    stride_lt,
    stride_ns,
    stride_nt,
    ignore_index,
    SHIFT: tl.constexpr,
    HAS_NLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one sequence's positions from `first` on: (position, token, in response, in NLL, its other token, has one).

    Where the NLL scores another token than the response does, the position has a second row for it.
    """
    s = tl.program_id(0)
    offs_t = first + tl.arange(0, BLOCK)
    read_t = offs_t + SHIFT
    inside = read_t < T
    # int64: S * T may exceed 2^31.
    labels_row = labels_ptr + s.to(tl.int64) * stride_ls
    token = tl.load(labels_row + read_t.to(tl.int64) * stride_lt, mask=inside, other=0).to(tl.int64)
    response = inside & (token != ignore_index)
    chosen = read_t < tl.where(s < P, T, 0)
    if HAS_NLL:
        # Of the chosen half alone; there may be no other.
        nll_row = nll_ptr + s.to(tl.int64) * stride_ns
        nll_token = tl.load(nll_row + read_t.to(tl.int64) * stride_nt, mask=chosen, other=0).to(tl.int64)
        nll = chosen & (nll_token != ignore_index)
        other = nll & response & (nll_token != token)
        # The second row scores what this one does not.
        token = tl.where(response, token, nll_token)
        nll = nll & (nll_token == token)
    else:
        nll_token = token
        nll = response & chosen
        other = nll & (offs_t < 0)
    return offs_t, token, response, nll, nll_token, other


@triton.jit
def count_kernel(
    labels_ptr,
    nll_ptr,
    found_ptr,
    P,
    T,
    stride_ls,
    stride_lt,
    stride_ns,
    stride_nt,
    ignore_index,
    SHIFT: tl.constexpr,
    HAS_NLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.zeros([BLOCK], tl.int32)
    others = tl.zeros([BLOCK], tl.int32)
    low = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    high = tl.full([BLOCK], -1, tl.int32)
    for first in range(0, T, BLOCK):
        _, token, response, nll, nll_token, other = read_labels(
            labels_ptr,
            nll_ptr,
            first,
            P,
            T,
            stride_ls,
            stride_lt,
            stride_ns,
            stride_nt,
            ignore_index,
            SHIFT,
            HAS_NLL,
            BLOCK,
        )
        counts = response | nll
        rows += counts.to(tl.int32)
        others += other.to(tl.int32)
        # What is outside int32 is outside every vocabulary, and stays so.
        token = tl.minimum(tl.maximum(token, -1), 0x7FFFFFFF).to(tl.int32)
        nll_token = tl.minimum(tl.maximum(nll_token, -1), 0x7FFFFFFF).to(tl.int32)
        low = tl.minimum(low, tl.where(counts, token, low))
        high = tl.maximum(high, tl.where(counts, token, high))
        low = tl.minimum(low, tl.where(other, nll_token, low))
        high = tl.maximum(high, tl.where(other, nll_token, high))
    found = found_ptr + tl.program_id(0) * 4
    tl.store(found, tl.sum(rows, 0))
    tl.store(found + 1, tl.sum(others, 0))
    tl.store(found + 2, tl.min(low, 0))
    tl.store(found + 3, tl.max(high, 0))


@triton.jit
def fill_kernel(
    labels_ptr,
    nll_ptr,
    found_ptr,
    rows_ptr,
    targets_ptr,
    sequence_ptr,
    response_ptr,
    nll_mask_ptr,
    P,
    T,
    stride_ls,
    stride_lt,
    stride_ns,
    stride_nt,
    ignore_index,
    SHIFT: tl.constexpr,
    HAS_NLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0)
    # Rows of the sequences before this one.
    before = tl.zeros([BLOCK], tl.int32)
    for first_s in range(0, s, BLOCK):
        offs_s = first_s + tl.arange(0, BLOCK)
        before += tl.load(found_ptr + offs_s * 4, mask=offs_s < s, other=0)
        before += tl.load(found_ptr + offs_s * 4 + 1, mask=offs_s < s, other=0)
    place = tl.sum(before, 0)
    # A sequence's second rows come after all of its first ones.
    other_place = place + tl.load(found_ptr + s * 4)
    for first in range(0, T, BLOCK):
        offs_t, token, response, nll, nll_token, other = read_labels(
            labels_ptr,
            nll_ptr,
            first,
            P,
            T,
            stride_ls,
            stride_lt,
            stride_ns,
            stride_nt,
            ignore_index,
            SHIFT,
            HAS_NLL,
            BLOCK,
        )
        counts = response | nll
        position = s.to(tl.int64) * T + offs_t
        sequence = tl.zeros([BLOCK], tl.int64) + s
        offs_n = place + tl.cumsum(counts.to(tl.int32), 0) - 1
        tl.store(rows_ptr + offs_n, position, mask=counts)
        tl.store(targets_ptr + offs_n, token, mask=counts)
        tl.store(sequence_ptr + offs_n, sequence, mask=counts)
        tl.store(response_ptr + offs_n, response.to(tl.int8), mask=counts)
        tl.store(nll_mask_ptr + offs_n, nll.to(tl.int8), mask=counts)
        place += tl.sum(counts.to(tl.int32), 0)
        if HAS_NLL:
            offs_n = other_place + tl.cumsum(other.to(tl.int32), 0) - 1
            tl.store(rows_ptr + offs_n, position, mask=other)
            tl.store(targets_ptr + offs_n, nll_token, mask=other)
            tl.store(sequence_ptr + offs_n, sequence, mask=other)
            tl.store(response_ptr + offs_n, tl.zeros([BLOCK], tl.int8), mask=other)
            tl.store(nll_mask_ptr + offs_n, other.to(tl.int8), mask=other)
            other_place += tl.sum(other.to(tl.int32), 0)


def rows_from_labels(labels: Tensor, nll_labels: Tensor | None, ignore_index: int, shift: bool) -> Rows:
    """As `orpo_kernels.rows.rows_from_labels`; the host waits once, for how many rows there are."""
    with torch.cuda.device_of(labels):
        found_S4 = count(labels, nll_labels, ignore_index, shift)
        # The one wait of a step.
        found = [sequence for sequence in found_S4.cpu().tolist() if sequence[0]]
        n = sum(first + second for first, second, _, _ in found)
        rows = fill(labels, nll_labels, ignore_index, shift, found_S4, n)
    bounds = min((low for _, _, low, _ in found), default=0), max((high for *_, high in found), default=0)
    return replace(rows, bounds=bounds)


def count(labels: Tensor, nll_labels: Tensor | None, ignore_index: int, shift: bool) -> Tensor:
    """int32 (S, 4) of each sequence: its rows, positions with a second row, the smallest and the largest target, the
    last two as `Rows.bounds` has them.
    """
    found_S4 = labels.new_empty((labels.shape[0], 4), dtype=torch.int32)
    arguments = _arguments(labels, nll_labels, ignore_index, shift)
    count_kernel[(labels.shape[0],)](labels, nll_labels, found_S4, **arguments)
    return found_S4


def fill(labels: Tensor, nll_labels: Tensor | None, ignore_index: int, shift: bool, found_S4: Tensor, n: int) -> Rows:
    """The n rows that `count` has found."""
    integers = [labels.new_empty(n, dtype=torch.int64) for _ in range(3)]
    masks = [labels.new_empty(n, dtype=torch.bool) for _ in range(2)]
    if n:
        arguments = _arguments(labels, nll_labels, ignore_index, shift)
        bytes_ = (mask_N.view(torch.int8) for mask_N in masks)
        fill_kernel[(labels.shape[0],)](labels, nll_labels, found_S4, *integers, *bytes_, **arguments)
    return Rows(*integers, *masks, labels.shape[0] // 2)


def _arguments(labels: Tensor, nll_labels: Tensor | None, ignore_index: int, shift: bool) -> dict[str, int | bool]:
    return dict(
        P=labels.shape[0] // 2,
        T=labels.shape[1],
        stride_ls=labels.stride(0),
        stride_lt=labels.stride(1),
        stride_ns=0 if nll_labels is None else nll_labels.stride(0),
        stride_nt=0 if nll_labels is None else nll_labels.stride(1),
        ignore_index=ignore_index,
        SHIFT=int(shift),
        HAS_NLL=nll_labels is not None,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
        enable_fp_fusion=True,
    )
