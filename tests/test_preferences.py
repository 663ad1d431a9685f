"""Other preference losses in a few lines on `token_logprobs`, as kernels/README.md shows them, against eager torch."""

import pytest
import torch
import torch.nn.functional as F
from problems import make_problem, relative_error

from orpo import token_logprobs

P, T, D = 3, 17, 24


def summed(problem, weight, fused):
    """Sum of response log-probabilities and number of response tokens of each sequence: fused, or over full logits."""
    labels = problem.labels[:, 1:]
    mask = labels != -100
    if fused:
        logp = token_logprobs(problem.hidden[:, :-1][mask], weight, labels[mask])
        sequence = mask.nonzero()[:, 0]
        return logp.new_zeros(2 * P).index_add(0, sequence, logp), mask.sum(1)
    logp = torch.log_softmax(problem.hidden[:, :-1] @ weight.T, -1)
    picked = logp.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (picked * mask).sum(1), mask.sum(1)


def sft(logps, lengths, reference):
    return -logps[:P].sum() / lengths[:P].sum()


def dpo(logps, lengths, reference, beta=0.1):
    margin = logps - reference
    return -F.logsigmoid(beta * (margin[:P] - margin[P:])).mean()


def simpo(logps, lengths, reference, beta=2.0, gamma=1.0):
    mean = logps / lengths
    return -F.logsigmoid(beta * (mean[:P] - mean[P:]) - gamma).mean()


def cpo(logps, lengths, reference, beta=0.1):
    return -F.logsigmoid(beta * (logps[:P] - logps[P:])).mean() - logps[:P].sum() / lengths[:P].sum()


@pytest.mark.parametrize("loss", [sft, dpo, simpo, cpo])
def test_other_losses_equal_their_eager_form(loss):
    problem = make_problem(P, T, D).requiring_grad()
    frozen = make_problem(P, T, D, seed=1).weight
    results = []
    for fused in (True, False):
        problem.requiring_grad()
        with torch.no_grad():
            reference = summed(problem, frozen, fused)[0]
        value = loss(*summed(problem, problem.weight, fused), reference)
        value.backward()
        results.append((value, problem.hidden.grad, problem.weight.grad))
    for ours, eager in zip(*results, strict=True):
        assert relative_error(ours, eager.detach()) < 1e-5
