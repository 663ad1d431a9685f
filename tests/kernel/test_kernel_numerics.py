"""Inputs on which a kernel's numerics could go wrong without the loss on ordinary inputs showing it."""

import pytest
import torch
from orpo_kernels.head import Head
from orpo_kernels.reference import Q_EPS
from orpo_kernels.rows import Rows
from problems import log_odds, make_problem, relative_error

from orpo import orpo_loss, token_logprobs

pytestmark = pytest.mark.kernels


def test_tiles_of_the_vocabulary_without_a_finite_logit(kernel_device):
    from orpo_kernels.gpu.logit_stats import logit_stats
    from orpo_kernels.gpu.odds_ratio import combine

    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 16, generator=generator), torch.randn(400, 16, generator=generator)
    bias = torch.zeros(400)
    bias[:300] = -torch.inf
    targets = torch.tensor([300, 310, 333, 398, 399])
    expected = (x.double() @ weight.double().T + bias).log_softmax(1)[torch.arange(5), targets]
    x, weight, bias, targets = (t.to(kernel_device) for t in (x, weight, bias, targets))
    head = Head(weight, bias)
    logp, _ = combine(*logit_stats(x, targets, head))
    torch.testing.assert_close(logp.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_a_hidden_size_that_ends_inside_a_later_tile(kernel_device):
    problem = make_problem(D=72, device=kernel_device).requiring_grad()
    out = orpo_loss(
        problem.hidden, problem.weight, problem.labels, logits_budget=0, backend="triton", **problem.keywords
    )
    out.loss.backward()
    truth, dh, dw, _ = problem.truth()
    assert relative_error(out.loss, truth.loss) < 1e-6
    assert relative_error(problem.hidden.grad, dh) < 1e-6
    assert relative_error(problem.weight.grad, dw) < 1e-6


@pytest.mark.parametrize("mean_logp", [-0.3, -1e-2, -1e-4, -1e-6])
def test_log_odds_of_nearly_certain_answers_keep_their_digits(mean_logp, kernel_device):
    from orpo_kernels.gpu.odds_ratio import objective

    logp = torch.tensor([mean_logp, -2.0], device=kernel_device)
    index, flags = torch.arange(2, device=kernel_device), torch.ones(2, dtype=torch.bool, device=kernel_device)
    rows = Rows(index, index, index, flags, index == 0, pairs=1)
    result = objective(logp, rows, beta=0.1, nll_weight=1.0, num_nll_tokens=1.0, num_pairs=1.0)
    a_w, a_l = logp.double().cpu()
    expected = (a_w - a_l) - (torch.log(-torch.expm1(a_w)) - torch.log(-torch.expm1(a_l)))
    torch.testing.assert_close(result.log_odds_P.double().cpu(), expected[None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("means", [(0.0, -2.0), (-2.0, 0.0), (0.0, 0.0)], ids=["chosen", "rejected", "both"])
def test_the_odds_of_a_certain_answer_stop_at_a_floor(means, kernel_device):
    from orpo_kernels.gpu.odds_ratio import objective

    logp = torch.tensor(means, device=kernel_device)
    index, flags = torch.arange(2, device=kernel_device), torch.ones(2, dtype=torch.bool, device=kernel_device)
    result = objective(logp, Rows(index, index, index, flags, ~flags, pairs=1), beta=0.1, nll_weight=1.0)
    a = torch.tensor(means, dtype=torch.float64)
    q = (-torch.expm1(a)).clamp(min=Q_EPS)
    odds = a - q.log()
    r = odds[0] - odds[1]
    expected = 0.1 * torch.sigmoid(-r) * torch.stack([-1 / q[0], 1 / q[1]])
    torch.testing.assert_close(result.log_odds_P.double().cpu(), r[None], rtol=1e-6, atol=0)
    torch.testing.assert_close(result.coef_N.double().cpu(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("num_pairs", [None, 5.0], ids=["counted", "given"])
def test_an_answer_without_a_partner_has_no_odds(num_pairs, kernel_device):
    """Pairs with both answers, with one of them, with none: the loss of the first alone, and its derivative."""
    from orpo_kernels.gpu.odds_ratio import objective

    # Of the third pair's chosen sequence the prompt alone is there.
    sequence = torch.tensor([0, 0, 0, 1, 1, 2, 4, 4, 6, 6, 6])
    response, nll = sequence != 2, sequence < 4
    logp = -torch.linspace(0.2, 2.2, 11, dtype=torch.float64).requires_grad_()
    a = torch.stack([logp[response & (sequence == s)].mean() for s in (0, 4, 1, 6)])
    r = log_odds(a[0]) - log_odds(a[1])
    odds_ratio_loss = torch.log1p(torch.exp(-r)) / (num_pairs or 1)
    loss = -logp[nll].mean() + 0.3 * odds_ratio_loss
    (coef,) = torch.autograd.grad(loss, logp)

    arrays = (t.to(kernel_device) for t in (torch.arange(11), torch.arange(11), sequence, response, nll))
    given = logp.detach().float().to(kernel_device)
    result = objective(given, Rows(*arrays, pairs=4), beta=0.3, nll_weight=1.0, num_pairs=num_pairs)
    zero = torch.zeros(())
    expected = {
        "loss": loss,
        "odds_ratio_loss": odds_ratio_loss,
        "mean_logp_S": torch.stack([a[0], a[2], zero, zero, a[1], zero, a[3], zero]),
        "log_odds_P": torch.stack([r, zero, zero, zero]),
        "coef_N": coef,
    }
    assert result.pair_mask_P.tolist() == [True, False, False, False]
    for name, value in expected.items():
        found = getattr(result, name).double().cpu()
        torch.testing.assert_close(found, value.detach().double(), rtol=1e-6, atol=1e-7, msg=name)


def test_the_largest_hidden_states_of_float16(kernel_device):
    """Times any coefficient above 1, or divided by a power of two below it, they would be infinite."""
    problem = make_problem(dtype=torch.float16, bias=True, device=kernel_device)
    problem.hidden[..., 0], problem.weight[:, 0] = 65504.0, 0.0
    problem.requiring_grad()
    orpo_loss(problem.hidden, problem.weight, problem.labels, backend="triton", **problem.keywords).loss.backward()
    _, dh, dw, db = problem.truth()
    for grad, exact in ((problem.hidden.grad, dh), (problem.weight.grad, dw), (problem.bias.grad, db)):
        assert relative_error(grad, exact) < 6e-4
    found = []
    for dtype in (torch.float16, torch.float64):
        rows = problem.hidden.detach()[0].to(dtype)
        weight = problem.weight.detach().to(dtype).requires_grad_()
        targets = torch.arange(len(rows), device=rows.device)
        logp = token_logprobs(rows, weight, targets, backend="triton" if dtype == torch.float16 else "torch")
        # Below 1/16 the largest gradient is one of float16.
        (logp * torch.linspace(0.001, 0.06, len(rows), device=rows.device).to(logp.dtype)).sum().backward()
        found.append(weight.grad)
    assert relative_error(*found) < 6e-4
