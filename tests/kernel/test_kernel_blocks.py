"""Exponentials that do not outlive a block of rows (a frozen head), and those of log-probabilities."""

import pytest
import torch
from orpo_kernels import logprobs, plan
from orpo_kernels.gpu import stages as gpu_stages
from orpo_kernels.head import strip_width
from orpo_kernels.settings import LossSettings
from problems import make_problem, relative_error

from orpo import orpo_loss, token_logprobs

V = 600
# 64 float32 exponentials and their maximum, over the whole vocabulary.
ROW_BYTES = 10 * 260
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
HEADS = {"plain": dict(), "full": dict(bias=True, softcap=6.0, scale=0.8)}


@pytest.fixture
def launches(monkeypatch):
    """Rows of each call of stage 1, and of each of stage 3 that computes logits again."""
    seen = {"token_stats": [], "logit_grad": []}
    for name, calls in seen.items():
        original = getattr(gpu_stages, name)

        def spy(x_ND, *arguments, original=original, calls=calls):
            calls.append(x_ND.shape[0])
            return original(x_ND, *arguments)

        monkeypatch.setattr(gpu_stages, name, spy)
    return seen


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(plan, "_BLOCK_ROWS", 4)


@pytest.mark.kernels
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_frozen_head_in_blocks(dtype, head, launches, kernel_device):
    problem = make_problem(V=V, dtype=dtype, device=kernel_device, **HEADS[head]).requiring_grad(False, False, False)
    problem.hidden.requires_grad_()
    n = problem.rows.rows_N.numel()
    budget = 10 * (64 * dtype.itemsize + 4) * (n // 3 + 1)

    def run():
        keywords = dict(logits_budget=budget, strip_bytes=20_000, backend="triton") | problem.keywords
        return orpo_loss(problem.hidden, problem.weight, problem.labels, **keywords)

    out = run()
    blocks = launches["token_stats"].copy()
    assert len(blocks) >= 3 and sum(blocks) == n and max(blocks) <= n // 3 + 1 and not launches["logit_grad"]
    out.loss.backward()
    truth, dh, *_ = problem.truth()
    assert relative_error(out.loss, truth.loss) < 2e-6
    assert relative_error(problem.hidden.grad, dh) < TOLERANCE[dtype]
    with torch.no_grad():
        assert torch.equal(run().loss, out.loss.detach())
    assert launches["token_stats"] == 2 * blocks


@pytest.mark.kernels
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("rows", [0, 60, 2**20], ids=["none", "some", "all"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_log_probabilities(dtype, rows, frozen, launches, kernel_device):
    problem = make_problem(V=V, dtype=dtype, bias=True, softcap=6.0, device=kernel_device)
    x = problem.hidden.detach().flatten(0, 1).requires_grad_()
    weight, bias = (t.detach().requires_grad_(not frozen) for t in (problem.weight, problem.bias))
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, V, (x.shape[0],), generator=generator).to(kernel_device)
    upstream = torch.randn(x.shape[0], generator=generator).to(kernel_device)
    budget = rows * 10 * (64 * dtype.itemsize + 4)

    def run():
        keywords = dict(bias=bias, logit_softcap=6.0, logits_budget=budget, strip_bytes=20_000, backend="triton")
        return token_logprobs(x, weight, targets, **keywords)

    logp = run()
    logp.backward(upstream, retain_graph=True)
    # A trained head has 256 columns of 600 kept by 60 of 102 rows' worth, the rest in strips of 20,000 bytes.
    strip = strip_width(x.shape[0], V if rows == 0 else V - 256, dtype.itemsize, 20_000)
    again = 0 if rows > 60 or (frozen and rows) else -(-(V if rows == 0 else V - 256) // strip)
    assert x.shape[0] == 102 and len(launches["logit_grad"]) == again
    x64, weight64, bias64 = (t.detach().double().requires_grad_() for t in (x, weight, bias))
    z64 = 6 * torch.tanh((x64 @ weight64.T + bias64) / 6)
    expected = z64.log_softmax(1).gather(1, targets[:, None])[:, 0]
    expected.backward(upstream.double())
    assert relative_error(logp.detach(), expected.detach()) < 2e-6
    first = []
    for found, exact in ((x, x64), *(() if frozen else ((weight, weight64), (bias, bias64)))):
        assert relative_error(found.grad, exact.grad) < TOLERANCE[dtype]
        first.append((found, found.grad.clone()))
    logp.backward(upstream)
    assert all(torch.equal(found.grad, 2 * once) for found, once in first)
    with torch.no_grad():
        assert torch.equal(run(), logp.detach())


@pytest.mark.kernels
@pytest.mark.parametrize("wanted", ["all", "head", "hidden", "none"])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_compiler_is_told_the_sizes(weight_dtype, wanted, kernel_device):
    from torch._subclasses import FakeTensorMode

    x = torch.randn(50, 16, device=kernel_device).bfloat16()
    weight = torch.randn(V, 16, device=kernel_device).to(weight_dtype)
    targets = torch.arange(50, device=kernel_device)
    head = wanted in ("all", "head")
    settings = dict(
        logits_budget=60_000, strip_bytes=20_000, backend="triton",
        needs=[wanted in ("all", "hidden"), head, False, not head],
    )  # fmt: skip
    numbers = LossSettings().numbers()
    real = logprobs.linear_logprobs(x, weight, None, targets, numbers, **settings)
    with FakeTensorMode() as mode:
        fake = logprobs.linear_logprobs(
            *map(mode.from_tensor, (x, weight)), None, *map(mode.from_tensor, (targets, numbers)), **settings
        )
    assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in fake]
    assert (real[3].numel() > 0) == head and real[3].nbytes + real[4].nbytes <= 60_000


@pytest.mark.kernels
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_log_probabilities_of_rows_that_the_compiler_cannot_count(backend, frozen, kernel_device):
    problem = make_problem(device="cpu" if backend == "torch" else kernel_device).requiring_grad(weight=not frozen)

    def step(hidden, weight, labels):
        index = (labels.flatten() >= 0).nonzero()[:, 0]
        return token_logprobs(hidden.flatten(0, 1)[index], weight, labels.flatten()[index], backend=backend).sum()

    results = []
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)):
            problem.requiring_grad(weight=not frozen)
            total = run(problem.hidden, problem.weight, problem.labels)
            total.backward()
            results.append((total.detach(), problem.hidden.grad, problem.weight.grad))
    torch.testing.assert_close(*results)


def test_rows_of_a_block():
    assert block_rows_of(10, held=10) == 10 and block_rows_of(10, held=9) == 0
    # All of few rows, or a kilorow of many: evened out in steps of 16, none of them a straggler.
    assert block_rows_of(5000, held=1023) == 0 and block_rows_of(5000, held=1024) == 1008
    assert block_rows_of(5000, held=4096) == 2512 and block_rows_of(5000, held=2**20) == 5000
    assert block_rows_of(9217, held=1032) == 1032 and 9217 % 1032 == 961
    assert block_rows_of(0, held=10) == 0


def block_rows_of(rows, held):
    found = plan.block_rows(rows, V, 4, held * ROW_BYTES + ROW_BYTES - 1)
    assert found <= held
    return found
