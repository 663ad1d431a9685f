"""SFT, ORPO, DPO and ORPO with a probability ratio, as losses over one model, one batch and one fused primitive.

Letters: P pairs, S = 2P sequences (chosen first, then rejected), N rows that count, D hidden size, V vocabulary.
The equations are those of the paper (arXiv 2403.07691).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from orpo_kernels.rows import Rows
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from orpo import orpo_loss_from_rows, token_logprobs
from orpo.layouts.layout import PaddedLayout, SharedLayout
from orpo.layouts.prefix_mask import SharedPrefixMask
from orpo.model.head import head_weight

METHODS = ("sft", "orpo", "dpo", "probability_ratio")


class Scores(NamedTuple):
    """Log-probabilities of a batch: ``logp_N`` of every kept row; ``sum_S`` and ``mean_S`` of each answer."""

    logp_N: Tensor
    sum_S: Tensor
    mean_S: Tensor


def layout_of(method: str, pad_token_id: int) -> Callable[[list], dict[str, Any]]:
    """How a batch of `method` lies in memory: SFT reads chosen sequences alone, the others prompts once per pair."""
    return _chosen_half(PaddedLayout(pad_token_id)) if method == "sft" else SharedLayout(pad_token_id)


def _chosen_half(layout: PaddedLayout) -> Callable[[list], dict[str, Any]]:
    def collate(examples: list) -> dict[str, Any]:
        batch, pairs = layout(examples), len(examples)
        rows, width = batch["orpo"].rows, batch["input_ids"].shape[1]
        # Padding stands behind a row's tokens, and the width may be that of a longer rejected answer.
        longest = int(batch["attention_mask"][:pairs].sum(1).max())
        kept = rows.sequence_N < pairs
        place_N = rows.rows_N // width * longest + rows.rows_N % width
        arrays = (place_N, rows.targets_N, rows.sequence_N, rows.in_response_N, rows.in_nll_N)
        return {
            "input_ids": batch["input_ids"][:pairs, :longest],
            "attention_mask": batch["attention_mask"][:pairs, :longest],
            "orpo": replace(batch["orpo"], rows=Rows(*(a[kept] for a in arrays), pairs=pairs), num_pairs=0),
        }

    return collate


def hidden_states(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """(B, T, D): the one forward pass of the decoder that a batch costs."""
    inputs = {name: value for name, value in batch.items() if name != "orpo"}
    mask = inputs["attention_mask"]
    if isinstance(mask, SharedPrefixMask):
        inputs["attention_mask"] = mask.for_model(model)
    return model.base_model(**inputs, use_cache=False).last_hidden_state


def scores(model: nn.Module, batch: dict[str, Any]) -> Scores:
    """Log-probabilities of the batch's tokens and answers through :func:`orpo.token_logprobs`."""
    rows = batch["orpo"].rows
    hidden = hidden_states(model, batch)
    weight, bias = head_weight(model.get_output_embeddings())
    logp_N = token_logprobs(hidden.reshape(-1, hidden.shape[-1])[rows.rows_N], weight, rows.targets_N, bias=bias)
    response_N = rows.in_response_N.to(logp_N.dtype)
    zeros_S = logp_N.new_zeros(2 * rows.pairs)
    sum_S = zeros_S.index_add(0, rows.sequence_N, logp_N * response_N)
    return Scores(logp_N, sum_S, sum_S / zeros_S.index_add(0, rows.sequence_N, response_N).clamp(min=1))


def probability_ratio_loss(mean_w: Tensor, mean_l: Tensor) -> Tensor:
    """Eq. 7 with Eq. 16 in the place of the odds ratio, of mean log-probabilities (P,): a mean over the pairs."""
    return -logsigmoid(mean_w - mean_l).mean()


def loss_of(
    method: str, model: nn.Module, batch: dict[str, Any], beta: float, reference_S: Tensor | None = None
) -> Tensor:
    """The training loss of one batch.

    =================  =====================================================================================
    sft                Eq. 2: mean NLL of the chosen sequences (prompt and answer, as ORPO's own first term)
    orpo               Eqs. 6-7, from the fused loss
    probability_ratio  Eq. 6 with the odds of Eq. 7 replaced by the probabilities of Eq. 16
    dpo                -log sigmoid(beta (log-ratio of chosen - log-ratio of rejected)), sums over tokens
    =================  =====================================================================================

    Args:
        batch: of :func:`layout_of`.
        beta: lambda of ORPO and of the probability ratio, beta of DPO; SFT has none.
        reference_S: (2P,) the reference model's sums, for DPO.
    """
    rows = batch["orpo"].rows
    if method == "orpo":
        weight, bias = head_weight(model.get_output_embeddings())
        hidden = hidden_states(model, batch)
        return orpo_loss_from_rows(hidden, weight, rows, lm_head_bias=bias, beta=beta).loss
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it has to be one of {', '.join(METHODS)}")
    found = scores(model, batch)
    if method == "dpo":
        if reference_S is None:
            raise ValueError("dpo needs reference_S, the sums of the reference model, got None")
        gain_w, gain_l = (found.sum_S - reference_S).split(rows.pairs)
        return -logsigmoid(beta * (gain_w - gain_l)).mean()
    nll = -(found.logp_N * rows.in_nll_N).sum() / batch["orpo"].num_nll_tokens
    if method == "sft":
        return nll
    return nll + beta * probability_ratio_loss(*found.mean_S.split(rows.pairs))


@torch.no_grad()
def reference_sums(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """(2P,): what DPO's frozen model says of both answers, at the cost of a second forward pass."""
    return scores(model, batch).sum_S


@torch.no_grad()
def check_head(model: nn.Module, batch: dict[str, Any]) -> None:
    """Refuses a model whose own logits say something else than the decoder's states times the head's weight.

    Raises:
        ValueError: with the largest difference in nats.
    """
    rows = batch["orpo"].rows
    inputs = {name: value for name, value in batch.items() if name != "orpo"}
    inputs["attention_mask"] = inputs["attention_mask"].for_model(model)
    logits = model(**inputs, use_cache=False).logits
    logits_NV = logits.reshape(-1, logits.shape[-1])[rows.rows_N].float()
    own_N = logits_NV.log_softmax(-1).gather(1, rows.targets_N[:, None])[:, 0]
    difference = (own_N - scores(model, batch).logp_N).abs().max().item()
    if not difference < 1e-2:
        raise ValueError(f"the fused log-probabilities are {difference:.2g} nats off the model's own; limit 0.01")
