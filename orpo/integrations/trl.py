"""TRL's own ORPOTrainer and CPOTrainer, computing their log-probabilities without the full logits.

    import orpo.integrations.trl as fused

    fused.patch()

before a trainer is made. Configuration, metrics and logs stay TRL's. `unpatch()` takes it back.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import trl
from orpo_kernels import reference
from torch import Tensor, nn

from orpo.integrations.logprobs import LogprobCall
from orpo.integrations.replacing import Replacements, check_attached, refuse_unknown

# First version with the methods that are replaced here, and the first one after those that were compared.
KNOWN = "0.24", "1.17"

_replaced = Replacements()


def patch() -> None:
    """Replaces the forward pass of TRL's ORPOTrainer and CPOTrainer, and of their subclasses. Twice is as once.

    Results are TRL's, with two exceptions: ORPO's odds-ratio mean leaves out pairs with an empty answer, for which
    TRL's loss is NaN, and gradients stay finite where the model is certain of an answer.

    Raises:
        ImportError: this version of TRL is not known.
    """
    refuse_unknown("trl", trl.__version__, *KNOWN)
    orpo_trainer, cpo_trainer = trainers()
    for trainer, scores_prompt in ((orpo_trainer, True), (cpo_trainer, False)):
        forward = functools.partialmethod(_concatenated_forward, scores_prompt)
        _replaced.replace(trainer, "concatenated_forward", forward)
        _replaced.attach_after_init(trainer)
    _replaced.replace(orpo_trainer, "odds_ratio_loss", _odds_ratio_loss)


def unpatch() -> None:
    """Gives TRL's classes their own methods back. Existing trainers compute as TRL does from their next step."""
    _replaced.undo()


def trainers() -> tuple[type, type]:
    """TRL's ORPOTrainer and CPOTrainer, wherever its version has them."""
    try:
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer
    except ImportError:
        from trl import CPOTrainer, ORPOTrainer
    return ORPOTrainer, CPOTrainer


def _concatenated_forward(
    self: Any, scores_prompt: bool, model: nn.Module, batch: dict[str, Any]
) -> tuple[Tensor, ...]:
    """TRL's five or six results, with mean logits (scalars) for the logits, since TRL logs their mean only."""
    check_attached(self, model)
    both = self.concatenated_inputs(batch, device=self.accelerator.device)
    ids, mask, labels = (both[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))
    pairs = len(batch["chosen_labels"])
    scored = labels
    if scores_prompt:
        # ORPO's NLL, in TRL, is over the prompt too.
        scored = torch.cat([ids[:pairs].where(mask[:pairs] == 1, -100), labels[pairs:]])
    router = {"output_router_logits": True} if self.aux_loss_enabled else {}
    out = model(ids, attention_mask=mask, orpo=LogprobCall(scored, keeps_last=not scores_prompt), **router)
    return results(self, out, scored, labels, averages=scores_prompt or self.loss_type in ("ipo", "simpo"))


def results(trainer: Any, out: dict[str, Any], scored: Tensor, labels: Tensor, averages: bool) -> tuple[Tensor, ...]:
    """TRL's results: log-probabilities of answers, mean logits, NLL, and the router's loss where there is one.

    Args:
        trainer: TRL's, or one derived from it.
        out: of the model called with a :class:`LogprobCall` for `scored`.
        scored: (2P, T), chosen half first; its first half is what the NLL scores, -100 elsewhere.
        labels: (2P, T), the answers.
        averages: whether log-probabilities are means over an answer, or sums.
    """
    logps, pairs = out["logps"], len(labels) // 2
    chosen = scored[:pairs, 1:] != -100
    nll = -logps[:pairs].sum() / chosen.sum()
    answers = labels[:, 1:] != -100
    scores, lengths = (logps * answers).sum(1), answers.sum(1)
    if averages:
        # NaN for an empty answer, as in TRL, but not by a division by 0, whose gradient would be NaN too.
        scores = (scores / lengths.clamp(min=1)).where(lengths > 0, torch.nan)
    five = *scores.split(pairs), *out["mean_logits"].unbind(), nll
    return (*five, out["aux_loss"]) if trainer.aux_loss_enabled else five


def _odds_ratio_loss(
    self: Any, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """TRL's five results; means are over the pairs whose answers are not empty."""
    chosen, rejected = policy_chosen_logps.float(), policy_rejected_logps.float()
    answered = ~(chosen.isnan() | rejected.isnan())
    weights = answered * (len(answered) / answered.sum().clamp(min=1))
    log_odds = reference.log_odds_ratio(chosen.where(answered, -1.0), rejected.where(answered, -1.0))
    ratio = -reference.softplus(-log_odds) * weights
    rewards = self.beta * policy_chosen_logps.detach(), self.beta * policy_rejected_logps.detach()
    return self.beta * ratio, *rewards, ratio.mean(), (log_odds * weights).mean()
