"""ms-swift's ORPO, CPO and SimPO (``swift rlhf``), computing their log-probabilities without the full logits.

A file of two lines, given as ``--external_plugins``:

    import orpo.integrations.ms_swift as fused

    fused.patch()
"""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any

from swift.rlhf_trainers.cpo_trainer import CPOTrainer
from swift.rlhf_trainers.orpo_trainer import ORPOTrainer
from torch import Tensor, nn

from orpo.integrations import trl
from orpo.integrations.logprobs import LogprobCall
from orpo.integrations.replacing import Replacements, check_attached, refuse_unknown

# First version with the methods that are replaced here, and first version that was not compared.
KNOWN = "4.6", "4.7"

_replaced = Replacements()


def patch() -> None:
    """Replaces the forward pass of ms-swift's ORPO and CPO trainers, and TRL's methods beneath.

    Results are ms-swift's, with the exceptions of :func:`orpo.integrations.trl.patch`.

    Raises:
        ImportError: this version of ms-swift or of TRL is not known.
    """
    refuse_unknown("ms-swift", version("ms-swift"), *KNOWN)
    trl.patch()
    for trainer, is_orpo in ((ORPOTrainer, True), (CPOTrainer, False)):
        _replaced.replace(trainer, "concatenated_forward", functools.partialmethod(_concatenated_forward, is_orpo))


def unpatch() -> None:
    """Gives the classes their own methods back, TRL's too."""
    _replaced.undo()
    trl.unpatch()


def _concatenated_forward(self: Any, is_orpo: bool, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, ...]:
    """ms-swift's five or six results, with mean logits (scalars) for the logits. Its NLL scores answers alone."""
    if self.template.sequence_parallel_size > 1:
        raise ValueError(
            "sequence_parallel_size is more than 1, and log-probabilities are taken of whole sequences here: set it "
            "to 1, or call unpatch()"
        )
    check_attached(self, model)
    inputs = dict(batch)
    labels = inputs.pop("labels")
    router = {"output_router_logits": True} if self.aux_loss_enabled else {}
    out = model(**inputs, **router, use_cache=False, orpo=LogprobCall(labels, keeps_last=not is_orpo))
    return trl.results(self, out, labels, labels, averages=is_orpo or self.loss_type in ("ipo", "simpo"))
