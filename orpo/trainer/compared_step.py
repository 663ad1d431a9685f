"""A step on all ranks beside the same step in one process: do the ranks add up to the run that was meant?"""

from __future__ import annotations

import copy
import math
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from orpo.layouts.batch import Counts, pair_batch
from orpo.model.attach import base_model
from orpo.model.probe import matmul_eps
from orpo.ranks import from_rank_0
from orpo.trainer.collectives import Collectives
from orpo.trainer.config import ORPOConfig
from orpo.trainer.trainer import ORPOTrainer

# Both ways add up the same terms in another order. In float32 the sums of a step agree to about 1e-6, and a mistake of
# the ranks (a mean of means, a gradient that is not summed) is seldom below 1e-3.
LEAST = 1e-4
# In a narrower dtype each term is rounded first, at other places under FSDP than under autocast: a few roundings.
ROUNDINGS = 4
# The first is compared, and the last is counted.
STEPS = 3


@dataclass(frozen=True)
class ComparedStep:
    """The first step on all ranks and in one process, and what the ranks sent each other in the third.

    Attributes:
        losses, norms: (on all ranks, in one process): the step's loss, and the norm of its gradient before clipping.
            The norm is infinite or NaN where a loss scaler (fp16) has found its scale too large.
        tolerance: by how much of it each may differ.
        collectives: of the third step; the first two also set up what later ones use again (DDP's buckets).
    """

    losses: tuple[float, float]
    norms: tuple[float, float]
    tolerance: float
    collectives: Collectives

    @property
    def agrees(self) -> bool:
        """Whether both ways agree to rounding; the norm where there is one."""
        pairs = [self.losses] + [self.norms] * math.isfinite(self.norms[0])
        return all(math.isclose(a, b, rel_tol=self.tolerance) for a, b in pairs)


class _Watched(ORPOTrainer):
    """Keeps the first step's batches, and counts the collectives of the last."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, callbacks=[_EndOfStep(self)], **kwargs)
        self.first: list[Any] | None = None
        self.collectives, self.counting = Collectives(), ExitStack()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Counts | None]:
        if self.state.global_step == STEPS - 1:
            self.counting.enter_context(self.collectives)
        samples, counts = super().get_batch_samples(*args, **kwargs)
        if self.first is None:
            self.first = send_to_device(samples, "cpu")
        return samples, counts


class _EndOfStep(TrainerCallback):
    def __init__(self, trainer: _Watched) -> None:
        self.trainer = trainer

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.counting.close()


def compare_step(model: nn.Module, args: ORPOConfig, data: Any, tokenizer: Any, peft_config: Any) -> ComparedStep:
    """Trains `model` for three steps on all ranks, and repeats the first in one process. All ranks call it.

    Args:
        model: a language model of transformers, the same on every rank; small, since rank 0 also trains a whole copy.
        args: the settings of the run. Nothing is written in ``output_dir``; dropout and noise, which ranks draw apart,
            are switched off.
        data: pairs, as :class:`orpo.trainer.trainer.ORPOTrainer` takes them, the same on every rank.
        tokenizer: that of the model.
        peft_config: of the adapter that is trained, or None.

    Raises:
        ValueError: as ``ORPOTrainer`` and its ``train``.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = _Watched(
            model,
            _settings(args, folder),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        # The ranks will have cut and changed the model by the time its batches are known.
        alone = copy.deepcopy(trainer.model) if trainer.is_world_process_zero() else None
        trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    parts = gather_object([trainer.first])
    loss, norm, tolerance = from_rank_0(trainer.accelerator, lambda: _in_one_process(trainer, alone, parts))
    norms = (float(logged.get("grad_norm", math.nan)), norm)
    return ComparedStep((logged["loss"], loss), norms, tolerance, trainer.collectives)


def _settings(args: ORPOConfig, folder: str) -> ORPOConfig:
    """`args`, for a few steps that leave nothing behind."""
    args = copy.copy(args)
    changes = {
        "output_dir": folder,
        "max_steps": STEPS,
        "save_strategy": SaveStrategy.NO,
        "eval_strategy": IntervalStrategy.NO,
        "logging_strategy": IntervalStrategy.STEPS,
        "logging_steps": 1,
        "report_to": [],
        "push_to_hub": False,
        "disable_tqdm": True,
        "load_best_model_at_end": False,
        "early_stopping_patience": None,
        "generate_during_eval": False,
        "auto_find_batch_size": False,
        "enable_jit_checkpoint": False,
        "diagnose": False,
        "dataloader_num_workers": 0,
        "dataloader_prefetch_factor": None,
        "dataloader_persistent_workers": False,
        "disable_dropout": True,
        "neftune_noise_alpha": None,
        # The model is loaded already.
        "model_init_kwargs": None,
        # Without clipping there is no norm.
        "max_grad_norm": args.max_grad_norm or 1.0,
    }
    if not args.deepspeed:
        # Two show whether accumulation is right; DeepSpeed has been told of as many as there are.
        changes["gradient_accumulation_steps"] = min(args.gradient_accumulation_steps, 2)
    for name, value in changes.items():
        if not hasattr(args, name):
            raise AttributeError(f"ORPOConfig has no setting {name}")
        setattr(args, name, value)
    return args


def _in_one_process(trainer: _Watched, model: nn.Module, parts: list[Any]) -> tuple[float, float, float]:
    """(loss, norm of the gradient, tolerance) of `model` on the batches of all ranks, one after the other."""
    device, total, counts = trainer.args.device, 0.0, None
    if trainer.args.normalization == "global":
        # Not those that the ranks have agreed on, which may be the mistake.
        counts = Counts(*torch.tensor([pair_batch(s).counts for samples in parts for s in samples]).sum(0).tolist())
    if base_model(model).device != device:
        model.to(device)
    model.train()
    for samples in parts:
        trainer.current_gradient_accumulation_steps = len(samples)
        for inputs in send_to_device(samples, device):
            with trainer.accelerator.autocast():
                # The trainer's is multiplied by the number of ranks, over which their wrappers average.
                loss = trainer.compute_loss(model, inputs, num_items_in_batch=counts) / len(parts)
            loss.backward()
            total += loss.item()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    with trainer.accelerator.autocast():
        eps = matmul_eps(base_model(model), device.type)
    return total, norm.item(), max(LEAST, ROUNDINGS * eps)
