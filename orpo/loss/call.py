"""Shared by the public functions of orpo.loss: checks of arguments, the call of the operator, its result.

Letters: P pairs, T positions, D hidden size, V vocabulary, N rows; equations are numbered as in kernels/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from orpo_kernels import reference
from orpo_kernels.head import Head
from orpo_kernels.matmul import mean_rows
from orpo_kernels.plan import choose_backend
from orpo_kernels.rows import Rows, check_bounds, without_others
from orpo_kernels.settings import LossSettings
from orpo_kernels.shard import Shard
from torch import Tensor
from torch.autograd import forward_ad

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class ORPOOutput:
    """The loss and its parts; only `loss` is differentiable. With `cp_group` all of it is of the whole sequences.

    Attributes:
        loss: scalar, nll_weight * nll_loss + beta * odds_ratio_loss (Eq. 5); float32, or float64 for float64 inputs.
        nll_loss: scalar, mean negative log-likelihood in nats per token.
        odds_ratio_loss: scalar, mean over pairs of softplus(-log_odds) >= 0, without beta.
        chosen_logps: (P,), mean log-probability per token of each chosen answer; 0 for an empty answer.
        rejected_logps: (P,), the same of each rejected answer.
        log_odds: (P,), log odds ratio r of chosen over rejected (Eq. 4); 0 for a pair with an empty answer.
        pair_mask: bool (P,), False for a pair with an empty answer, which no mean over pairs counts.
    """

    loss: Tensor
    nll_loss: Tensor
    odds_ratio_loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    log_odds: Tensor
    pair_mask: Tensor
    beta: float
    _mean_hidden: Tensor = field(repr=False)
    _head: Head = field(repr=False)

    def metrics(self, logits: bool = True) -> dict[str, Tensor]:
        """TRL's names and definitions, as detached 0-dim tensors; nothing is copied to the host.

        Means are over the pairs with two answers. `log_odds_ratio` is the mean of log sigmoid(r) <= 0, as in TRL.
        `logits/*` is the mean over the vocabulary and the scored rows, by the identity mean(x W^T + b) = mean(x) .
        mean(W) + mean(b); it reads the weight once, so `logits=False` saves that, and it is absent with a softcap. Of a
        head that is cut over ranks it is a call of all of them.
        """
        chosen, rejected = self.beta * self.chosen_logps, self.beta * self.rejected_logps
        count = self.pair_mask.sum().clamp(min=1)

        def mean(values_P: Tensor) -> Tensor:
            return torch.where(self.pair_mask, values_P.to(self.chosen_logps.dtype), 0.0).sum() / count

        metrics = {
            "rewards/chosen": mean(chosen),
            "rewards/rejected": mean(rejected),
            # Of rewards, which beta 0 makes equal, none would be larger.
            "rewards/accuracies": mean(self.chosen_logps > self.rejected_logps),
            "rewards/margins": mean(chosen - rejected),
            "logps/chosen": mean(self.chosen_logps),
            "logps/rejected": mean(self.rejected_logps),
            "nll_loss": self.nll_loss,
            "log_odds_ratio": mean(-reference.softplus(-self.log_odds)),
            "log_odds_chosen": mean(self.log_odds),
        }
        head = self._head
        if logits and head.softcap is None:
            # Not by a matmul, which autocast would narrow.
            mean_2 = (self._mean_hidden * mean_rows(head.weight_VD.detach(), self._mean_hidden.dtype)).sum(1)
            if head.bias_V is not None:
                mean_2 = mean_2 + head.bias_V.detach().mean(dtype=mean_2.dtype)
            columns = head.weight_VD.shape[0]
            # 1 where all columns are here.
            share = columns / head.shard.sum_(mean_2.new_full((), columns))
            mean_2 = head.shard.sum_(share * mean_2)
            metrics["logits/chosen"], metrics["logits/rejected"] = (head.scale * mean_2).unbind()
        return metrics


@dataclass(frozen=True)
class Names:
    """What a caller calls the arguments."""

    hidden: str = "hidden"
    weight: str = "lm_head_weight"
    bias: str = "lm_head_bias"
    labels: str = "labels"


def run_orpo(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    settings: LossSettings,
    source: str,
    names: Names = Names(),
    group: str = "",
    sequence_group: str = "",
) -> ORPOOutput:
    """The loss of `rows`, which come from the argument `source` (`orpo_kernels.rows.check_rows`).

    `group` names the ranks that have the other rows of the head, `sequence_group` those that have the other positions
    of the sequences (`own_part`).
    """
    from orpo_kernels import eager  # registers the operators

    check_head(hidden, weight, bias, names, group)
    # Asked before autocast: under no_grad its copy of a trained head needs no gradient, and evaluation would compute
    # otherwise than training.
    head_frozen = is_frozen(weight, bias)
    hidden, weight, bias = autocast(hidden, weight, bias)
    hidden_RD = hidden.reshape(-1, hidden.shape[-1])
    if rows.bounds is not None and not group and not sequence_group:
        # The host knows already what the device would be asked. Of a group the whole vocabulary is asked for, or the
        # other ranks have to hear of it.
        check_bounds(rows, weight.shape[0], source)
        source = "checked"
    out = eager.linear_orpo(
        hidden_RD if rows.all_count else without_others(hidden_RD, rows),
        weight,
        bias,
        rows,
        settings.numbers(),
        source,
        dict(
            logits_budget=settings.logits_budget,
            strip_bytes=settings.strip_bytes,
            backend=choose_backend(settings.backend, hidden.device.type, hidden.dtype, weight.dtype),
            needs=[*wanted_gradients(hidden, weight, bias), head_frozen],
            group=group,
            sequence_group=sequence_group,
        ),
    )
    return ORPOOutput(
        loss=out.loss,
        nll_loss=out.nll_loss.detach(),
        odds_ratio_loss=out.odds_ratio_loss.detach(),
        chosen_logps=out.mean_logp_S[: rows.pairs].detach(),
        rejected_logps=out.mean_logp_S[rows.pairs :].detach(),
        log_odds=out.log_odds_P.detach(),
        pair_mask=out.pair_mask_P,
        beta=settings.beta,
        _mean_hidden=out.mean_hidden_2D.detach(),
        _head=Head(weight, bias, settings.logit_scale, settings.logit_softcap, Shard(group)),
    )


def check_row_arrays(rows: Rows, hidden: Tensor) -> None:
    """Refuse arrays of a caller's `Rows` that do not fit one another, or live elsewhere than the hidden states."""
    # Not by a set of shapes: torch.compile would make a graph for each number of rows.
    if rows.rows_N.dim() != 1 or any(array.shape != rows.rows_N.shape for array in rows.arrays):
        raise ValueError(f"rows holds arrays of different shapes: {[tuple(array.shape) for array in rows.arrays]}")
    if rows.pairs < 1:
        raise ValueError(f"rows.pairs has to be at least 1, got {rows.pairs}")
    names = "rows_N", "targets_N", "sequence_N", "in_response_N", "in_nll_N"
    for name, array, dtype in zip(names, rows.arrays, (torch.int64,) * 3 + (torch.bool,) * 2, strict=True):
        if array.dtype != dtype:
            raise ValueError(f"rows.{name} has to be {dtype}, got {array.dtype}")
        check_device(f"rows.{name}", array, hidden)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, names: Names = Names(), group: str = "") -> None:
    """Refuse hidden states and a head, or this rank's part of one, that do not fit each other."""
    for name, tensor in ((names.hidden, hidden), (names.weight, weight), (names.bias, bias)):
        if tensor is None:
            continue
        refuse_dtensor(
            name,
            tensor,
            "call the loss inside the head's forward, where FSDP has gathered the weight (ORPOTrainer does), or pass "
            "full_tensor() of a weight that is not trained",
        )
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} has to be float64, float32, bfloat16 or float16, got {tensor.dtype}")
        check_device(name, tensor, hidden, names.hidden)
        # A graph is traced with tensors without tangents, but may be called with tangents while a level is open.
        is_open = torch.compiler.is_compiling() and forward_ad._current_level >= 0
        if is_open or forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{name} carries a tangent of forward-mode AD (torch.func.jvp), for which this loss has no rule: "
                "differentiate it backward (torch.autograd.grad)"
            )
    if weight.dim() != 2 or hidden.dim() < 1 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{names.weight} of shape {tuple(weight.shape)} does not fit {names.hidden} of shape "
            f"{tuple(hidden.shape)}: it has to be (vocabulary, hidden size)"
        )
    # All ranks of a group refuse a part without rows together: here the others would wait for this one.
    if weight.shape[0] == 0 and not group:
        raise ValueError(f"{names.weight} has 0 rows: the vocabulary is empty")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{names.bias} of shape {tuple(bias.shape)} does not fit the vocabulary of {weight.shape[0]}")


