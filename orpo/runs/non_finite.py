"""Stops a run whose loss, gradient or weights are no longer numbers, and says where it happened."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class _Step:
    number: int
    micro_batches: list[tuple[Tensor, Tensor]]
    gradient_is_finite: Tensor | None = None


class NonFiniteError(FloatingPointError):
    """The loss or the gradient of a step, a weight, or the loss of an evaluation is NaN or infinite."""


def is_finite(tensor: Tensor) -> bool:
    """Whether no element of `tensor`, of any shape and dtype, is NaN or infinite."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def check_weights(model: nn.Module, step: int) -> None:
    """Refuses to let `model` be saved where a step has spoilt it.

    Of a weight that FSDP or ZeRO-3 has cut up, this process's part is looked at.

    Raises:
        NonFiniteError: a trained weight is NaN or infinite after optimizer step `step`.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if not is_finite(_own_part(parameter)):
            raise NonFiniteError(
                f"after step {step} the weights are not finite ({name}), and the model is not saved: "
                "try a lower learning_rate, a longer warmup_steps, or max_grad_norm"
            )


def _own_part(parameter: nn.Parameter) -> Tensor:
    part = parameter.detach()
    if hasattr(part, "to_local"):
        return part.to_local()
    if parameter.numel() or not hasattr(parameter, "ds_tensor"):
        return part
    # ZeRO-3 makes parts of one size, of which the last ranks' end in memory that nobody has written.
    begin = parameter.ds_tensor.ds_numel * torch.distributed.get_rank(parameter.ds_process_group)
    return parameter.ds_tensor.detach().flatten()[: max(parameter.ds_numel - begin, 0)]


def check_evaluation(metrics: Mapping[str, float], step: int) -> None:
    """Refuses to go on from an evaluation that gave no number.

    Raises:
        NonFiniteError: a loss in `metrics` is NaN or infinite.
    """
    bad = [f"{name} is {v}" for name, v in metrics.items() if name.endswith("_loss") and not math.isfinite(v)]
    if bad:
        raise NonFiniteError(f"the evaluation after step {step} gave no number: {', '.join(bad)}")


class NonFiniteGuard:
    """Watches every micro-batch and every gradient norm.

    On a CPU a step is checked before its update. On an accelerator, reading a flag would make the host wait for the
    device to finish the step it has just queued, so each step is checked while the next one runs.

    Args:
        rank: the process that reports.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.current: list[tuple[Tensor, Tensor]] = []
        self.unchecked: _Step | None = None

    def watch(self, loss: Tensor, chosen_logps: Tensor, rejected_logps: Tensor, pair_ids: Tensor) -> None:
        """Notes one micro-batch: a flag for its loss and one for each of its pairs, left on the device."""
        finite = torch.isfinite(torch.cat([loss.detach().reshape(1), chosen_logps + rejected_logps]))
        self.current.append((finite, pair_ids))

    def end_step(self, number: int, gradient_norm: Tensor | float | None) -> None:
        """Ends optimizer step `number`, whose micro-batches have been watched; checks it, or the one before.

        Raises:
            NonFiniteError: with the step, the rank and the rows of the data set.
        """
        gradient = None if gradient_norm is None else torch.isfinite(torch.as_tensor(gradient_norm))
        step = _Step(number, self.current, gradient)
        self.current = []
        self.flush()
        self.unchecked = step
        if not self._would_wait(step):
            self.flush()

    @staticmethod
    def _would_wait(step: _Step) -> bool:
        return any(flags.device.type != "cpu" for flags, _ in step.micro_batches)

    def flush(self) -> None:
        """Checks the last step, if it has not been checked yet: before a save, which would keep what it did."""
        step, self.unchecked = self.unchecked, None
        if step is None:
            return
        for flags, pair_ids in step.micro_batches:
            loss_is_finite, *pairs_are_finite = flags.tolist()
            if loss_is_finite and all(pairs_are_finite):
                continue
            rows = [i for i, finite in zip(pair_ids.tolist(), pairs_are_finite, strict=True) if not finite]
            where = (
                f"rows {rows}" if rows else f"none of its pairs alone; the micro-batch held rows {pair_ids.tolist()}"
            )
            raise NonFiniteError(
                f"the loss of step {step.number} on rank {self.rank} is not finite: {where} of the data set as given"
            )
        if step.gradient_is_finite is not None and not bool(step.gradient_is_finite):
            rows = [i for _, pair_ids in step.micro_batches for i in pair_ids.tolist()]
            raise NonFiniteError(
                f"the gradient of step {step.number} is not finite, though rank {self.rank}'s losses are: "
                f"it held rows {rows} of the data set as given"
            )
