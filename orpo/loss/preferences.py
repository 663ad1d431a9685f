"""Other losses on `sequence_logprobs`, a few lines each: SFT, DPO, IPO, CPO, SimPO, and the log-ratios of KTO.

Letters: B sequences; P pairs, where B = 2P and the chosen half comes first.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from orpo.loss.logprobs import SequenceLogprobs


def sft_loss(policy: SequenceLogprobs) -> Tensor:
    """Mean negative log-likelihood per token over all B sequences, a scalar: the cross-entropy of fine-tuning."""
    return -policy.sums.sum() / policy.lengths.sum().clamp(min=1)


def log_ratios(policy: SequenceLogprobs, reference: SequenceLogprobs) -> Tensor:
    """(B,) log-probability of each sequence under the policy minus that under the reference, as in KTO and DPO.

    Args:
        policy: from the model that trains.
        reference: from the model that it starts from, for the same labels, made under ``torch.no_grad()``.

    Raises:
        ValueError: they are of different numbers of sequences.
    """
    return _difference(policy.sums, reference.sums)


def dpo_loss(policy: SequenceLogprobs, reference: SequenceLogprobs, beta: float = 0.1) -> Tensor:
    """DPO (arXiv 2305.18290), mean over P pairs, a scalar: ``-log sigmoid(beta * (ratio_chosen - ratio_rejected))``."""
    return -logsigmoid(beta * _margin(log_ratios(policy, reference))).mean()


def ipo_loss(policy: SequenceLogprobs, reference: SequenceLogprobs, beta: float = 0.1) -> Tensor:
    """IPO (arXiv 2310.12036) on ratios per token, as its authors and TRL have it, mean over P pairs, a scalar.

    ``(ratio_chosen - ratio_rejected - 1 / (2 * beta)) ** 2``; `beta` is the paper's tau.
    """
    return (_margin(_difference(policy.means, reference.means)) - 1 / (2 * beta)).square().mean()


def cpo_loss(policy: SequenceLogprobs, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """CPO (arXiv 2401.08417), mean over P pairs, a scalar: DPO without a reference, plus `alpha` times the chosen NLL.

    The NLL is over the tokens of the chosen answers, as in TRL.
    """
    chosen = SequenceLogprobs(*(half[: len(half) // 2] for half in policy))
    return -logsigmoid(beta * _margin(policy.sums)).mean() + alpha * sft_loss(chosen)


def simpo_loss(policy: SequenceLogprobs, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """SimPO (arXiv 2405.14734), mean over P pairs, a scalar.

    ``-log sigmoid(beta * (mean_chosen - mean_rejected) - gamma)``. `gamma` is the paper's and TRL's `simpo_gamma`.
    """
    return -logsigmoid(beta * _margin(policy.means) - gamma).mean()


def _difference(policy_B: Tensor, reference_B: Tensor) -> Tensor:
    # One sequence would stand beside each.
    if policy_B.shape != reference_B.shape:
        raise ValueError(f"policy has {len(policy_B)} sequences, and reference {len(reference_B)}: both need the same")
    return policy_B - reference_B


def _margin(values_B: Tensor) -> Tensor:
    if len(values_B) % 2:
        raise ValueError(f"pairs have two sequences each, the chosen ones first; got {len(values_B)} sequences")
    chosen_P, rejected_P = values_B.chunk(2)
    return chosen_P - rejected_P
