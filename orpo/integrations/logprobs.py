"""Log-probabilities as a call of a model's head, for trainers that compute their own losses from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from orpo_kernels.head import strips
from orpo_kernels.matmul import accumulation_dtype, mean_rows
from orpo_kernels.plan import LOGITS_BUDGET
from torch import Tensor

from orpo.loss.logprobs import label_logprobs
from orpo.model.attach import LogitTransform

# Strips of logits of which only the mean is wanted have this size.
_STRIP_BYTES = 128 * 2**20


@dataclass(frozen=True)
class LogprobCall:
    """The argument of ``model(..., orpo=)`` that asks for log-probabilities, not for a loss.

    The model returns a dict: ``logps`` (B, T - 1), of the label at the next position, 0 where it is -100;
    ``mean_logits`` (2,), for each half of the batch over all positions, detached; ``aux_loss``, the router's, or None.

    Attributes:
        labels: (B, T), aligned with the input ids, -100 where a token does not count.
        keeps_last: whether the mean logits include each sequence's last position.
        bias: (V,), what the model adds to its head's logits.
    """

    labels: Tensor
    keeps_last: bool = True
    bias: Tensor | None = None
    output: ClassVar[type] = dict

    def of_head(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> dict[str, Any]:
        """What the head returns for these hidden states."""
        logps, _ = label_logprobs(
            hidden,
            weight,
            self.labels,
            bias=bias,
            logit_scale=transform.scale,
            logit_softcap=transform.softcap,
            # One call a step: the next one finds freed what this one keeps.
            logits_budget=LOGITS_BUDGET,
        )
        positions = hidden if self.keeps_last else hidden[:, :-1]
        with torch.no_grad():
            halves = [_mean_logit(half.flatten(0, 1), weight, bias, transform) for half in positions.chunk(2)]
        return {"logps": logps, "mean_logits": torch.stack(halves)}


def _mean_logit(x_ND: Tensor, weight: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    dtype = accumulation_dtype(x_ND, weight)
    if transform.softcap is None:
        # mean(x W^T + b) = mean(x) . mean(W) + mean(b); not by a matmul, which autocast would narrow.
        mean = (mean_rows(x_ND, dtype) * mean_rows(weight, dtype)).sum()
        return transform.scale * (mean if bias is None else mean + bias.mean(dtype=dtype))
    total = x_ND.new_zeros((), dtype=dtype)
    for first, last in strips(len(x_ND), max(1, _STRIP_BYTES // (4 * len(weight)))):
        logits = transform.scale * torch.nn.functional.linear(x_ND[first:last].to(weight.dtype), weight, bias)
        total += torch.tanh(logits / transform.softcap).sum(dtype=dtype)
    return transform.softcap * total / (len(x_ND) * len(weight))
