"""On SIGTERM (with ``enable_jit_checkpoint``) and Ctrl-C: ends the step in progress, saves it, and ends training."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


def _end_training(trainer: Any, control: Any) -> None:
    """Asks for a log, a save and the end, without an evaluation, for which there may be no time."""
    trainer.interrupted = control.should_log = control.should_save = control.should_training_stop = True
    control.should_evaluate = False


class SaveOnSigterm(JITCheckpointCallback):
    """transformers' callback for SIGTERM, but it saves only after a step and its log, and on all ranks together.

    transformers also saves in the middle of a step, after random numbers were drawn that a resumed run draws again, and
    on each rank by itself: one would wait in a save for another that is a step behind.

    Args:
        trainer: a trainer, whose ``interrupted`` is set.
        callback: transformers' own, which handles the signal.
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
        """Ends training where a signal came."""
        if self._is_asked():
            self.jit_manager.is_checkpoint_requested = False
            _end_training(self.trainer, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """As after a step: the signal may have come in the evaluation after the epoch's last one."""
        self.on_step_end(args, state, control)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Nothing."""


class SaveOnCtrlC(TrainerCallback):
    """Like :class:`SaveOnSigterm`, after :meth:`ask` was called by Ctrl-C.

    Args:
        trainer: a trainer, whose ``interrupted`` is set.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.asked = trainer, False

    def ask(self, *_: Any) -> None:
        """The handler of Ctrl-C: asks for the end; the second time raises KeyboardInterrupt."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # Not print: the handler may have interrupted a print, which cannot be entered again.
        os.write(2, b"\nCtrl-C: the step in progress is ended and saved; once more ends at once\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ends training where Ctrl-C came."""
        if self.asked:
            _end_training(self.trainer, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """As after a step."""
        self.on_step_end(args, state, control)


@contextmanager
def ctrl_c_saves(trainer: Any) -> Iterator[SaveOnCtrlC]:
    """In the block, a first Ctrl-C saves a checkpoint after the step in progress, and ends training.

    A second one raises KeyboardInterrupt. So does the first where nothing is saved (``save_strategy`` no), on several
    ranks, which would have to agree on a step, and with ``dataloader_num_workers``, since Ctrl-C ends the workers too.
    A process that ignores Ctrl-C, as a shell's background jobs do, still ignores it.
    """
    args, callback = trainer.args, SaveOnCtrlC(trainer)
    alone = args.world_size == 1 and args.dataloader_num_workers == 0
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    on_main_thread = threading.current_thread() is threading.main_thread()
    if args.save_strategy == "no" or not alone or ignored or not on_main_thread:
        yield callback
        return
    # First of all callbacks, so that those that save see what it asks for.
    trainer.callback_handler.callbacks.insert(0, callback)
    before = signal.signal(signal.SIGINT, callback.ask)
    try:
        yield callback
    finally:
        signal.signal(signal.SIGINT, before)
        trainer.remove_callback(callback)
