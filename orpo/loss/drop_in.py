"""Losses in the call shape of other libraries, so that changing an import is the whole migration."""

from __future__ import annotations

import torch
from orpo_kernels import reference
from orpo_kernels.matmul import mean_rows
from orpo_kernels.plan import choose_backend
from orpo_kernels.rows import rows_from_labels
from orpo_kernels.settings import LossSettings
from torch import Tensor

from orpo.loss.call import Names, check_labels, run_orpo

_NAMES = Names("_input", "lin_weight", "bias", "target")


class FusedLinearORPOLoss(torch.nn.Module):
    """The call shape of `liger_kernel.chunked_loss.LigerFusedLinearORPOLoss` around this project's loss.

    Differences, all of them where Liger's result is not usable: gradients are finite for certain answers and for pairs
    with an empty answer (left out of the odds-ratio mean, not divided by), evaluation computes no gradient, and
    log-probabilities come from float32 logits whatever the input's dtype.

    Args:
        ignore_index: label of the positions that do not count.
        beta: weight of the odds-ratio term.
        compute_nll_loss: whether the NLL is part of the loss; without it the returned NLL is 0.
        compiled: accepted and without effect: there is nothing for torch.compile to fuse.
        chunk_size: accepted and without effect: memory is bounded by bytes of logits, not by sequences.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.chunk_size = chunk_size

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and its parts.

        Args:
            lin_weight: (V, D).
            _input: (2P, T, D) hidden states, chosen half first.
            target: (2P, T) tokens that the hidden states predict: already shifted, unlike `orpo.orpo_loss`.
            bias: (V,) or None.
            nll_target: (2P, T) or (P, T), what the NLL scores; default `target`.

        Returns:
            (loss, (chosen_logps (P,), rejected_logps (P,), mean chosen logit, mean rejected logit, nll_loss,
            chosen_rewards (P,), rejected_rewards (P,), mean log sigmoid of the log odds, mean log odds)). Only the loss
            is differentiable. Mean logits are over all positions, padding included, as in Liger.

        Raises:
            ValueError: as `orpo.orpo_loss`.
        """
        check_labels(_input, target, nll_target, _NAMES)
        backend = choose_backend(None, _input.device.type, _input.dtype, lin_weight.dtype)
        rows = rows_from_labels(target, nll_target, self.ignore_index, shift=False, backend=backend)
        settings = LossSettings(beta=self.beta, nll_weight=float(self.compute_nll_loss))
        out = run_orpo(_input, lin_weight, bias, rows, settings, "target", _NAMES)
        metrics = out.metrics(logits=False)
        with torch.no_grad():
            halves = (half.flatten(0, 1) for half in _input.chunk(2))
            mean_hidden_2D = torch.stack([mean_rows(half, out.loss.dtype) for half in halves])
            # Not by a matmul, which autocast would narrow.
            mean_logit_2 = (mean_hidden_2D * mean_rows(lin_weight, out.loss.dtype)).sum(1)
            if bias is not None:
                mean_logit_2 += bias.mean(dtype=out.loss.dtype)
        return out.loss, (
            out.chosen_logps,
            out.rejected_logps,
            *mean_logit_2.unbind(),
            out.nll_loss if self.compute_nll_loss else torch.zeros_like(out.nll_loss),
            self.beta * out.chosen_logps,
            self.beta * out.rejected_logps,
            metrics["log_odds_ratio"],
            metrics["log_odds_chosen"],
        )


def odds_ratio_loss(
    chosen_logps: Tensor, rejected_logps: Tensor, beta: float = 0.1
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """TRL's `ORPOTrainer.odds_ratio_loss`: the odds-ratio term from mean log-probabilities (P,), finite at 0 too.

    Returns TRL's five: ``beta * log sigmoid(r)`` (P,), which is <= 0 and which TRL *subtracts* from the NLL; the chosen
    and rejected rewards ``beta * logps`` (P,), detached; the means of log sigmoid(r) and of r, scalars, detached.
    `ORPOOutput.odds_ratio_loss` is the positive ``mean softplus(-r)``. All are of the arguments' dtype, and computed in
    float32 where that is narrower.
    """
    dtype = torch.promote_types(chosen_logps.dtype, rejected_logps.dtype)
    # 1 - exp(a) has few digits in bfloat16, and `reference.Q_EPS` is 0 in float16.
    chosen_logps, rejected_logps = (
        logps.to(torch.promote_types(dtype, torch.float32)) for logps in (chosen_logps, rejected_logps)
    )
    log_odds = reference.log_odds_ratio(chosen_logps, rejected_logps)
    log_sigmoid = -reference.softplus(-log_odds)
    rewards = beta * chosen_logps.detach(), beta * rejected_logps.detach()
    results = beta * log_sigmoid, *rewards, log_sigmoid.detach().mean(), log_odds.detach().mean()
    return tuple(result.to(dtype) for result in results)
