"""The cost table of kernels/README.md, asserted: FLOPs from the matmuls the profiler saw, memory by allocation."""

import pytest
import torch
from allocations import ROUND, measure, skip_where_copied
from orpo_kernels import matmul
from orpo_kernels.cpu import logits as cpu_logits
from orpo_kernels.cpu import stages as cpu_stages
from orpo_kernels.cpu.bins import make_bins
from orpo_kernels.head import Head, Needs
from orpo_kernels.plan import make_plan
from problems import make_problem, relative_error
from torch.profiler import ProfilerActivity, profile

from orpo import orpo_loss, token_logprobs

P, T, D, V = 4, 40, 32, 1009
# Only what a loss in bfloat16 does depends on whether the CPU multiplies it.
_EACH = [
    pytest.param(torch.float32, False, id="float32"),
    pytest.param(torch.bfloat16, True, id="bfloat16 multiplied"),
    pytest.param(torch.bfloat16, False, id="bfloat16 widened"),
]
DTYPES, DTYPES_AND_FLOAT16 = (
    pytest.mark.parametrize(("dtype", "bfloat16_cpu"), each, indirect=["bfloat16_cpu"])
    for each in (_EACH, [*_EACH, pytest.param(torch.float16, False, id="float16")])
)


def loss_of(problem, **keywords):
    return orpo_loss(problem.hidden, problem.weight, problem.labels, **problem.keywords, **keywords).loss


