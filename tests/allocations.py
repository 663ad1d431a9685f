"""What a call allocates, as torch's profiler saw it, and whether what a CPU multiplies can be measured at all."""

import functools
import os
import platform

import pytest
import torch
from orpo_kernels.cpu.logits import multiplies_bfloat16  # as it is: tests replace the module's
from torch.profiler import ProfilerActivity, profile

ROUND = 4096  # allocations are rounded up, and O(N) arrays are allowed


def matmul_flops(events) -> int:
    """2 M N K of every matrix product; the profiler's own figure leaves addmm_ out."""
    products = {"aten::mm": (0, 1), "aten::addmm": (1, 2), "aten::addmm_": (1, 2)}
    seen = 0
    for event in events:
        if event.name in products and event.input_shapes:
            a, b = (event.input_shapes[i] for i in products[event.name])
            seen += 2 * a[0] * a[1] * b[1]
    return seen


def measure(function):
    """(FLOPs, largest single allocation, peak of bytes alive) of a call, inside custom operators too."""
    threads = torch.get_num_threads()
    # A library's matmul keeps buffers for each thread: what it holds would grow with the machine's cores.
    torch.set_num_threads(1)
    try:
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as profiler:
            function()
    finally:
        torch.set_num_threads(threads)
    alive = peak = largest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak, largest = max(peak, alive), max(largest, event.nbytes())
    assert largest > 0, "the profiler recorded no memory event"
    return matmul_flops(profiler.events()), largest, peak


@functools.cache
def copies_bfloat16() -> bool:
    """Whether products of bfloat16 hold a copy of an operand or of the result here, as oneDNN's do without BF16.

    Not asked on an x86 CPU that has the instructions and may use them: there the loss multiplies bfloat16, and what
    tests claim has to hold.
    """
    lowered = any(os.environ.get(f"{name}_MAX_CPU_ISA") for name in ("ONEDNN", "DNNL"))
    if multiplies_bfloat16() and platform.machine().lower() in ("x86_64", "amd64") and not lowered:
        return False
    return max(_held(rows, hidden) for rows, hidden in ((256, 8), (8, 256))) >= 256 * _VOCABULARY * 2


_VOCABULARY = 8192


def _held(n: int, d: int) -> int:
    """Most bytes alive beside operands and result in the three products of a loss."""
    x, weight, g = (torch.randn(shape).bfloat16() for shape in ((n, d), (_VOCABULARY, d), (n, _VOCABULARY)))
    products = (lambda: torch.addmm(x[:, :1], x, weight.T), lambda: torch.mm(g.T, x), lambda: torch.mm(g, weight))
    return max(measure(product)[2] - product().nbytes for product in products)


def skip_where_copied(dtype: torch.dtype) -> None:
    """Skip what a call holds that multiplies in `dtype`, where the library's own copies would be measured with it."""
    if dtype == torch.bfloat16 and copies_bfloat16():
        pytest.skip("this CPU's library copies the bfloat16 matrices that it multiplies")
