"""Log-probabilities of sequences, and the preference losses on them, against float64 over full logits and TRL's own."""

import math
from types import SimpleNamespace

import pytest
import torch
from problems import make_problem, relative_error

import orpo
from orpo import SequenceLogprobs, sequence_logprobs

P, T, D = 3, 17, 24


def eager(hidden, weight, labels, bias=None):
    """The same three from full logits in float64."""
    logp = torch.log_softmax(torch.nn.functional.linear(hidden.double(), weight.double(), bias)[:, :-1], -1)
    counts = labels[:, 1:] != -100
    picked = logp.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * counts
    lengths = counts.sum(1)
    return SequenceLogprobs(picked.sum(1), picked.sum(1) / lengths.clamp(min=1), lengths)


def test_sums_means_and_lengths_by_hand():
    # Logits are the hidden states; token 1 has probability 3/4 at the first position, 1/2 at the second.
    hidden = torch.tensor([[[0.0, math.log(3)], [0.0, 0.0], [9.0, 9.0]], [[5.0, 5.0]] * 3]).requires_grad_()
    out = sequence_logprobs(hidden, torch.eye(2), torch.tensor([[-100, 1, 1], [0, -100, -100]]))
    assert out.sums.tolist() == pytest.approx([math.log(3 / 8), 0.0])
    assert out.means.tolist() == pytest.approx([math.log(3 / 8) / 2, 0.0])
    assert out.lengths.tolist() == [2, 0]
    out.means.sum().backward()
    # Half of (target - probability) at the two positions that count, nothing anywhere else.
    assert torch.allclose(hidden.grad[0], torch.tensor([[-0.125, 0.125], [-0.25, 0.25], [0.0, 0.0]]))
    assert not hidden.grad[1].any()


def test_labels_may_be_aligned_with_what_predicts_them():
    problem = make_problem(P, T, D)
    aligned = torch.cat([problem.labels[:, 1:], torch.full((2 * P, 1), -100)], 1)
    ours = sequence_logprobs(problem.hidden, problem.weight, aligned, shift=False)
    for one, other in zip(ours, sequence_logprobs(problem.hidden, problem.weight, problem.labels), strict=True):
        assert torch.equal(one, other)


def sigmoid_loss(x):
    return torch.log1p(torch.exp(-x)).mean()


def halves(values):
    return values[:P] - values[P:]


# Each loss from (policy, reference), and its formula in plain torch.
LOSSES = {
    "sft": (lambda p, r: orpo.sft_loss(p), lambda p, r: -p.sums.sum() / p.lengths.sum()),
    "dpo": (
        lambda p, r: orpo.dpo_loss(p, r, beta=0.3),
        lambda p, r: sigmoid_loss(0.3 * (halves(p.sums) - halves(r.sums))),
    ),
    "ipo": (
        lambda p, r: orpo.ipo_loss(p, r, beta=0.3),
        lambda p, r: ((halves(p.sums / p.lengths) - halves(r.sums / r.lengths) - 1 / 0.6) ** 2).mean(),
    ),
    "cpo": (
        lambda p, r: orpo.cpo_loss(p, beta=0.3, alpha=0.7),
        lambda p, r: sigmoid_loss(0.3 * halves(p.sums)) - 0.7 * p.sums[:P].sum() / p.lengths[:P].sum(),
    ),
    "simpo": (
        lambda p, r: orpo.simpo_loss(p, beta=1.5, gamma=0.4),
        lambda p, r: sigmoid_loss(1.5 * halves(p.sums / p.lengths) - 0.4),
    ),
    "ratios": (
        lambda p, r: (orpo.log_ratios(p, r) * torch.arange(2 * P)).sum(),
        lambda p, r: ((p.sums - r.sums) * torch.arange(2 * P)).sum(),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_equal_their_formulas_over_full_logits(name):
    problem, frozen = make_problem(P, T, D), make_problem(P, T, D, seed=1).weight
    results = []
    for logprobs, loss in zip((sequence_logprobs, eager), LOSSES[name], strict=True):
        problem.requiring_grad()
        reference = logprobs(problem.hidden.detach(), frozen, problem.labels)
        value = loss(logprobs(problem.hidden, problem.weight, problem.labels), reference)
        value.backward()
        results.append((value.detach(), problem.hidden.grad, problem.weight.grad))
    for ours, truth in zip(*results, strict=True):
        assert relative_error(ours, truth.detach()) < 1e-5


@pytest.mark.parametrize("name", ["cpo", "simpo"])
def test_losses_are_trls(name):
    trl = pytest.importorskip("trl.experimental.cpo", reason="needs TRL: pip install '.[paper]'")
    problem = make_problem(P, T, D)
    policy = sequence_logprobs(problem.hidden, problem.weight, problem.labels)
    trainer = SimpleNamespace(
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
        loss_type="sigmoid" if name == "cpo" else "simpo",
        beta=0.3,
        simpo_gamma=0.4,
        label_smoothing=0.0,
    )
    scores = policy.sums if name == "cpo" else policy.means
    losses, *_ = trl.CPOTrainer.cpo_loss(trainer, *scores.chunk(2))
    ours = orpo.cpo_loss(policy, 0.3, 0.0) if name == "cpo" else orpo.simpo_loss(policy, 0.3, 0.4)
    assert ours.item() == pytest.approx(losses.mean().item(), rel=1e-6)


def test_refusals():
    x, w, y = torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"hidden has to have shape \(sequences, .*, got \(3, 4\)"):
        sequence_logprobs(x[0], w, y)
    with pytest.raises(ValueError, match=r"labels of shape \(2, 2\) does not fit hidden of shape \(2, 3, 4\)"):
        sequence_logprobs(x, w, y[:, 1:])
    with pytest.raises(ValueError, match=r"labels has to be int32 or int64, got torch\.float32"):
        sequence_logprobs(x, w, y.float())
    odd = sequence_logprobs(x[:1], w, y[:1])
    with pytest.raises(ValueError, match="two sequences each, the chosen ones first; got 1"):
        orpo.simpo_loss(odd)
    for loss in (orpo.dpo_loss, orpo.ipo_loss):
        with pytest.raises(ValueError, match="policy has 2 sequences, and reference 1: both need the same"):
            loss(sequence_logprobs(x, w, y), odd)
