"""Runs that would end without a word and without a model: nothing in them trains, or their loss runs away."""

from __future__ import annotations

import statistics
import warnings
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn


class NothingTrainsError(ValueError):
    """No weight of the model can change."""


def refuse_frozen(model: nn.Module, optimizer: Any) -> None:
    """Refuses a model of which nothing is trained, or an optimizer that holds none of what is.

    Args:
        model: the model, not cut up by FSDP or ZeRO yet.
        optimizer: the user's own, or None.

    Raises:
        NothingTrainsError: with the remedy.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(1 for _ in model.parameters())
    if not trained:
        remedy = (
            "load the adapter with PeftModel.from_pretrained(..., is_trainable=True)"
            if hasattr(model, "peft_config")
            else "set requires_grad on what is to be trained, or give peft_config"
        )
        raise NothingTrainsError(f"requires_grad is False on all {count} parameters, so that nothing trains: {remedy}")
    if optimizer is None or not hasattr(optimizer, "param_groups"):
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not held.intersection(map(id, trained)):
        raise NothingTrainsError(
            f"optimizers: the optimizer holds none of the model's {len(trained)} trained parameters, so that nothing "
            "trains: make it from the model as the trainer has it, after an adapter is around it (peft_config freezes "
            "the rest)"
        )


def refuse_no_gradient(norm: Tensor | float | None, args: Any) -> None:
    """Refuses a run in whose first step every gradient was exactly 0. Reads the norm off the device.

    Args:
        norm: of all gradients of that step.
        args: the settings, with the weights of the loss.

    Raises:
        NothingTrainsError: with what to look at.
    """
    if norm is None or float(norm) != 0:
        return
    raise NothingTrainsError(
        "every gradient of the first step is exactly 0, so that nothing trains. What to look at: the loss's weights "
        f"(beta {args.beta}, nll_weight {args.nll_weight}); whether hidden states reach the head with "
        "their gradient (a detach or no_grad in the model's forward, trained parameters that the forward does not use)"
    )


def refuse_no_step(state: Any, starved: bool) -> None:
    """Refuses a run that came to its end without an optimizer step, since its pairs did not fill one (`starved`).

    Raises:
        NothingTrainsError: with what it takes.
    """
    if starved and state.global_step == 0:
        raise NothingTrainsError(
            "no optimizer step was taken, so that nothing trained: the stream holds fewer pairs than one step needs "
            "(per_device_train_batch_size x gradient_accumulation_steps x processes)"
        )


class RunawayLoss:
    """Warns once of a loss that multiplies: three steps in a row above 10 times the median of the 20 before them.

    Each step's loss is left on the device until the next step has ended, since reading it would make the host wait. A
    loss below the run's first is not running away, however low it was in between.

    Args:
        args: the settings, of which the warning names the learning rate and beta.
    """

    TIMES, RECENT, BEFORE = 10, 3, 20

    def __init__(self, args: Any) -> None:
        self.args = args
        self.first: float | None = None
        self.losses: deque[float] = deque(maxlen=self.BEFORE + self.RECENT)
        self.step = 0
        self.parts: list[Tensor] = []
        self.unread: Tensor | None = None
        self.warned = False

    def add(self, part: Tensor) -> None:
        """Adds a micro-batch's share of the step's loss."""
        self.parts.append(part.detach().float())

    def end_step(self, number: int) -> None:
        """Ends optimizer step `number`, and looks at the one before."""
        self.flush()
        self.step = number
        self.unread, self.parts = torch.stack(self.parts).sum() if self.parts else None, []

    def flush(self) -> None:
        """Looks at the last step, if that has not been done."""
        if self.unread is None or self.warned:
            return
        loss, self.unread = float(self.unread), None
        self.first = loss if self.first is None else self.first
        self.losses.append(loss)
        *before, third, second, last = [self.first] * max(self.RECENT + 1 - len(self.losses), 0) + [*self.losses]
        lowest = min(third, second, last)
        if lowest <= self.first or lowest <= self.TIMES * statistics.median(before):
            return
        self.warned = True
        warnings.warn(
            f"the loss is {lowest:.4g} or more for {self.RECENT} steps, up to step {self.step}, and was about "
            f"{statistics.median(before):.4g} before: the run diverges. Lower learning_rate (now "
            f"{self.args.learning_rate}) or beta (now {self.args.beta}), or warm up for longer (warmup_steps)",
            stacklevel=2,
        )