CASES = {
    # name: (hidden needs grad, weight needs grad, budget, units forward and backward)
    "trained head by strips": (True, True, 0, 8),
    "trained head in bins": (True, True, 2**20, 6),
    "one bin": (True, True, 2**30, 6),
    "oversized pairs": (True, True, 2**17, 8),
    "frozen head": (True, False, 0, 4),
    "frozen head in bins": (True, False, 2**20, 4),
    "frozen hidden states by strips": (False, True, 0, 6),
    "frozen hidden states in bins": (False, True, 2**20, 4),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_flops(case):
    hidden, weight, budget, units = case
    problem = make_problem(P, T, D, V).requiring_grad(hidden, weight)
    nvd = problem.rows.rows_N.numel() * V * D
    flops, *_ = measure(lambda: loss_of(problem, logits_budget=budget, strip_bytes=2**17).backward())
    # The mean hidden state for the metrics is a product of 2 rows: 2/V of a unit.
    assert flops / nvd == pytest.approx(units, rel=0.01)


@pytest.mark.parametrize("budget", [0, 2**17, 2**20], ids=["strips", "oversized pairs", "bins"])
def test_evaluation_is_one_product(budget):
    problem = make_problem(P, T, D, V).requiring_grad()

    def evaluate():
        with torch.no_grad():
            loss_of(problem, logits_budget=budget)

    nvd = problem.rows.rows_N.numel() * V * D
    assert measure(evaluate)[0] / nvd == pytest.approx(2, rel=0.01)


def test_rows_that_cannot_matter_cost_nothing():
    problem = make_problem(P, T, D, V, prompt_in_nll=False).requiring_grad()
    n = problem.rows.rows_N.numel()
    assert n == (problem.labels[:, 1:] != -100).sum()
    flops, *_ = measure(lambda: loss_of(problem, logits_budget=0).backward())
    assert flops == pytest.approx(8 * n * V * D, rel=0.01)


@DTYPES
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_no_allocation_is_larger_than_a_strip(frozen, dtype, bfloat16_cpu):
    # Many rows: N * V is 10 strips; what is larger than a strip may only be the gradients that were asked for. In
    # bfloat16 elementwise work goes through float32 copies of 4 MiB, and where the CPU has AMX the library's matmul
    # keeps up to 3 MB of its own, whatever the strip.
    vocabulary, strip = 40013, 2**22
    skip_where_copied(cpu_logits.compute_dtype(dtype, dtype))
    problem = make_problem(8, 128, 16, vocabulary, dtype=dtype, bias=True).requiring_grad(True, not frozen, not frozen)
    n = problem.rows.rows_N.numel()
    assert n * vocabulary * dtype.itemsize > 10 * strip and vocabulary * 16 * 4 < strip
    _, largest, _ = measure(lambda: loss_of(problem, logits_budget=0, strip_bytes=strip).backward())
    assert largest <= strip + ROUND


def test_memory_by_strips():
    problem = make_problem(8, 128, 16, 2003).requiring_grad()
    strip, n = 2**19, problem.rows.rows_N.numel()
    loss = loss_of(problem, logits_budget=0, strip_bytes=strip)
    _, _, peak = measure(loss.backward)
    results = problem.hidden.numel() * 4 + problem.weight.numel() * 4
    per_row = n * 16 * (4 + 4) + 16 * 8 * n
    # Elementwise work holds one cache block more, in copies of a few rows.
    assert peak <= strip + results + per_row + 2**17


def test_gradient_of_a_wide_head_exists_once():
    # Few rows: the head's gradient is the largest thing alive, and neither zeros nor a scaled copy may stand beside it.
    problem = make_problem(1, 16, 64, 40_009).requiring_grad()
    n = problem.rows.rows_N.numel()
    _, _, peak = measure(lambda: loss_of(problem, logits_budget=2**30).backward())
    assert peak <= problem.weight.numel() * 4 + n * 40_009 * 4 + 2**17


def test_two_bins_of_bfloat16_need_no_float32_copy_of_the_head(monkeypatch):
    # Where it is widened instead, the sum of two products is not rounded in between.
    monkeypatch.setattr(cpu_logits, "multiplies_bfloat16", lambda: True)
    skip_where_copied(torch.bfloat16)
    monkeypatch.setattr(matmul, "_PART_BYTES", 2**20)
    vocabulary, hidden = 20_011, 64
    problem = make_problem(2, 9, hidden, vocabulary, dtype=torch.bfloat16).requiring_grad()
    capacity = 2 * problem.rows.rows_N.numel() // 3
    budget = capacity * vocabulary * 2
    assert len(make_bins(problem.rows, capacity)) == 2 and budget < vocabulary * hidden * 2
    _, largest, _ = measure(lambda: loss_of(problem, logits_budget=budget).backward())
    # In float32 the head's gradient would take twice the weight's bytes.
    assert largest <= vocabulary * hidden * 2 + ROUND


def test_the_float32_sum_of_many_bfloat16_products_exists_once(monkeypatch):
    monkeypatch.setattr(cpu_logits, "multiplies_bfloat16", lambda: True)
    skip_where_copied(torch.bfloat16)
    monkeypatch.setattr(matmul, "_PART_BYTES", 2**20)
    vocabulary, hidden = 20_011, 64
    problem = make_problem(4, 4, hidden, vocabulary, dtype=torch.bfloat16).requiring_grad()
    capacity = problem.rows.rows_N.numel() // 3
    tile, head = capacity * vocabulary * 2, vocabulary * hidden
    assert len(make_bins(problem.rows, capacity)) > 2
    *_, peak = measure(lambda: loss_of(problem, logits_budget=tile).backward())
    # The sum, and beside it the first product or the rounded result; a whole product of its own would be 4 bytes more.
    assert peak <= tile + 6 * head + 2**20 + 2**19 < tile + 8 * head


def test_few_rows_of_a_wide_bfloat16_head_take_little_beside_their_logits(monkeypatch):
    monkeypatch.setattr(cpu_logits, "multiplies_bfloat16", lambda: True)
    skip_where_copied(torch.bfloat16)
    x, weight = torch.randn(512, 4096).bfloat16(), torch.randn(4096, 4096).bfloat16()
    arguments = x, torch.zeros(512, dtype=torch.long), Head(weight)
    *_, peak = measure(lambda: cpu_stages.token_stats(*arguments, 2**25))
    # Logits and a block of them in float32, and what a library's matmul may keep for itself (up to 3 MB with AMX).
    # Blocks of that size for the targets' logits are three at once: rows, their targets' weights and the products.
    logits, block = 512 * 4096 * 2, cpu_logits._BLOCK_BYTES
    assert peak < logits + block + 4e6 < logits + 3 * block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("stats", [cpu_stages.token_stats, cpu_stages.frozen_head_stats_and_grad])
def test_one_strip_is_alive_at_a_time(stats, softcap, dtype, monkeypatch):
    """With what elementwise passes hold: a block in float32 of a bfloat16 strip, and a block of the softcap's slope."""
    monkeypatch.setattr(cpu_logits, "multiplies_bfloat16", lambda: True)
    skip_where_copied(cpu_logits.compute_dtype(dtype, dtype))
    n, vocabulary, width = 800, 10_000, 2560
    x, weight = torch.randn(n, 64).to(dtype), torch.randn(vocabulary, 64).to(dtype)
    strip, block = n * width * dtype.itemsize, cpu_logits._BLOCK_BYTES
    *_, peak = measure(lambda: stats(x, torch.zeros(n, dtype=torch.long), Head(weight, softcap=softcap), strip))
    narrow, frozen = dtype == torch.bfloat16, stats is cpu_stages.frozen_head_stats_and_grad
    held = strip + narrow * block + frozen * (softcap is not None) * block
    # x, u and a product to add to u; what a library's matmul may keep for itself (up to 3 MB with AMX).
    assert peak < held + 3 * n * 64 * 4 + narrow * 2e6 + 2**18
    assert narrow * 2e6 + 3 * n * 64 * 4 + 2**18 < block


@pytest.mark.parametrize("keeps", ["tile", "strip"])
def test_one_block_of_a_slope_is_alive_at_a_time(keeps):
    n, vocabulary = 800, 4096
    x, head = torch.randn(n, 64), Head(torch.randn(vocabulary, 64), softcap=5.0)
    targets, block = torch.zeros(n, dtype=torch.long), cpu_logits._BLOCK_BYTES
    assert n * vocabulary * 4 > 2 * block
    if keeps == "tile":
        memory = cpu_stages.tile_memory([n], x, head, True)
        *_, peak = measure(lambda: cpu_stages.tile_stats_and_grad(x, targets, head, memory))
    else:
        stats = cpu_stages.token_stats(x, targets, head, 2**30)
        *_, peak = measure(lambda: cpu_stages.logit_grad(x, targets, *stats, head, 0, vocabulary, None))
        peak -= n * vocabulary * 4
    assert block <= peak < block + 2**18


def _plan(device="cpu", budget=None, strip=None, frozen=False):
    x, weight = torch.empty(4, 8, device=device), torch.empty(1000, 8, device=device)
    return make_plan(x, weight, 4, Needs(True, not frozen, False, frozen), budget, strip, "torch")


_STRIPS = (("cpu", None), ("meta", None), ("cpu", 123))


def test_default_strip_by_device():
    assert [_plan(device, strip=strip).strip_bytes for device, strip in _STRIPS] == [2**25, 2**27, 123]
    # Of 2P * T * V * 4 bytes of logits, 39 MiB, never more than the default strip.
    problem = make_problem(8, 128, 8, 5003).requiring_grad()
    _, largest, _ = measure(lambda: loss_of(problem, logits_budget=0).backward())
    assert 2**24 < largest <= 2**25 < problem.rows.rows_N.numel() * 5003 * 4


def test_default_budget_by_device_and_head():
    assert _plan().tile_rows == 2**29 // 4000
    assert _plan(frozen=True).tile_rows == 0
    assert _plan("meta").tile_rows == 0
    assert _plan(budget=2**20, frozen=True).tile_rows == 2**20 // 4000
    problem = make_problem(8, 128, 8, 20_011).requiring_grad(weight=False)
    _, frozen, _ = measure(lambda: loss_of(problem).backward())
    _, trained, _ = measure(lambda: loss_of(problem.requiring_grad()).backward())
    assert frozen <= 2**25 < trained


@pytest.mark.parametrize("trained", [True, False])
def test_a_pair_beyond_the_budget_takes_no_more_than_it(trained):
    problem = make_problem(2, 128, 16, 2003).requiring_grad()
    budget, strip = 2**19, 2**18
    with torch.set_grad_enabled(trained):
        _, largest, _ = measure(lambda: loss_of(problem, logits_budget=budget, strip_bytes=strip))
    assert problem.rows.rows_N.numel() / 2 * 2003 * 4 > 3 * budget
    assert largest <= strip + ROUND


def test_what_a_pair_beyond_the_budget_leaves_waits_in_float32_for_a_gradient_scaler():
    """Gradients of 1e-8 are none in float16, before the scaler's factor is on them."""
    found = []
    for budget in (2**30, 2**14):
        problem = make_problem(2, 40, 16, 203, dtype=torch.float16, bias=True).requiring_grad()
        assert (problem.rows.rows_N.numel() / 2 * 203 * 4 > budget) == (budget == 2**14)
        keywords = problem.keywords | {"beta": 1e-5, "nll_weight": 1e-5}
        loss = orpo_loss(problem.hidden, problem.weight, problem.labels, logits_budget=budget, **keywords).loss
        (2.0**16 * loss).backward()
        found.append([problem.hidden.grad, problem.weight.grad, problem.bias.grad])
    for fits, exceeds in zip(*found, strict=True):
        assert relative_error(exceeds, fits.double()) < 1e-3


@pytest.mark.parametrize("pairs", [4, 16])
def test_tiles_stay_within_the_budget_whatever_the_batch(pairs):
    problem = make_problem(pairs, T, 16, 2003).requiring_grad()
    budget = 2**20
    _, largest, _ = measure(lambda: loss_of(problem, logits_budget=budget).backward())
    assert problem.rows.rows_N.numel() * 2003 * 4 > 2 * budget
    assert largest <= budget + ROUND


@DTYPES
def test_a_large_budget_is_not_filled_where_the_sum_of_products_needs_no_wider_copy(dtype, bfloat16_cpu):
    skip_where_copied(cpu_logits.compute_dtype(dtype, dtype))
    problem = make_problem(P=24, T=121, D=16, V=4001, dtype=dtype).requiring_grad()
    n, element = problem.rows.rows_N.numel(), cpu_logits.compute_dtype(dtype, dtype).itemsize
    assert n > 4 * cpu_logits.CHUNK_ROWS
    _, largest, _ = measure(lambda: loss_of(problem, logits_budget=2**30).backward())
    tile = n if dtype == torch.bfloat16 else cpu_logits.CHUNK_ROWS
    assert 0.8 * tile * 4001 * element < largest <= tile * 4001 * element


@pytest.mark.parametrize("trained", [True, False])
def test_one_memory_serves_all_tiles(trained):
    """Fresh memory for each would cost its first touch again."""
    problem = make_problem(16, T, 16, 2003).requiring_grad()
    budget = 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, torch.set_grad_enabled(trained):
        loss_of(problem, logits_budget=budget)
    events = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert len([size for size in events if size > budget // 4]) == 1


@pytest.mark.parametrize("pairs, positions", [(10, 121), (1, 1152)], ids=["many pairs", "one pair"])
@DTYPES_AND_FLOAT16
def test_evaluation_holds_one_chunk_of_a_tile_and_has_trainings_bits(
    dtype, pairs, positions, bfloat16_cpu, monkeypatch
):
    """2,300 rows are three chunks of 1,024, the last one smaller; in float32 those of many pairs are three bins."""
    # Wide enough for a chunk to be larger than what a library's matmul may keep for itself.
    wide = 8009
    # What is read of a bfloat16 chunk is a float32 block, and would be larger than the chunk.
    monkeypatch.setattr(cpu_logits, "_BLOCK_BYTES", 2**20)
    problem = make_problem(P=pairs, T=positions, D=16, V=wide, dtype=dtype, softcap=30.0).requiring_grad()
    n = problem.rows.rows_N.numel()
    assert 2 * cpu_logits.CHUNK_ROWS < n < 3 * cpu_logits.CHUNK_ROWS and n % 3
    budget = 2**30
    trained = loss_of(problem, logits_budget=budget)
    with torch.no_grad():
        evaluated = loss_of(problem, logits_budget=budget)
    assert torch.equal(evaluated, trained)
    trained.backward()
    truth, dh, dw, _ = problem.truth()
    tolerance = {torch.float32: (1e-6, 1e-6), torch.bfloat16: (1e-4, 8e-3), torch.float16: (1e-6, 1e-3)}[dtype]
    assert relative_error(evaluated, truth.loss) < tolerance[0]
    assert relative_error(problem.hidden.grad, dh) < tolerance[1]
    assert relative_error(problem.weight.grad, dw) < tolerance[1]
    skip_where_copied(cpu_logits.compute_dtype(dtype, dtype))
    with torch.no_grad():
        _, largest, _ = measure(lambda: loss_of(problem, logits_budget=budget))
    element = cpu_logits.compute_dtype(dtype, dtype).itemsize
    chunk = cpu_logits.chunk_rows(cpu_logits.compute_dtype(dtype, dtype)) * wide * element
    assert 2**20 < largest <= chunk < n * wide * element


@DTYPES
def test_log_probabilities_near_zero_have_trainings_bits(dtype, bfloat16_cpu):
    """There softplus is no identity, and rounds the last rows of a block otherwise than the others."""
    g = torch.Generator().manual_seed(0)
    n, d, v = 1530, 64, 20_011
    weight, targets = torch.randn(v, d, generator=g).to(dtype), torch.randint(0, v, (n,), generator=g)
    x = weight[targets].float() * torch.rand(n, 1, generator=g) * 24 / d + 0.1 * torch.randn(n, d, generator=g)
    arguments = x.to(dtype), targets, Head(weight)
    evaluated, trained = (cpu_stages.tile_memory([n], *arguments[::2], with_grad) for with_grad in (False, True))
    logp = cpu_stages.tile_stats(*arguments, evaluated)
    assert ((logp > -0.3) & (logp < 0)).sum() > 100
    assert torch.equal(logp, cpu_stages.tile_stats_and_grad(*arguments, trained)[0])


def test_backward_of_log_probabilities_makes_no_zeros_for_what_it_saved():
    """The product with the upstream gradient, which is the result, and nothing else of that size."""
    x = torch.randn(2000, 64, requires_grad=True)
    logp = token_logprobs(x, torch.randn(31, 64), torch.zeros(2000, dtype=torch.int64))
    _, largest, peak = measure(logp.sum().backward)
    assert largest == x.nbytes and peak < 1.5 * x.nbytes


def test_token_logprobs_costs_what_the_table_says():
    problem = make_problem(P, T, D, V)
    rows = problem.rows
    nvd = rows.rows_N.numel() * V * D
    for hidden, weight, units in ((True, True, 8), (True, False, 4), (False, True, 6)):
        x = problem.hidden.reshape(-1, D)[rows.rows_N].detach().requires_grad_(hidden)
        w = problem.weight.detach().requires_grad_(weight)
        flops, *_ = measure(lambda x=x, w=w: token_logprobs(x, w, rows.targets_N, strip_bytes=2**17).sum().backward())
        assert flops / nvd == pytest.approx(units, rel=0.01)
