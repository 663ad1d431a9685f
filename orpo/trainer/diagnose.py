"""Why a run is stable but flat: how hard each term of the loss pulls, and on how many pairs.

The gradient of the odds-ratio term of a pair carries the factor delta(d) = 1 / (1 + odds_chosen / odds_rejected) (Eq. 9
of the paper), which is 0.5 where the model has no preference and goes to 0 once it has: a pair is then *separated* and
no longer trains. A term whose gradient is far smaller than the other's does not steer the run; beta weighs them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# delta(d) is below 0.05 there: less than a tenth of the pull on a pair without a preference.
SEPARATED_LOG_ODDS = 3.0


def refuse_cut_gradients(cut_up: bool) -> None:
    """Raises a ValueError where the ranks hold parts of the gradients, whose norms would be those of parts."""
    if cut_up:
        raise ValueError("diagnose needs whole gradients, which FSDP and DeepSpeed cut up: use it on one GPU or DDP")


def pair_statistics(log_odds: Tensor, pair_mask: Tensor) -> dict[str, Tensor]:
    """Means over the pairs in `pair_mask` (P,) of delta(d) = sigmoid(-r) and of r > 3, from the log odds r (P,)."""
    count = pair_mask.sum().clamp(min=1)
    values = {"delta": torch.sigmoid(-log_odds), "separated": (log_odds > SEPARATED_LOG_ODDS).to(log_odds.dtype)}
    return {f"diagnose/{name}": torch.where(pair_mask, value, 0.0).sum() / count for name, value in values.items()}


def gradient_norms(model: nn.Module, loss_of: Callable[[float, float], Tensor]) -> dict[str, Tensor]:
    """Norm of the gradient of each weighted term, over all trained parameters; ``.grad`` is left alone.

    Args:
        model: whose parameters.
        loss_of: ``(share of the NLL, share of the odds-ratio term) -> loss``, a forward of its own each time.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    devices = {p.device.index for p in parameters if p.is_cuda}
    norms = {}
    for name, shares in (("nll", (1.0, 0.0)), ("odds_ratio", (0.0, 1.0))):
        # Dropout drawn here would change what the run itself draws next.
        with torch.random.fork_rng(devices=devices):
            gradients = torch.autograd.grad(loss_of(*shares), parameters, allow_unused=True)
        norms[f"diagnose/grad_norm_{name}"] = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
    return norms
