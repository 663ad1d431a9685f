"""The reference is the only truth, so it is held against what does not come from it: autograd, mpmath, the paper."""

import mpmath
import pytest
import torch
from orpo_kernels import reference
from problems import make_problem

from orpo import odds_ratio_loss


def naive_loss(problem, hidden, weight, bias):
    """ORPO as one would write it: full logits, log_softmax, the odds from the paper's Eq. 4 and 7."""
    logits = hidden @ weight.T + (0 if bias is None else bias)
    logits = problem.scale * logits
    if problem.softcap is not None:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    logp = torch.log_softmax(logits, -1)[:, :-1]
    labels = problem.labels[:, 1:]
    nll_labels = labels if problem.nll_labels is None else problem.nll_labels[:, 1:]
    P = labels.shape[0] // 2

    def picked(target):
        return logp.gather(-1, target.clamp(min=0)[..., None])[..., 0] * (target != -100)

    a = picked(labels).sum(1) / (labels != -100).sum(1)
    log_odds = a - torch.log1p(-torch.exp(a))
    chosen_nll = nll_labels[:P]
    nll = -(logp[:P].gather(-1, chosen_nll.clamp(min=0)[..., None])[..., 0] * (chosen_nll != -100)).sum()
    nll = nll / (chosen_nll != -100).sum()
    odds = -torch.nn.functional.logsigmoid(log_odds[:P] - log_odds[P:]).mean()
    return nll + problem.beta * odds


@pytest.mark.parametrize("prompt_in_nll", [True, False])
@pytest.mark.parametrize(("bias", "scale", "softcap"), [(False, 1.0, None), (True, 0.7, None), (True, 1.3, 5.0)])
def test_loss_and_gradients_are_autograds(bias, scale, softcap, prompt_in_nll):
    problem = make_problem(
        dtype=torch.float64, bias=bias, scale=scale, softcap=softcap, prompt_in_nll=prompt_in_nll
    ).requiring_grad()
    loss = naive_loss(problem, problem.hidden, problem.weight, problem.bias)
    loss.backward()
    result, dh, dw, db = problem.truth()
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(dh, problem.hidden.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(dw, problem.weight.grad, rtol=1e-10, atol=1e-14)
    if bias:
        torch.testing.assert_close(db, problem.bias.grad, rtol=1e-10, atol=1e-14)


# Mean log-probabilities from nearly certain to hopeless; equal, ordered and reversed.
MEANS = [-1e-12, -1e-9, -1e-6, -1e-3, -0.1, -1.0, -5.0, -50.0, -200.0]


@pytest.mark.parametrize("a_w", MEANS)
@pytest.mark.parametrize("a_l", MEANS)
def test_odds_against_50_digits(a_w, a_l):
    with mpmath.workdps(50):
        w, loser = mpmath.mpf(a_w), mpmath.mpf(a_l)
        log_odds = lambda a: a - mpmath.log(-mpmath.expm1(a))  # noqa: E731
        r = log_odds(w) - log_odds(loser)
        delta = 1 / (1 + mpmath.exp(r))
        # The paper's Eqs. 8-10: d log sigmoid(r) = delta * h; ours is the gradient of the loss, minus that.
        grad_w, grad_l = -delta / -mpmath.expm1(w), delta / -mpmath.expm1(loser)
    a_w, a_l = (torch.tensor(a, dtype=torch.float64) for a in (a_w, a_l))
    ours_r = reference.log_odds_ratio(a_w, a_l)
    ours_w, ours_l = reference.odds_ratio_grad(a_w, a_l)
    for ours, exact in ((ours_r, r), (ours_w, grad_w), (ours_l, grad_l)):
        assert (
            abs(ours.item() - float(exact)) <= 1e-13 * max(abs(float(exact)), 1.0 if ours is ours_r else 0.0) + 1e-300
        )


def test_odds_gradient_is_the_central_difference():
    generator = torch.Generator().manual_seed(1)
    a_w, a_l = -torch.rand(2, 200, generator=generator, dtype=torch.float64).exp() * 3
    step = 1e-6
    loss = lambda w, loser: reference.softplus(-reference.log_odds_ratio(w, loser))  # noqa: E731
    grad_w, grad_l = reference.odds_ratio_grad(a_w, a_l)
    torch.testing.assert_close(
        (loss(a_w + step, a_l) - loss(a_w - step, a_l)) / (2 * step), grad_w, rtol=1e-7, atol=1e-9
    )
    torch.testing.assert_close(
        (loss(a_w, a_l + step) - loss(a_w, a_l - step)) / (2 * step), grad_l, rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("a", [-1e-3, -1.0, -30.0])
def test_the_odds_gradient_of_equal_answers_is_half_of_its_largest(a):
    a_w, a_l = (torch.tensor([a], dtype=torch.float64, requires_grad=True) for _ in range(2))
    odds_ratio_loss(a_w, a_l, beta=1.0)[0].sum().backward()
    d_w, d_l = reference.odds_ratio_grad(a_w.detach(), a_l.detach())
    # TRL's first value is log sigmoid(r), whose gradient is minus that of the loss.
    torch.testing.assert_close(torch.stack([a_w.grad, a_l.grad]), -torch.stack([d_w, d_l]), rtol=1e-12, atol=0)


def test_certain_answers_have_the_documented_values():
    zero, some = torch.tensor(0.0, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    assert reference.log_odds_ratio(zero, zero).item() == 0.0
    eps = torch.tensor(reference.Q_EPS, dtype=torch.float64)
    torch.testing.assert_close(
        reference.log_odds_ratio(zero, some), 1.0 - eps.log() + torch.log(-torch.expm1(some)), rtol=1e-14, atol=0
    )
    grad_w, grad_l = reference.odds_ratio_grad(zero, zero)
    assert grad_w.item() == pytest.approx(-0.5 / reference.Q_EPS) and grad_l.item() == pytest.approx(
        0.5 / reference.Q_EPS
    )


def test_a_pair_without_an_answer_is_not_counted():
    problem = make_problem(P=3, dtype=torch.float64)
    problem.labels[4] = -100  # the second pair's rejected answer
    result, *_ = problem.truth()
    assert result.pair_mask_P.tolist() == [True, False, True]
    alone = reference.softplus(-result.log_odds_P[[0, 2]]).mean()
    torch.testing.assert_close(result.odds_ratio_loss, alone, rtol=1e-14, atol=0)


def test_targets_at_minus_infinity_leave_the_other_rows_alone():
    z = torch.tensor([[0.0, -torch.inf, 1.0], [0.5, 0.1, 0.2]], dtype=torch.float64)
    logp, lse = reference.token_stats(z, torch.tensor([1, 0]))
    assert logp[0] == -torch.inf and torch.isfinite(logp[1])
    torch.testing.assert_close(lse.sum(0), torch.logsumexp(z, 1))


@pytest.mark.parametrize("offset", [0.0, 2.0**45])
def test_what_all_logits_have_in_common_costs_no_digits(offset):
    z, targets = torch.arange(6.0, dtype=torch.float64).view(2, 3), torch.tensor([0, 2])
    logp, lse = reference.token_stats(z + offset, targets)
    torch.testing.assert_close(logp, z.log_softmax(1)[[0, 1], targets], rtol=1e-15, atol=0)
    g = reference.logit_grad(z + offset, logp, lse, targets)
    expected = torch.nn.functional.one_hot(targets, 3) - z.softmax(1)
    torch.testing.assert_close(g, expected, rtol=1e-14, atol=0)
