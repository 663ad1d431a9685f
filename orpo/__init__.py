"""ORPO (arXiv 2403.07691): a fused loss that never holds the full-vocabulary logits, and a thin trainer around it."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("fused-orpo")
except PackageNotFoundError:  # a source tree on sys.path, not installed
    __version__ = "0.0.0"

# Looked up on first use, so that importing the package brings in neither transformers nor triton.
_EXPORTS = {
    "FusedLinearORPOLoss": "orpo.loss",
    "ORPOConfig": "orpo.trainer.config",
    "ORPOOutput": "orpo.loss",
    "ORPOTrainer": "orpo.trainer.trainer",
    "SequenceLogprobs": "orpo.loss",
    "cpo_loss": "orpo.loss.preferences",
    "dpo_loss": "orpo.loss.preferences",
    "ipo_loss": "orpo.loss.preferences",
    "log_ratios": "orpo.loss.preferences",
    "odds_ratio_loss": "orpo.loss",
    "orpo_loss": "orpo.loss",
    "orpo_loss_from_rows": "orpo.loss",
    "sequence_logprobs": "orpo.loss",
    "sft_loss": "orpo.loss.preferences",
    "simpo_loss": "orpo.loss.preferences",
    "token_logprobs": "orpo.loss",
}

__all__ = [*_EXPORTS, "__version__"]

if TYPE_CHECKING:
    from orpo.loss import FusedLinearORPOLoss as FusedLinearORPOLoss
    from orpo.loss import ORPOOutput as ORPOOutput
    from orpo.loss import SequenceLogprobs as SequenceLogprobs
    from orpo.loss import odds_ratio_loss as odds_ratio_loss
    from orpo.loss import orpo_loss as orpo_loss
    from orpo.loss import orpo_loss_from_rows as orpo_loss_from_rows
    from orpo.loss import sequence_logprobs as sequence_logprobs
    from orpo.loss import token_logprobs as token_logprobs
    from orpo.loss.preferences import cpo_loss as cpo_loss
    from orpo.loss.preferences import dpo_loss as dpo_loss
    from orpo.loss.preferences import ipo_loss as ipo_loss
    from orpo.loss.preferences import log_ratios as log_ratios
    from orpo.loss.preferences import sft_loss as sft_loss
    from orpo.loss.preferences import simpo_loss as simpo_loss
    from orpo.trainer.config import ORPOConfig as ORPOConfig
    from orpo.trainer.trainer import ORPOTrainer as ORPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'orpo' has no attribute {name!r}")
    if _EXPORTS[name].startswith("orpo.trainer"):
        from orpo.packages import require_trainer

        require_trainer(f"orpo.{name}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
