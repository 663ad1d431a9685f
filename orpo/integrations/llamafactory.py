"""LLaMA-Factory's ORPO and SimPO (``stage: dpo``, ``pref_loss: orpo`` or ``simpo``), without the full logits.

    python -m orpo.integrations.llamafactory train.yaml

in place of ``llamafactory-cli train train.yaml``, or `patch()` before ``llamafactory.train.tuner.run_exp()``.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from llamafactory.train.dpo.trainer import CustomDPOTrainer
from orpo_kernels import reference
from torch import Tensor, nn

from orpo.integrations.logprobs import LogprobCall
from orpo.integrations.replacing import Replacements, check_attached, refuse_unknown

# First version with the methods that are replaced here, and first version that was not compared.
KNOWN = "0.9.5", "0.9.6"

_replaced = Replacements()


def patch() -> None:
    """Replaces the forward pass of LLaMA-Factory's preference trainer, for losses without a reference model.

    Results are LLaMA-Factory's, except that gradients stay finite where the model is certain of an answer.

    Raises:
        ImportError: this version of LLaMA-Factory is not known.
    """
    refuse_unknown("llamafactory", version("llamafactory"), *KNOWN)
    _replaced.replace(CustomDPOTrainer, "concatenated_forward", _concatenated_forward)
    _replaced.replace(CustomDPOTrainer, "odds_ratio_loss", _odds_ratio_loss)
    _replaced.attach_after_init(CustomDPOTrainer)


def unpatch() -> None:
    """Gives the class its own methods back."""
    _replaced.undo()


def _concatenated_forward(
    self: Any, model: nn.Module, batch: dict[str, Tensor], is_ref_model: bool = False
) -> dict[str, Tensor]:
    """LLaMA-Factory's dict, with mean logits (scalars) for the logits, since it logs their mean only."""
    if self.finetuning_args.use_ref_model:
        original = _replaced.originals[CustomDPOTrainer, "concatenated_forward"]
        return original(self, model, batch, is_ref_model)
    check_attached(self, model)
    labels = batch.pop("labels")
    out = model(**batch, orpo=LogprobCall(labels))
    means = out["logps"].sum(1) / (labels[:, 1:] != -100).sum(1)
    (chosen, rejected), (chosen_logits, rejected_logits) = means.chunk(2), out["mean_logits"].unbind()
    return {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "chosen_logits": chosen_logits,
        "rejected_logits": rejected_logits,
        "chosen_logps_avg": chosen,
    }


def _odds_ratio_loss(self: Any, chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """(P,) ``nll + beta * softplus(-log odds ratio)``. LLaMA-Factory's NLL is each answer's mean per token."""
    return self.beta * reference.softplus(-reference.log_odds_ratio(chosen_logps, rejected_logps)) - chosen_logps


if __name__ == "__main__":
    from llamafactory.train.tuner import run_exp

    patch()
    run_exp()
