"""Log-probabilities of tokens and of sequences without the full logits, on which other losses are built.

Letters: B sequences, T positions, D hidden size, V vocabulary, N rows; equations are numbered as in kernels/README.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from orpo_kernels.plan import choose_backend
from orpo_kernels.settings import LossSettings
from torch import Tensor

from orpo.loss.call import Names, autocast, check_head, check_integers, is_frozen, refuse_dtensor, wanted_gradients
from orpo.loss.own_part import own_part

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SequenceLogprobs(NamedTuple):
    """Log-probabilities of B sequences, in nats; `sums` and `means` are differentiable.

    Attributes:
        sums: (B,), over the tokens that count; float32, or float64 for float64 inputs.
        means: (B,), per token that counts; 0 for a sequence without any.
        lengths: (B,) int64, how many tokens count.
    """

    sums: Tensor
    means: Tensor
    lengths: Tensor


def sequence_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    logits_budget: int | None = None,
    strip_bytes: int | None = None,
    backend: str | None = None,
    tp_group: ProcessGroup | None = None,
) -> SequenceLogprobs:
    """Log-probability of each sequence's labels, differentiable, without the (B, T, V) logits.

    DPO, IPO, CPO, SimPO and SFT are a line each on top (`orpo.loss.preferences`).

    Args:
        hidden: (B, T, D), the decoder's last hidden states; of pairs, the chosen half first.
        weight: (V, D), the head's.
        labels: (B, T) int32 or int64, `ignore_index` where a token does not count; aligned with the input ids
            (position t predicts label t + 1) unless `shift=False`.
        bias: (V,) or None.
        ignore_index: the label of positions that do not count.
        shift: whether labels are aligned with the input ids, as in transformers.
        logit_scale, logit_softcap, logits_budget, strip_bytes, backend, tp_group: as in `token_logprobs`.

    Returns:
        SequenceLogprobs: sums (B,), means (B,), lengths (B,).

    Raises:
        ValueError: a shape, dtype, device, label or setting that does not fit; the message names the argument.
    """
    settings = {
        "bias": bias,
        "logit_scale": logit_scale,
        "logit_softcap": logit_softcap,
        "logits_budget": logits_budget,
        "strip_bytes": strip_bytes,
        "backend": backend,
        "tp_group": tp_group,
    }
    logps, counts = label_logprobs(hidden, weight, labels, ignore_index=ignore_index, shift=shift, **settings)
    sums, lengths = logps.sum(1), counts.sum(1)
    return SequenceLogprobs(sums, sums / lengths.clamp(min=1), lengths)


def label_logprobs(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, shift: bool = True, **settings: Any
) -> tuple[Tensor, Tensor]:
    """(log-probability of each label, 0 where none counts; which count), both of shape (B, T), or (B, T - 1) shifted.

    The arguments and errors are those of :func:`sequence_logprobs`.
    """
    refuse_dtensor("hidden", hidden, "pass to_local() of one that is replicated")
    if hidden.dim() != 3:
        raise ValueError(f"hidden has to have shape (sequences, positions, hidden size), got {tuple(hidden.shape)}")
    if labels.shape != hidden.shape[:2]:
        raise ValueError(f"labels of shape {tuple(labels.shape)} does not fit hidden of shape {tuple(hidden.shape)}")
    check_integers("labels", labels, hidden)
    if shift:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    counts = labels != ignore_index
    logp = token_logprobs(hidden[counts], weight, labels[counts], **settings)
    # Not index_add: on a GPU its sums differ from run to run.
    return logp.new_zeros(counts.shape).masked_scatter(counts, logp), counts


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    logits_budget: int | None = None,
    strip_bytes: int | None = None,
    backend: str | None = None,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Log-probability of each target token, differentiable, without the (N, V) logits (Eqs. 1-2).

    Equivalent to ``log_softmax(hidden @ weight.T + bias, -1).gather(-1, targets[:, None])[:, 0]``. Select the rows that
    count before the call: every row costs.

    Args:
        hidden: (N, D).
        weight: (V, D).
        targets: (N,) int32 or int64 in [0, V).
        logits_budget: most bytes of exponentials kept with Triton, as in `orpo_loss`. Default: 0, since every call that
            waits for its backward would keep its own; 1 GiB where weight and bias need no gradient, since nothing is
            kept then after the call. On a CPU none are kept.
        bias, logit_scale, logit_softcap, strip_bytes, backend: as in `orpo_loss`.
        tp_group: as in `orpo_loss`; upstream gradients have to be the same on all ranks, as those of a loss are that
            all of them compute.

    Returns:
        (N,) float32 (float64 for float64 inputs), in nats.

    Raises:
        ValueError: a shape, dtype, device or target that does not fit; the message names the argument.
    """
    from orpo_kernels.logprobs import linear_logprobs  # registers the operators

    hidden, weight, bias, group = own_part(hidden, weight, bias, tp_group, Names(weight="weight", bias="bias"))
    if hidden.dim() != 2:
        raise ValueError(f"hidden has to have shape (rows, hidden size), got {tuple(hidden.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets of shape {tuple(targets.shape)} does not fit hidden of shape {tuple(hidden.shape)}")
    settings = LossSettings(
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        logits_budget=logits_budget,
        strip_bytes=strip_bytes,
        backend=backend,
    )
    check_integers("targets", targets, hidden)
    check_head(hidden, weight, bias, Names(weight="weight", bias="bias"), group)
    head_frozen = is_frozen(weight, bias)
    hidden, weight, bias = autocast(hidden, weight, bias)
    logp, *_ = linear_logprobs(
        hidden,
        weight,
        bias,
        targets.long(),
        settings.numbers(),
        logits_budget=settings.logits_budget,
        strip_bytes=settings.strip_bytes,
        backend=choose_backend(settings.backend, hidden.device.type, hidden.dtype, weight.dtype),
        needs=[*wanted_gradients(hidden, weight, bias), head_frozen],
        group=group,
    )
    return logp
