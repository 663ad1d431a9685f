"""Checkpoints of FSDP2 in shards that are written while training goes on (``async_save``)."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dist_cp
from accelerate.utils import DistributedType, is_peft_model
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import StateDictType
from transformers import TrainerCallback
from transformers.trainer import SCHEDULER_NAME

from orpo.ranks import fsdp_plugin
from orpo.runs.find_checkpoint import INCOMPLETE, failure_note


class AsyncSaveError(RuntimeError):
    """A save in the background failed; the text says on which ranks and why."""


def refuse_async_save(trainer: Any) -> None:
    """Refuses ``async_save`` where a checkpoint is not written in shards by torch's distributed checkpointing.

    Raises:
        ValueError: `trainer` has one process, is under DDP, DeepSpeed, FSDP1 or FULL_STATE_DICT, or pushes to the hub.
    """
    accelerator, plugin = trainer.accelerator, fsdp_plugin(trainer.accelerator)
    needs = "it needs FSDP2 with fsdp_state_dict_type SHARDED_STATE_DICT; else leave it out, and training waits"
    if accelerator.num_processes == 1:
        raise ValueError(f"async_save is True in a run of 1 process: {needs} for each save")
    if accelerator.distributed_type != DistributedType.FSDP or plugin is None:
        name = "DeepSpeed" if accelerator.distributed_type == DistributedType.DEEPSPEED else "DDP"
        raise ValueError(f"async_save is True under {name}: {needs} for each save")
    if plugin.fsdp_version < 2:
        raise ValueError(f"async_save is True under FSDP{plugin.fsdp_version}: {needs} for each save")
    if plugin.state_dict_type != StateDictType.SHARDED_STATE_DICT:
        kind = plugin.state_dict_type
        raise ValueError(f"async_save is True with {getattr(kind, 'name', kind)}: {needs} for each save")
    if trainer.args.push_to_hub:
        raise ValueError(
            "async_save and push_to_hub are True, and a checkpoint would be pushed before it is written: leave one out"
        )


class BackgroundSave:
    """One save: a thread on each rank, which has to be made on all of them.

    Args:
        name: of the checkpoint.
        folder: where it will be.
        group: of all ranks, on CPUs, and of these threads alone. What they exchange would meet what training does
            otherwise, in another order on each rank.
        write: called in the thread with a function that waits for all ranks.
    """

    def __init__(self, name: str, folder: Path, group: Any, write: Callable[[Callable[[], None]], None]) -> None:
        self.name, self.folder = name, folder
        self.error: BaseException | None = None
        self._group, self._write = group, write
        # A daemon, so that a second Ctrl-C need not wait for the disk.
        self._thread = threading.Thread(target=self._run, name=f"save of {name}", daemon=True)
        self._thread.start()

    def is_done(self) -> bool:
        """Whether this rank's thread has ended."""
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Waits for the end.

        Raises:
            AsyncSaveError: a rank's part failed, on all ranks.
        """
        self._thread.join()
        if self.error is not None:
            shutil.rmtree(self.folder / INCOMPLETE / self.name, ignore_errors=True)
            self.error.add_note(failure_note(self.name, self.folder))
            raise self.error

    def _run(self) -> None:
        try:
            try:
                self._write(self._exchange)
            except AsyncSaveError:
                # All ranks have it.
                raise
            except BaseException as error:
                # The others wait in an exchange of theirs, or have failed as well, in torch's.
                self._exchange(_words(error, dist.get_rank()))
                raise
            self._exchange()
        except BaseException as error:
            # Kept for `finish`: nobody sees what a thread raises.
            self.error = error if isinstance(error, AsyncSaveError) else _as_async_error(error)

    def _exchange(self, failure: str | None = None) -> None:
        """Waits for all ranks, and raises on all of them what one of them says."""
        said: list[str | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(said, failure, group=self._group)
        if any(said):
            words = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(said) if text)
            raise AsyncSaveError(f"{self.name} could not be written while training went on: {words}")


def _as_async_error(error: BaseException) -> AsyncSaveError:
    """For a rank that has lost the others."""
    found = AsyncSaveError(f"the save in the background was cut off: {type(error).__name__}: {error}")
    found.__cause__ = error
    return found


def _words(error: BaseException, rank: int) -> str | None:
    """What `rank` says of `error`; None where torch has raised on all ranks what happened on others."""
    if isinstance(error, CheckpointException):
        if rank not in error.failures:
            return None
        error = error.failures[rank][0]
    return f"{type(error).__name__}: {error}"


class SavesBesideTraining(TrainerCallback):
    """A save copies this rank's shards to the CPU, and a thread writes them.

    Once all ranks have, a thread of rank 0 writes the record, moves the folder and removes older checkpoints. One save
    is in flight at most. All ranks call each method at the same place.

    Args:
        trainer: an :class:`orpo.runs.checkpoints.CheckpointingTrainer`.

    Raises:
        ValueError: as :func:`refuse_async_save`.
    """

    def __init__(self, trainer: Any) -> None:
        refuse_async_save(trainer)
        self.trainer = trainer
        # A rank may wait long for another's disk; one that died is known by its closed connection.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        self.in_flight: BackgroundSave | None = None
        self._staged: dict[str, Any] = {}

    def stage(self, output_dir: str) -> None:
        """Copies weights and optimizer to the CPU, and writes the scheduler, which is small, to `output_dir`."""
        model, optimizer = self.trainer.model, self.trainer.optimizer
        self._staged = {
            f"{FSDP_MODEL_NAME}_0": _staged({"model": _model_state(model)}),
            f"{OPTIMIZER_NAME}_0": _staged({"optimizer": get_optimizer_state_dict(model, optimizer)}),
        }
        # Rank 0 may still be emptying the folder, into which each rank writes its random states next.
        self.trainer.accelerator.wait_for_everyone()
        if self.trainer.args.should_save:
            torch.save(self.trainer.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def start(self, folder: Path, name: str, complete: Callable[[Callable[[], None]], None]) -> None:
        """Begins to write what is staged to ``folder/_incomplete/name``, which `complete` makes a checkpoint then.

        `complete` gets a function that waits for all ranks' threads.
        """
        states, self._staged = self._staged, {}
        part, group = folder / INCOMPLETE / name, self._group

        def write(wait: Callable[[], None]) -> None:
            for place, state in states.items():
                # It makes the folder itself: an error outside of it would find the other ranks in its exchanges.
                writer = dist_cp.FileSystemWriter(part / place)
                dist_cp.save(state, storage_writer=writer, planner=dist_cp.DefaultSavePlanner(), process_group=group)
            complete(wait)

        self.in_flight = BackgroundSave(name, folder, group, write)

    def finish(self) -> None:
        """Waits for the save in flight, if there is one.

        Raises:
            AsyncSaveError: it failed.
        """
        save, self.in_flight = self.in_flight, None
        if save is not None:
            save.finish()

    def finish_after(self, error: BaseException) -> None:
        """The same where `error` has ended training, which gets what is said of the save as a note."""
        try:
            self.finish()
        except AsyncSaveError as failed:
            error.add_note("\n".join([f"besides, {failed}", *getattr(failed, "__notes__", ())]))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Raises AsyncSaveError on all ranks after the same step: one that went on would wait for the others."""
        if self.in_flight is None:
            return
        accelerator = self.trainer.accelerator
        writing = accelerator.reduce(torch.tensor(float(not self.in_flight.is_done()), device=accelerator.device))
        if not writing:
            self.finish()


def _model_state(model: nn.Module) -> dict[str, Any]:
    """The weights that accelerate saves of `model`, cut as they are: of an adapter, its own alone."""
    if is_peft_model(model):
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    return get_model_state_dict(model)


def _staged(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of `state` on the CPU, which the next step does not change."""
    return BlockingAsyncStager().stage(state)