def refuse_dtensor(name: str, tensor: Tensor, remedy: str) -> None:
    """Refuse a DTensor, with what to do."""
    if hasattr(tensor, "full_tensor"):
        raise ValueError(f"{name} is a DTensor, of which this rank holds a part: {remedy}")


def check_labels(hidden: Tensor, labels: Tensor, nll_labels: Tensor | None, names: Names = Names()) -> None:
    """Refuse labels that do not fit (2P, T, D) hidden states."""
    name = names.labels
    if labels.dim() != 2 or labels.shape[0] % 2 or labels.shape[0] == 0:
        raise ValueError(f"{name} has to have shape (2 * pairs, positions), chosen first, got {tuple(labels.shape)}")
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"{names.hidden} of shape {tuple(hidden.shape)} does not fit {name} of shape {tuple(labels.shape)}: "
            "all dimensions but the last have to agree"
        )
    check_integers(name, labels, hidden, names.hidden)
    if nll_labels is None:
        return
    check_integers(f"nll_{name}", nll_labels, hidden, names.hidden)
    fits = nll_labels.dim() == 2 and nll_labels.shape[1] == labels.shape[1]
    if not fits or nll_labels.shape[0] not in (labels.shape[0], labels.shape[0] // 2):
        raise ValueError(
            f"nll_{name} of shape {tuple(nll_labels.shape)} does not fit {name} of shape {tuple(labels.shape)}: "
            "it has one row for each pair, or for each sequence"
        )


def check_integers(name: str, labels: Tensor, hidden: Tensor, hidden_name: str = "hidden") -> None:
    """Refuse labels that are not int32 or int64, or live elsewhere than the hidden states."""
    refuse_dtensor(name, labels, "pass full_tensor()")
    if labels.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} has to be int32 or int64, got {labels.dtype}")
    check_device(name, labels, hidden, hidden_name)


def check_device(name: str, tensor: Tensor, hidden: Tensor, hidden_name: str = "hidden") -> None:
    """Refuse a tensor on another device than the hidden states."""
    if tensor.device != hidden.device:
        raise ValueError(f"{name} is on {tensor.device}, but {hidden_name} is on {hidden.device}")


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as a Linear would see them under the active autocast; float64 is left alone, as there."""
    device = tensors[0].device.type
    # torch.compile of torch 2.8 cannot trace is_autocast_available; every device it compiles for has autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if not (available and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def wanted_gradients(*tensors: Tensor | None) -> list[bool]:
    """Which of the tensors need a gradient. Decided here: inside an operator grad mode is always off."""
    enabled = torch.is_grad_enabled()
    return [enabled and t is not None and t.requires_grad for t in tensors]


def is_frozen(weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the head is not trained, whatever the grad mode: evaluation takes the same path as training."""
    return not weight.requires_grad and (bias is None or not bias.requires_grad)
