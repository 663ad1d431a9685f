"""In which dtype a CPU computes logits: float32 for what it would only emulate, and no copy of the head for that."""

import pytest
import torch
from allocations import ROUND, measure, skip_where_copied
from orpo_kernels import matmul, reference
from orpo_kernels.cpu import logits as cpu_logits
from orpo_kernels.cpu import stages as cpu_stages
from orpo_kernels.cpu.bins import HeadGradient
from orpo_kernels.head import Head, Needs
from problems import make_problem, relative_error

from orpo import FusedLinearORPOLoss, orpo_loss

STRIP = 8192
BUDGETS = pytest.mark.parametrize("budget", [0, 30_000, 160_000, 2**30], ids=["strips", "oversized", "bins", "one bin"])


def loss_of(problem, budget, strip_bytes=STRIP):
    return orpo_loss(
        problem.hidden,
        problem.weight,
        problem.labels,
        logits_budget=budget,
        strip_bytes=strip_bytes,
        backend="torch",
        **problem.keywords,
    ).loss


@pytest.mark.parametrize(
    ("machine", "capabilities", "expected"),
    [
        ("x86_64", {"avx2": True}, False),
        ("x86_64", {"avx512_f": True, "avx512_vnni": True, "avx512_bf16": False}, False),
        ("x86_64", {"avx512_bf16": True}, True),
        ("x86_64", {"amx_bf16": True}, True),
        ("aarch64", {"neon": True, "bf16": False}, False),
        ("aarch64", {"neon": True, "bf16": True}, True),
    ],
)
def test_only_instructions_for_bfloat16_count(machine, capabilities, expected, monkeypatch):
    monkeypatch.setattr(cpu_logits.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    cpu_logits.multiplies_bfloat16.cache_clear()
    try:
        assert cpu_logits.multiplies_bfloat16() is expected
    finally:
        cpu_logits.multiplies_bfloat16.cache_clear()


@pytest.mark.parametrize(("supported", "expected"), [(True, True), (False, False)])
def test_a_torch_that_cannot_list_them_is_asked_for_two(supported, expected, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert cpu_logits._capabilities() == {"avx512_bf16": expected, "amx_bf16": False}


@pytest.mark.parametrize(
    ("capabilities", "dtype", "rows"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16, 256),
        ({"bf16": True}, torch.bfloat16, 256),
        ({"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16, 1024),
        ({"avx512_bf16": True}, torch.float32, 1024),
        ({"avx512_bf16": True}, torch.float64, 1024),
    ],
)
def test_rows_of_one_matmul(capabilities, dtype, rows, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    cpu_logits.chunk_rows.cache_clear()
    try:
        assert cpu_logits.chunk_rows(dtype) == rows
    finally:
        cpu_logits.chunk_rows.cache_clear()


@pytest.mark.parametrize(
    "tiles, evaluated, trained", [([382], 191, 382), ([300, 250], 250, 300), ([100, 7], 100, 100), ([], 0, 0)]
)
def test_memory_for_tiles_is_that_of_their_even_chunks(tiles, evaluated, trained, monkeypatch):
    monkeypatch.setattr(cpu_stages, "chunk_rows", lambda dtype: 256)
    x, head = torch.randn(max([1, *tiles]), 8), Head(torch.randn(1000, 8))
    for with_grad, rows in ((False, evaluated), (True, trained)):
        assert cpu_stages.tile_memory(tiles, x, head, with_grad).shape == (rows, 1000)
    # No tile needs more, and one that did would not go unseen.
    for n in tiles:
        targets, memory = torch.zeros(n, dtype=torch.long), x.new_empty(evaluated, 1000)
        found = cpu_stages.tile_stats(x[:n], targets, head, memory)
        torch.testing.assert_close(found, cpu_stages.token_stats(x[:n], targets, head, 2**30)[0])
        if n == max(tiles):
            with pytest.raises(AssertionError):
                cpu_stages.tile_stats(x[:n], targets, head, memory[: cpu_stages._chunk_size(n, x.dtype) - 1])


@pytest.mark.parametrize("n", [0, 1, 512, 1300])
def test_a_widened_product_has_no_narrow_copy_of_its_size(n):
    a, b = torch.randn(n, 64).bfloat16(), torch.randn(64, 4096).bfloat16()
    product = matmul.widened_matmul(a, b, torch.float32)
    assert product.dtype == torch.float32 and product.shape == (n, 4096)
    assert n == 0 or relative_error(product, a.double() @ b.double()) < 2**-8
    total = torch.ones_like(product)
    matmul.add_matmul(total, a, b)
    assert torch.equal(total, product + 1)
    if n > 512:
        skip_where_copied(torch.bfloat16)
        _, largest, peak = measure(lambda: matmul.widened_matmul(a, b, torch.float32))
        # A piece, and what a library's matmul may keep for itself (up to 3 MB with AMX); whole it would be 10 MB.
        piece, whole = 512 * 4096 * 2, n * 4096 * 2
        assert largest == product.nbytes and peak < product.nbytes + piece + 4e6 < product.nbytes + whole


def test_the_dtype_of_the_matmuls(bfloat16_cpu):
    narrow, wide = torch.bfloat16, torch.float32
    assert cpu_logits.compute_dtype(narrow, narrow) == (narrow if bfloat16_cpu else wide)
    assert cpu_logits.compute_dtype(torch.float16, torch.float16) == wide
    assert cpu_logits.compute_dtype(narrow, wide) == wide
    assert cpu_logits.compute_dtype(torch.float64, narrow) == torch.float64
    x, weight = torch.randn(5, 8).to(narrow), torch.randn(5000, 8).to(narrow)
    strip = cpu_logits.LogitStrip(x, None, Head(weight), 7, 4990)
    assert strip.z_NK.dtype == cpu_logits.compute_dtype(narrow, narrow)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_a_strip_holds_logits_less_the_targets(scale, softcap, dtype, bfloat16_cpu):
    x, weight, bias = torch.randn(5, 8).to(dtype), torch.randn(5000, 8).to(dtype), torch.randn(5000)
    head, targets = Head(weight, bias, scale, softcap), torch.tensor([0, 7, 4000, 4989, 4999])
    strip = cpu_logits.LogitStrip(x, cpu_logits.target_shift(x, targets, head), head, 7, 4990)
    exact = reference.logits(x.double(), weight.double(), bias.double(), scale, softcap)
    shifted = dtype == torch.bfloat16 and bfloat16_cpu
    offset_N1 = scale * strip.shift_N1.float() if shifted and softcap is None else torch.zeros(5, 1)
    for block in strip.blocks():
        found = strip.read(block)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        error = relative_error(found + offset_N1[block], exact[block, 7:4990])
        assert error < (4e-3 if shifted else 1e-6)
    logp, _ = reference.token_stats(exact, targets)
    memory = cpu_stages.tile_memory([5], x, head, True)
    for found in (
        cpu_stages.token_stats(x, targets, head, 2**14)[0],
        cpu_stages.tile_stats(x, targets, head, memory),
        cpu_stages.tile_stats_and_grad(x, targets, head, memory)[0],
        cpu_stages.frozen_head_stats_and_grad(x, targets, head, 2**14)[0],
    ):
        assert relative_error(found, logp) < (1e-3 if shifted else 1e-6)


@BUDGETS
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_every_schedule_is_exact_either_way(frozen, budget, scale, softcap, bfloat16_cpu):
    problem = make_problem(dtype=torch.bfloat16, bias=True, scale=scale, softcap=softcap)
    problem.requiring_grad(True, not frozen, not frozen)
    loss = loss_of(problem, budget)
    with torch.no_grad():
        assert torch.equal(loss_of(problem, budget), loss)
    loss.backward()
    truth, dh, dw, db = problem.truth()
    assert relative_error(loss, truth.loss) < (1e-5 if bfloat16_cpu else 1e-6)
    # Gradients are rounded to bfloat16 once at the end where everything before is float32: 2^-9 at most, 1.7e-3 rms.
    tolerance = 6e-3 if bfloat16_cpu else 2.5e-3
    wanted = [(problem.hidden.grad, dh), (problem.weight.grad, dw), (problem.bias.grad, db)]
    for grad, exact in wanted[: 1 if frozen else None]:
        assert grad.dtype == torch.bfloat16 and relative_error(grad, exact) < tolerance


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("budget", [0, 2**30], ids=["strips", "one bin"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_copy_of_a_widened_head(dtype, budget, frozen, monkeypatch):
    """Few rows: a float32 copy of the head, or of its gradient, would be the largest thing alive."""
    monkeypatch.setattr(cpu_logits, "multiplies_bfloat16", lambda: False)
    vocabulary, hidden = 20_011, 64
    problem = make_problem(1, 12, hidden, vocabulary, dtype=dtype).requiring_grad(True, not frozen)
    tile = problem.rows.rows_N.numel() * vocabulary * 4
    part = 2**20
    monkeypatch.setattr(matmul, "_PART_BYTES", part)
    # float16's finished gradient waits in float32 for a GradScaler, where it is finished before backward.
    waits = dtype == torch.float16 and budget > 0
    result = 0 if frozen else vocabulary * hidden * (4 if waits else 2)
    assert max(tile, part, result) < vocabulary * hidden * 4 or waits
    _, largest, peak = measure(lambda: loss_of(problem, budget, 2**22).backward())
    assert largest <= max(tile, part, result) + ROUND
    # float16 is cast once more when it is handed out.
    assert peak <= tile + result * (1.5 if waits else 1) + 2 * part + 2**19


def test_a_sum_of_several_products_is_rounded_once():
    total = HeadGradient(Needs(False, True, False), torch.bfloat16)
    one = torch.ones(1, 1)
    for g in (1.003, 1.0, -2.0):
        total.add(torch.full((1, 1), g), one, one[0], last=g == -2.0)
    # Rounded to bfloat16 in between, 1.003 would be 1.
    assert total.weight_VD.item() == pytest.approx(0.003, rel=1e-2)


def test_means_of_logits_are_exact_and_copy_no_head(bfloat16_cpu, monkeypatch):
    """255 positions, whose 1 / n is furthest from bfloat16, of states at the top of its mantissa; all logits equal."""
    vocabulary, hidden = 20_011, 32
    monkeypatch.setattr(matmul, "_PART_BYTES", 2**18)
    weight = torch.ones(vocabulary, hidden, dtype=torch.bfloat16)
    states = torch.full((2, 256, hidden), 255 / 512, dtype=torch.bfloat16)
    labels, logit = torch.zeros(2, 256, dtype=torch.long), hidden * 255 / 512
    with torch.no_grad():
        out = orpo_loss(states, weight, labels, logits_budget=0, strip_bytes=2**20)
        # What of the strips is in float32 is larger than the weight: the metrics are measured alone.
        _, largest, _ = measure(out.metrics)
    assert largest <= 2**18 + ROUND < vocabulary * hidden * 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metrics = out.metrics()
    for name in ("logits/chosen", "logits/rejected"):
        assert metrics[name].dtype == torch.float32 and metrics[name].item() == pytest.approx(logit, rel=1e-6)
    liger = FusedLinearORPOLoss()(weight, states, labels)[1]
    assert [liger[2].item(), liger[3].item()] == pytest.approx([logit, logit], rel=1e-6)
