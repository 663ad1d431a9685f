"""ORPO as others compute it, each in its own way and with its default settings, behind one call.

A peer is a function ``(batch, beta) -> loss``. TRL's definition throughout: NLL over prompt and chosen answer.
`PARTS` holds the functions behind them, which return the mean log-probability of each of the 2P answers as well.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo import odds_ratio_loss, orpo_loss

from .cases import Batch

Peer = Callable[[Batch, float], Tensor]
Parts = Callable[[Batch, float], tuple[Tensor, Tensor]]


def _from_token_logps(logp: Tensor, batch: Batch, beta: float) -> tuple[Tensor, Tensor]:
    """The objective over (2P, T - 1) log-probabilities of the next token, and their mean over each answer."""
    P = batch.labels.shape[0] // 2
    mask = batch.labels[:, 1:] != -100
    mean = (logp * mask).sum(1) / mask.sum(1)
    nll_mask = batch.nll_labels[:P, 1:] != -100
    nll = -(logp[:P] * nll_mask).sum() / nll_mask.sum()
    return nll - odds_ratio_loss(mean[:P], mean[P:], beta)[0].mean(), mean


def ours(batch: Batch, beta: float) -> tuple[Tensor, Tensor]:
    """This project's loss with its defaults."""
    return _ours(batch, beta)


def ours_by_strips(batch: Batch, beta: float) -> tuple[Tensor, Tensor]:
    """This project's loss with the least memory: `logits_budget=0`."""
    return _ours(batch, beta, logits_budget=0)


def _ours(batch: Batch, beta: float, **keywords: int) -> tuple[Tensor, Tensor]:
    out = orpo_loss(batch.hidden, batch.weight, batch.labels, nll_labels=batch.nll_labels, beta=beta, **keywords)
    return out.loss, torch.cat([out.chosen_logps, out.rejected_logps])


