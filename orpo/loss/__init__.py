"""ORPO in one import: the loss (arXiv 2403.07691, Eq. 6) from hidden states and the head's weight, never full logits.

Letters: P pairs, T positions, D hidden size, V vocabulary, N rows; equations are numbered as in kernels/README.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orpo_kernels.plan import choose_backend
from orpo_kernels.rows import Rows, rows_from_labels
from orpo_kernels.settings import LossSettings
from torch import Tensor

from orpo.loss.call import Names, ORPOOutput, check_labels, check_row_arrays, run_orpo
from orpo.loss.drop_in import FusedLinearORPOLoss, odds_ratio_loss
from orpo.loss.logprobs import SequenceLogprobs, sequence_logprobs, token_logprobs
from orpo.loss.own_part import name_of, own_part

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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
    tp_group: ProcessGroup | None = None,
    cp_group: ProcessGroup | None = None,
) -> ORPOOutput:
    """The ORPO loss of a padded batch of pairs, with its gradients, without the (2P, T, V) logits.

    Equivalent to, in three lines of torch (Eqs. 1-5):

        logp = log_softmax(logit_scale * (hidden @ lm_head_weight.T + lm_head_bias), -1)      # of the labels
        a = mean of logp over each answer;  r = logit(exp(a_chosen)) - logit(exp(a_rejected))
        loss = nll_weight * -mean(logp[chosen]) + beta * softplus(-r).mean()

    Args:
        hidden: (2P, T, D), the decoder's last hidden states, the P chosen sequences first, then the P rejected ones.
        lm_head_weight: (V, D), with `tp_group` (V_r, D). Its dtype may differ from that of `hidden`; autocast applies
            as it would to a Linear.
        labels: (2P, T) int32 or int64, the response tokens, `ignore_index` on prompt and padding; aligned with the
            input ids (position t predicts label t + 1) unless `shift=False`.
        nll_labels: (P, T), or (2P, T) with the rejected half ignored: the tokens that the NLL scores. Default:
            `labels`, the chosen response. TRL's NLL scores the prompt too: pass the input ids with padding ignored.
        lm_head_bias: (V,), with `tp_group` (V_r,), or None.
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
        tp_group: process group over whose ranks the head is cut: rank r has the next V_r rows of weight and bias after
            those of the ranks before it, and all ranks the same hidden states and labels (tokens of the whole
            vocabulary). Loss, metrics and the gradient of `hidden` are then the same numbers on all of them, that of
            the head is of its own rows. Two reductions of a few floats a row forward, one of the hidden states'
            gradient backward. `logits_budget` then counts for Triton alone, where a frozen head's exponentials are kept
            for all rows or not at all; on a CPU all goes by strips. Default: None, the whole head is here, or the group
            of a DTensor's mesh: of a weight (and bias) with ``Shard(0)`` over a mesh of one dimension.
        cp_group: process group over whose ranks the sequences are cut (context parallel, Ulysses, ring attention):
            `hidden` and `labels` have this rank's positions of all 2P sequences, whichever and however many, and
            `shift=False`: labels are shifted before they are cut (transformers' `shift_labels`). Loss, metrics and
            default denominators are then those of the whole sequences, the same numbers on all ranks. The gradient of
            `hidden` is that of this rank's positions, and of the head it is the part that comes from them: the ranks'
            parts add up to the whole, so where DDP or FSDP averages over the ranks of `cp_group`, multiply the loss by
            their number. One reduction of eight floats a pair and one of two hidden states forward, none backward; on
            a CPU all goes by strips. Beside `tp_group` the two are dimensions of a mesh.

    Returns:
        ORPOOutput; `loss` is differentiable by hidden, lm_head_weight and lm_head_bias, once.

    Raises:
        ValueError: a shape, dtype, device, label or setting that does not fit; the message names the argument. With
            `tp_group`, on all its ranks: they have different rows, or one has no part of the head. With `cp_group`:
            `shift` is True, and on all its ranks: one has a token outside the vocabulary, or other pairs.
    """
    hidden, weight, bias, group = own_part(hidden, lm_head_weight, lm_head_bias, tp_group, Names())
    sequence_group = name_of(cp_group, "cp")
    if sequence_group and shift:
        raise ValueError(
            "shift is True, and with cp_group the token after a slice's last position lies on another rank: shift the "
            "whole sequences' labels before they are cut, F.pad(labels, (0, 1), value=ignore_index)[:, 1:], nll_labels "
            "as well, and pass shift=False"
        )
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
    backend = choose_backend(backend, hidden.device.type, hidden.dtype, weight.dtype)
    rows = rows_from_labels(labels, nll_labels, ignore_index, shift, backend)
    return run_orpo(hidden, weight, bias, rows, settings, "labels", group=group, sequence_group=sequence_group)


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
    tp_group: ProcessGroup | None = None,
    cp_group: ProcessGroup | None = None,
) -> ORPOOutput:
    """`orpo_loss` for any batch layout (padded, packed, prefix-shared), described by the five arrays of `Rows`.

    Args:
        hidden: (..., D); row n reads ``hidden.reshape(-1, D)[rows.rows_N[n]]``.
        lm_head_weight: (V, D).
        rows: the rows that count, each with at least one mask set, sorted by sequence. A collator makes them, so that
            nothing has to be read back from the device.

    The other arguments, the result and the errors are those of `orpo_loss`.
    """
    hidden, weight, bias, group = own_part(hidden, lm_head_weight, lm_head_bias, tp_group, Names())
    sequence_group = name_of(cp_group, "cp")
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
    return run_orpo(hidden, weight, bias, rows, settings, "rows", group=group, sequence_group=sequence_group)
