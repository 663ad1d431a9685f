"""What a step with the Triton kernels costs: FLOPs, bytes, launches, atomics; counted by what the interpreter does.

`FlopCounterMode` is told 8 and 6 N V D (test_fused.py); here are the products that kernels and library really make.
"""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
import triton.runtime.interpreter as interpreter
from allocations import measure
from orpo_kernels.gpu import tiles
from problems import make_problem

from orpo import orpo_loss

pytestmark = pytest.mark.kernels(modes=("interpret",))

TILE = tiles.MatmulConfig(128, 128, 64, num_warps=8, num_stages=3)
P, T, V, D = 2, 65, 512, 128
N, ITEM, STRIP = 2 * P * (T - 1), 2, 256


@pytest.fixture
def counts(monkeypatch):
    """kernel -> launches, FLOPs of `tl.dot`, bytes that are not masked off, elements updated atomically."""
    found, running = defaultdict(Counter), []

    def counted(name, amounts):
        original = getattr(interpreter.InterpreterBuilder, name)

        def operation(builder, *args, **kwargs):
            found[running[-1]].update(amounts(*args))
            return original(builder, *args, **kwargs)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, operation)

    def lanes(pointers, mask):
        return int(np.broadcast_to(mask.data, pointers.data.shape).sum()) if mask is not None else pointers.data.size

    def moved(pointers, mask):
        return lanes(pointers, mask) * (pointers.get_element_ty().primitive_bitwidth // 8)

    counted("create_dot", lambda a, b, *_: {"flops": 2 * a.data.size * b.data.shape[-1]})
    counted("create_masked_load", lambda pointers, mask, *_: {"bytes": moved(pointers, mask)})
    counted("create_masked_store", lambda pointers, _, mask, *__: {"bytes": moved(pointers, mask)})
    counted("create_atomic_rmw", lambda _, pointers, __, mask, *___: {"atomics": lanes(pointers, mask)})
    counted("create_atomic_cas", lambda pointers, *_: {"atomics": lanes(pointers, None)})
    original_call = interpreter.GridExecutor.__call__

    def call(executor, *args, **kwargs):
        running.append(executor.fn.__name__)
        found[running[-1]]["launches"] += 1
        original_call(executor, *args, **kwargs)
        running.pop()

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", call)
    return found


def test_the_counters_count_what_a_kernel_does(counts):
    from kernelcheck.samples import column_sum_kernel, matmul_kernel

    a, b, c = torch.randn(64, 96), torch.randn(96, 32), torch.empty(64, 32)
    matmul_kernel[(2, 1)](a, b, c, 64, 32, 96, 96, 32, 32, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32)
    # Two programs load all of b each.
    moved = 4 * (64 * 96 + 2 * 96 * 32 + 64 * 32)
    assert counts["matmul_kernel"] == {"launches": 1, "flops": 2 * 64 * 32 * 96, "bytes": moved}
    column_sum_kernel[(5,)](torch.randn(5, 40), torch.zeros(40), 40, ATOMIC=True, BLOCK_N=64)
    assert counts["column_sum_kernel"]["atomics"] == 5 * 40


# budget: units of N V D; launches and bytes of each kernel that sees logits
LOGITS, TILES = N * V, N // TILE.block_n * (V // TILE.block_v)
READ = TILES * (TILE.block_n + TILE.block_v) * D * ITEM  # each tile of logits reads its rows of x and of W once
KEPT = LOGITS * ITEM + LOGITS // 16  # a maximum is 4 bytes to 64 exponentials
COSTS = {
    "by strips": (0, 8, {"logit_stats_kernel": (1, READ), "logit_grad_kernel": (V // STRIP, READ + LOGITS * ITEM)}),
    "all kept": (
        2**40,
        6,
        {"logit_stats_kernel": (1, READ + KEPT), "kept_grad_kernel": (1, KEPT + LOGITS * ITEM)},
    ),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_step_costs_what_the_formulas_say(name, counts, monkeypatch):
    budget, units, kernels = COSTS[name]
    monkeypatch.setattr(tiles, "matmul_candidates", lambda *_, **__: (TILE,))
    problem = make_problem(P, T, V=V, D=D, dtype=torch.bfloat16).requiring_grad()
    # Every position counts.
    labels = problem.hidden.new_zeros(2 * P, T, dtype=torch.long).random_(V)

    def step():
        options = dict(logits_budget=budget, strip_bytes=N * STRIP * ITEM, backend="triton")
        orpo_loss(problem.hidden, problem.weight, labels, **options).loss.backward()

    library, *_ = measure(step)
    flops = library + sum(count["flops"] for count in counts.values())
    # The mean hidden state for the metrics is a product of 2 rows: 2 / V of a unit.
    assert flops == pytest.approx(units * N * V * D, rel=0.01)
    for kernel, (launches, moved) in kernels.items():
        assert counts[kernel]["launches"] == launches, kernel
        assert counts[kernel]["bytes"] == pytest.approx(moved, rel=0.1), kernel
    # The others see hidden states at most, read and written in float32.
    assert all(count["bytes"] < 8 * N * D for kernel, count in counts.items() if kernel not in kernels)
    # Only lists of rows are made by them, in whose order nothing is summed.
    assert {kernel: count["atomics"] for kernel, count in counts.items() if count["atomics"]} == {"link_kernel": N}