def eager(batch: Batch, beta: float) -> tuple[Tensor, Tensor]:
    """Full logits and log_softmax, as one would write it."""
    logits = (batch.hidden[:, :-1] @ batch.weight.T).float()
    logp = torch.log_softmax(logits, -1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    return _from_token_logps(logp, batch, beta)


def eager_compiled(batch: Batch, beta: float) -> tuple[Tensor, Tensor]:
    """The same through torch.compile."""
    return _compiled_eager()(batch.hidden, batch.weight, batch.input_ids, batch.labels, batch.nll_labels, beta)


@functools.cache
def _compiled_eager() -> Callable:
    def function(hidden, weight, input_ids, labels, nll_labels, beta):
        return eager(Batch(hidden, weight, input_ids, labels, nll_labels), beta)

    return torch.compile(function)


def trl(batch: Batch, beta: float) -> tuple[Tensor, Tensor]:
    """TRL's ORPOTrainer: the steps of its concatenated_forward and get_batch_loss_metrics, with TRL's own functions.

    In bfloat16 this is a model whose weights are bfloat16. Under mixed precision accelerate hands TRL a float32 copy of
    the logits, which is more exact and larger; that is what the training benchmark measures.
    """
    from trl.experimental.orpo import ORPOTrainer

    P = batch.labels.shape[0] // 2
    logits = batch.hidden @ batch.weight.T
    nll = F.cross_entropy(logits[:P, :-1].reshape(-1, logits.shape[-1]), batch.nll_labels[:P, 1:].reshape(-1))
    mean = ORPOTrainer.get_batch_logps(logits, batch.labels, average_log_prob=True)

    class Trainer:
        beta = 0.0
        accelerator = type("Accelerator", (), {"device": batch.hidden.device})

    trainer = Trainer()
    trainer.beta = beta
    return nll - ORPOTrainer.odds_ratio_loss(trainer, mean[:P], mean[P:])[0].mean(), mean


def liger(batch: Batch, beta: float, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """Liger's fused ORPO; targets are shifted by the caller there."""
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    def shifted(ids: Tensor) -> Tensor:
        return F.pad(ids[:, 1:], (0, 1), value=-100)

    loss = LigerFusedLinearORPOLoss(beta=beta, compiled=compiled)
    value, parts = loss(batch.weight, batch.hidden, shifted(batch.labels), None, shifted(batch.nll_labels))
    return value, torch.cat(parts[:2])


def liger_compiled(batch: Batch, beta: float) -> tuple[Tensor, Tensor]:
    """Liger's fused ORPO through torch.compile, its default."""
    return liger(batch, beta, compiled=True)


def cce(batch: Batch, beta: float) -> tuple[Tensor, Tensor]:
    """Apple's cut cross-entropy, whose per-token output is minus the log-probability; the odds ratio on top.

    It leaves out ignored targets, so it is given none that does not count. On a CPU its only form is a compiled one
    that holds the logits of all rows that count; its Triton kernel, which does not, needs a GPU.
    """
    from cut_cross_entropy import linear_cross_entropy

    implementation = "cce" if batch.hidden.is_cuda else "torch_compile"
    targets = batch.scored[:, 1:].contiguous()
    hidden = batch.hidden[:, :-1].contiguous()
    loss = linear_cross_entropy(hidden, batch.weight, targets, reduction="none", impl=implementation)
    return _from_token_logps(-loss.float(), batch, beta)


def _scored_rows(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Where a row counts (2P, T - 1), its hidden states and its targets: the compaction that a careful user writes."""
    targets = batch.scored[:, 1:]
    keep = targets != -100
    return keep, batch.hidden[:, :-1][keep], targets[keep]


def _back_in_place(logp: Tensor, keep: Tensor) -> Tensor:
    return torch.zeros(keep.shape, dtype=logp.dtype, device=logp.device).masked_scatter(keep, logp)


def torch_linear_cross_entropy(batch: Batch, beta: float, chunked: bool = False) -> tuple[Tensor, Tensor]:
    """torch's own linear cross-entropy on the rows that count, the odds ratio on top; its default holds all logits."""
    keep, hidden, targets = _scored_rows(batch)
    options = {"options": torch.nn.LinearCrossEntropyOptions()} if chunked else {}
    loss = F.linear_cross_entropy(hidden, batch.weight, targets, reduction="none", **options)
    return _from_token_logps(_back_in_place(-loss.float(), keep), batch, beta)


def torch_linear_cross_entropy_chunked(batch: Batch, beta: float) -> tuple[Tensor, Tensor]:
    """The same in chunks of rows as torch chooses them, whose logits backward computes again."""
    return torch_linear_cross_entropy(batch, beta, chunked=True)


def trl_chunked(batch: Batch, beta: float) -> tuple[Tensor, Tensor]:
    """TRL's chunked log-probabilities, which its DPO uses and its ORPO does not, with the odds ratio on top."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    keep, hidden, targets = _scored_rows(batch)
    logp = ChunkedLogProbFunction.apply(hidden, batch.weight, None, targets, 1.0, 32768, None, 1.0, ())[0]
    return _from_token_logps(_back_in_place(logp, keep), batch, beta)


_NEEDS = {
    "trl": "trl",
    "trl chunked": "trl",
    "liger": "liger_kernel",
    "liger compiled": "liger_kernel",
    "cce": "cut_cross_entropy",
}

PARTS: dict[str, Parts] = {
    "ours": ours,
    "ours (strips)": ours_by_strips,
    "trl": trl,
    "trl chunked": trl_chunked,
    "liger": liger,
    "liger compiled": liger_compiled,
    "cce": cce,
    "torch linear_cross_entropy": torch_linear_cross_entropy,
    "torch linear_cross_entropy (chunked)": torch_linear_cross_entropy_chunked,
    "torch eager": eager,
    "torch compiled": eager_compiled,
}


def _loss_of(parts: Parts) -> Peer:
    return lambda batch, beta: parts(batch, beta)[0]


PEERS: dict[str, Peer] = {name: _loss_of(parts) for name, parts in PARTS.items()}
# Of the names of ours with a budget of its own.
BUDGET = "ours, budget "


def ours_within(budget: int) -> Peer:
    """This project's loss with `budget` bytes kept between the logits and their gradient."""
    return _loss_of(lambda batch, beta: _ours(batch, beta, logits_budget=budget))


def available(name: str) -> bool:
    """Whether the peer's package, and the function it needs, are here."""
    if name == "torch linear_cross_entropy":
        return hasattr(F, "linear_cross_entropy")
    if name == "torch linear_cross_entropy (chunked)":
        return hasattr(torch.nn, "LinearCrossEntropyOptions")
    return name not in _NEEDS or importlib.util.find_spec(_NEEDS[name]) is not None
