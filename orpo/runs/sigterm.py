"""SIGTERM under ``enable_jit_checkpoint``: the step in progress is ended, logged and saved, and training ends."""

from __future__ import annotations

from typing import Any

import torch
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


class SaveOnSigterm(JITCheckpointCallback):
    """transformers' callback for SIGTERM, which saves where the trainer's own saves are: after a step and its log.

    By itself it saves in the middle of a step too, after random numbers were drawn that a resumed run draws again, and
    each rank for itself, so that one would wait in a save for another that is a step behind.

    Args:
        trainer: a trainer, whose ``interrupted`` is set.
        callback: transformers' own, which has taken the signal over.
    """

    def __init__(self, trainer: Any, callback: JITCheckpointCallback) -> None:
        super().__init__()
        self.trainer, self.jit_manager = trainer, callback.jit_manager

    def _is_asked(self) -> bool:
        asked, accelerator = self.jit_manager.is_checkpoint_requested, self.trainer.accelerator
        if accelerator.num_processes == 1:
            return asked
        return bool(accelerator.reduce(torch.tensor(float(asked), device=accelerator.device)))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Asks for a log and a save, and for the end; an evaluation may take longer than there is."""
        if not self._is_asked():
            return
        self.jit_manager.is_checkpoint_requested = False
        self.trainer.interrupted = control.should_log = control.should_save = control.should_training_stop = True
        control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """As after a step: the signal may have come in the evaluation after the epoch's last one."""
        self.on_step_end(args, state, control)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Nothing."""
