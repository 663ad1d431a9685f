"""ORPO in one import: the loss (arXiv 2403.07691, Eq. 6) from hidden states and the head's weight, never full logits.

Letters: P pairs, T positions, D hidden size, V vocabulary, N rows; equations are numbered as in kernels/README.md.
"""

from __future__ import annotations

from orpo_kernels.rows import Rows, rows_from_labels
from orpo_kernels.settings import LossSettings
from torch import Tensor

from orpo.loss.call import ORPOOutput, check_labels, check_row_arrays, run_orpo
from orpo.loss.drop_in import FusedLinearORPOLoss, odds_ratio_loss
from orpo.loss.logprobs import SequenceLogprobs, sequence_logprobs, token_logprobs

__all__ = [
    "FusedLinearORPOLoss",
    "ORPOOutput",
    "SequenceLogprobs",
    "odds_ratio_loss",
    "orpo_loss",
    "orpo_loss_from_rows",
    "sequence_logprobs",
    "token_logprobs",
]


def orpo_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    *,
    nll_labels: Tensor | None = None,
    lm_head_bias: Tensor | None = None,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    ignore_index: int = -100,
    shift: bool = True,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    num_nll_tokens: float | None = None,
    num_pairs: float | None = None,
    logits_budget: int | None = None,
    strip_bytes: int | None = None,
    backend: str | None = None,
) -> ORPOOutput:
    """The ORPO loss of a padded batch of pairs, with its gradients, without the (2P, T, V) logits.

    Equivalent to, in three lines of torch (Eqs. 1-5):

        logp = log_softmax(logit_scale * (hidden @ lm_head_weight.T + lm_head_bias), -1)      # of the labels
        a = mean of logp over each answer;  r = logit(exp(a_chosen)) - logit(exp(a_rejected))
        loss = nll_weight * -mean(logp[chosen]) + beta * softplus(-r).mean()

    Args:
        hidden: (2P, T, D), the decoder's last hidden states, the P chosen sequences first, then the P rejected ones.
        lm_head_weight: (V, D). Its dtype may differ from that of `hidden`; autocast applies as it would to a Linear.
        labels: (2P, T) int32 or int64, the response tokens, `ignore_index` on prompt and padding; aligned with the
            input ids (position t predicts label t + 1) unless `shift=False`.
        nll_labels: (P, T), or (2P, T) with the rejected half ignored: the tokens that the NLL scores. Default:
            `labels`, the chosen response. TRL's NLL scores the prompt too: pass the input ids with padding ignored.
        lm_head_bias: (V,) or None.
        beta: weight of the odds-ratio term (the paper's lambda), >= 0.
        nll_weight: weight of the NLL term.
        ignore_index: the label of positions that do not count.
        shift: whether labels are aligned with the input ids, as in transformers.
        logit_scale: factor on the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
        logit_softcap: c of c * tanh(logits / c) (Gemma 2), or None.
        num_nll_tokens: denominator of the NLL's mean. Default: this call's number of tokens. With the count over all
            micro-batches and ranks, accumulated gradients equal those of the large batch.
        num_pairs: the same for the mean over pairs.
        logits_budget: most bytes kept between the logits and their gradient: tiles of logits on CPU, exponentials in
            the operands' dtype with Triton. 0 keeps none, and backward computes all logits again, strip by strip (8 N V
            D FLOPs instead of 6; with Triton in between where the budget holds a part). For a head that needs no
            gradient every logit is computed once (4 N V D), with Triton where the budget holds all or 1024 rows.
            Default: 1 GiB with Triton; 512 MiB on CPU, and there 0 for a head that needs no gradient. On CPU a float32
            head keeps about 1024 rows, or one pair, at a time, since more take no less time; a pair larger than the
            budget goes by strips. The loss differs between budgets by rounding.
        strip_bytes: size of one vocabulary strip of recomputed logits. Default: 128 MiB on accelerators, 32 MiB on CPU,
            where a wider one is no faster.
        backend: "triton", "torch", or None: torch for CPU tensors, for float64 and without triton; else Triton.

    Returns:
        ORPOOutput; `loss` is differentiable by hidden, lm_head_weight and lm_head_bias, once.

    Raises:
        ValueError: a shape, dtype, device, label or setting that does not fit; the message names the argument.
    """
    check_labels(hidden, labels, nll_labels)
    settings = LossSettings(
        beta=beta,
        nll_weight=nll_weight,
        num_nll_tokens=num_nll_tokens,
        num_pairs=num_pairs,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        logits_budget=logits_budget,
        strip_bytes=strip_bytes,
        backend=backend,
    )
    rows = rows_from_labels(labels, nll_labels, ignore_index, shift)
    return run_orpo(hidden, lm_head_weight, lm_head_bias, rows, settings, "labels")


def orpo_loss_from_rows(
    hidden: Tensor,
    lm_head_weight: Tensor,
    rows: Rows,
    *,
    lm_head_bias: Tensor | None = None,
    beta: float = 0.1,
    nll_weight: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    num_nll_tokens: float | None = None,
    num_pairs: float | None = None,
    logits_budget: int | None = None,
    strip_bytes: int | None = None,
    backend: str | None = None,
) -> ORPOOutput:
    """`orpo_loss` for any batch layout (padded, packed, prefix-shared), described by the five arrays of `Rows`.

    Args:
        hidden: (..., D); row n reads ``hidden.reshape(-1, D)[rows.rows_N[n]]``.
        lm_head_weight: (V, D).
        rows: the rows that count, each with at least one mask set, sorted by sequence. A collator makes them, so that
            nothing has to be read back from the device.

    The other arguments, the result and the errors are those of `orpo_loss`.
    """
    check_row_arrays(rows, hidden)
    settings = LossSettings(
        beta=beta,
        nll_weight=nll_weight,
        num_nll_tokens=num_nll_tokens,
        num_pairs=num_pairs,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        logits_budget=logits_budget,
        strip_bytes=strip_bytes,
        backend=backend,
    )
    return run_orpo(hidden, lm_head_weight, lm_head_bias, rows, settings, "rows")
