"""Exponentials that do not outlive a block of rows (a frozen head), and those of log-probabilities."""

import pytest
import torch
from orpo_kernels import kept, logprobs, triton_backend
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
        original = getattr(triton_backend, name)

        def spy(x_ND, *arguments, original=original, calls=calls):
            calls.append(x_ND.shape[0])
            return original(x_ND, *arguments)

        monkeypatch.setattr(triton_backend, name, spy)
    return seen


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(kept, "_BLOCK_ROWS", 4)


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
        keywords = dict(logits_budget=budget, strip_bytes=20_000, backend="triton-fused") | problem.keywords
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
@pytest.mark.parametrize("rows", [0, 13, 40, 2**20], ids=["none", "few", "some", "all"])
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
        keywords = dict(bias=bias, logit_softcap=6.0, logits_budget=budget, strip_bytes=20_000, backend="triton-fused")
        return token_logprobs(x, weight, targets, **keywords)

    logp = run()
    logp.backward(upstream, retain_graph=True)
    computed_again = bool(launches["logit_grad"])
    assert computed_again == (rows == 0 or (not frozen and rows < x.shape[0]))
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
        logit_scale=1.0, logit_softcap=None, logits_budget=60_000, strip_bytes=20_000, backend="triton-fused",
        needs=[wanted in ("all", "hidden"), head, False], head_frozen=not head,
    )  # fmt: skip
    real = logprobs.linear_logprobs(x, weight, None, targets, **settings)
    with FakeTensorMode() as mode:
        fake = logprobs.linear_logprobs(
            *(mode.from_tensor(t) for t in (x, weight)), None, mode.from_tensor(targets), **settings
        )
    assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in fake]
    assert (real[3].numel() > 0) == head and real[3].nbytes + real[4].nbytes <= 60_000


def test_rows_of_a_block():
    assert block_rows_of(10, held=10) == 10 and block_rows_of(10, held=9) == 0
    # All of few rows, or a kilorow of many: evened out in steps of 128.
    assert block_rows_of(5000, held=1023) == 0 and block_rows_of(5000, held=1024) == 1024
    assert block_rows_of(5000, held=4096) == 2560 and block_rows_of(5000, held=2**20) == 5000
    assert block_rows_of(0, held=10) == 0


def block_rows_of(rows, held):
    found = kept.block_rows(rows, V, 4, held * ROW_BYTES + ROW_BYTES - 1)
    assert found <= held
    return found
