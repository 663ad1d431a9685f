"""Checkpoints that are whole or absent, and how many stay."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import StateDictType
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from orpo.ranks import from_rank_0, fsdp_plugin, parts_of_a_matmul
from orpo.runs.async_saves import SavesBesideTraining
from orpo.runs.disk import DiskSpace
from orpo.runs.find_checkpoint import (
    INCOMPLETE,
    checkpoint_folders,
    complete_checkpoints,
    failure_note,
    find_checkpoint,
    find_fault,
    last_number,
    way_back,
)
from orpo.runs.lock import check_lock, run_lock, warn_of_own_disks
from orpo.runs.non_finite import NonFiniteError, NonFiniteGuard, check_evaluation, check_weights
from orpo.runs.record import RECORD, compare_runs, describe_run, write_record
from orpo.runs.signals import SaveOnSigterm


class CheckpointingTrainer(Trainer):
    """``Trainer`` whose checkpoints are complete from the moment they have their name.

    They are written to ``output_dir/_incomplete`` and moved once every process has written its part. Only then are
    older ones removed for ``save_total_limit``, so that a run killed at any time leaves the checkpoint before. This
    does not guard against the machine's failure: nothing is flushed out of the system's file cache.

    The class that derives from it has ``train`` and ``save_model``, which call what is here, and makes ``_guard``.
    """

    _guard: NonFiniteGuard
    _saving = False
    _beside: SavesBesideTraining | None = None
    # Whether a signal ended the last `train` before its end (orpo.runs.signals).
    interrupted = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(DiskSpace())
        if (callback := self.pop_callback(JITCheckpointCallback)) is not None:
            self.add_callback(SaveOnSigterm(self, callback))
        if self.args.async_save:
            self._beside = SavesBesideTraining(self)
            self.add_callback(self._beside)

    def _train_in_folder(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """``Trainer.train``, with ``output_dir`` locked, resumed from what :func:`find_checkpoint` finds.

        Raises:
            ValueError: there is no such checkpoint, it is of a run with settings that this one does not have, or
                another process trains in ``output_dir``.
            NonFiniteError: a loss, a gradient or a weight became NaN or infinite; a note names the last checkpoint.
        """
        if kwargs.get("trial") is not None:
            # In a hyperparameter search, Trainer makes the trial's model itself, and chooses what to resume from.
            return self._train_and_save(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.model is None and self.model_init is not None:
            # A search leaves no model, and Trainer would make the next one too late for what follows.
            self.model = self.call_model_init()
        self._run_settings, self.interrupted = describe_run(self), False
        # Without saves nothing is written that two runs could mix up.
        alone = self.args.save_strategy != "no"
        with run_lock(self.args.output_dir, self.accelerator) if alone else nullcontext():
            if alone:
                warn_of_own_disks(self.args.output_dir, self.accelerator, self.args.save_on_each_node)
            # Rank 0 decides: over a network ranks may see other folders, and one that starts anew would hang the rest.
            checkpoint = from_rank_0(self.accelerator, lambda: self._choose_checkpoint(resume_from_checkpoint))
            try:
                return self._train_and_save(resume_from_checkpoint=checkpoint, **kwargs)
            except NonFiniteError as error:
                if note := way_back(Path(self.args.output_dir)):
                    error.add_note(note)
                raise

    def _train_and_save(self, **kwargs: Any) -> Any:
        """``Trainer.train``; an error that ends it waits for the save in flight, which may be whole yet."""
        try:
            output = super().train(**kwargs)
            self._guard.flush()
        except BaseException as error:
            if self._beside is not None:
                self._beside.finish_after(error)
            raise
        return output

    def _choose_checkpoint(self, wanted: str | bool | None) -> str | None:
        folder = Path(self.args.output_dir)
        report = print if self.args.should_log else lambda _: None
        checkpoint = find_checkpoint(wanted, folder, report)
        note = compare_runs(checkpoint, self._run_settings) if checkpoint else ""
        # Only now is this run known to go on: nothing may be removed earlier.
        if removed := _remove_interrupted(folder / INCOMPLETE):
            report(f"{folder}: the save of {', '.join(removed)} was interrupted; what there was of it is removed")
        for path in sorted(checkpoint_folders(folder)):
            if fault := find_fault(path):
                report(f"{folder}: {path.name} {fault} and is ignored")
        if checkpoint is None:
            if complete := complete_checkpoints(folder):
                report(f"starts anew; {folder} holds checkpoints of an earlier run, the newest {complete[-1].name}")
            return None
        if (ranks := parts_of_a_matmul(self.accelerator.parallelism_config)) > 1:
            raise ValueError(
                f"parallelism_config: tp_size is {ranks}, and {checkpoint} is a checkpoint, from which such a run does "
                "not go on: leave tp_size 1 (ddp, fsdp2)"
            )
        report(f"resumes from {checkpoint}{note}")
        return str(checkpoint)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super()._evaluate(*args, **kwargs)
        check_evaluation(metrics, self.state.global_step)
        return metrics

    def _check_before_checkpoint(self) -> None:
        self._guard.flush()
        check_weights(self.model, self.state.global_step)

    def _on_all_ranks(self, check: Callable[[], None]) -> None:
        """Raises NonFiniteError on all ranks if `check` does on one: the others would wait for it in the save."""
        error = None
        try:
            check()
        except NonFiniteError as found:
            error = found
        if self.accelerator.num_processes > 1:
            others = self.accelerator.reduce(torch.tensor(float(error is not None), device=self.args.device))
            if error is None and others:
                error = NonFiniteError(f"another rank than {self.args.process_index} says what is not finite")
        if error is not None:
            raise error

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, INCOMPLETE) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._beside is not None:
            # Two at once would need the memory of two, and the older could remove what the newer has just written.
            self._beside.finish()
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        part, final = folder / INCOMPLETE / name, folder / name
        self._on_all_ranks(self._check_before_checkpoint)
        self._saving = True
        try:
            if self.args.should_save:
                check_lock(self.args.output_dir)
                _mark(part)
            super()._save_checkpoint(model, trial)
            # Trainer notes the folder before it is moved, and only on ranks that see it already.
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(final)
                if self.args.should_save:
                    self.state.save_to_json(str(part / TRAINER_STATE_NAME))
            if self._beside is None:
                self._complete(folder, name, self.accelerator.wait_for_everyone)
            else:
                self._beside.start(folder, name, partial(self._complete, folder, name))
        except BaseException as error:
            shutil.rmtree(part, ignore_errors=True)
            error.add_note(failure_note(name, folder))
            raise
        finally:
            self._saving = False
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """``Trainer``'s; a save beside training only copies weights and optimizer to the CPU."""
        if self._beside is None:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            self._beside.stage(output_dir)

    def _complete(self, folder: Path, name: str, wait: Callable[[], None]) -> None:
        """Makes ``folder/_incomplete/name``, where this rank has written its part, a checkpoint; `wait` for others."""
        part, final = folder / INCOMPLETE / name, folder / name
        # Wait, since the record has checksums of what all processes write.
        wait()
        if self.args.should_save:
            write_record(part, self._run_settings, number=1 + last_number(folder))
            _move(part, final)
        wait()
        if self.args.local_process_index == 0 and part.is_dir():
            # On a node with its own disk, where rank 0 moves nothing.
            _move(part, final)
        if self.args.should_save:
            self._remove_old(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """``Trainer``'s, but the last checkpoint stays beside the best one under ``save_total_limit`` 1.

        Without it, another start would not see that the run is at its end.
        """
        if self._beside is not None:
            # It may be of the best checkpoint, which is loaded now.
            self._beside.finish()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _remove_old(self, folder: Path) -> None:
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        complete = complete_checkpoints(folder)
        # Resolved, since one folder has several names: relative, absolute, through a link.
        kept = {complete[-1].resolve(), Path(self.state.best_model_checkpoint or complete[-1]).resolve()}
        removable = [path for path in complete if path.resolve() not in kept]
        for path in removable[: max(len(complete) - max(limit, len(kept)), 0)]:
            shutil.rmtree(path, ignore_errors=True)

    def _save_whole_model(self, output_dir: str | None, _internal_call: bool) -> None:
        """``Trainer.save_model``, which writes no model under FSDP with a sharded state dict; this one does.

        A checkpoint keeps the shards alone.

        Raises:
            NonFiniteError: a weight that was trained is NaN or infinite.
        """
        plugin = fsdp_plugin(self.accelerator)
        if not _internal_call:

            def check() -> None:
                check_weights(self.model, self.state.global_step)

            # Where all ranks have the same weights, one may be asked to save alone: no waiting for others.
            cut = plugin is not None or parts_of_a_matmul(self.accelerator.parallelism_config) > 1
            cut = cut or any(hasattr(parameter, "ds_tensor") for parameter in self.model.parameters())
            self._on_all_ranks(check) if cut else check()
        if plugin is None or _internal_call or plugin.state_dict_type == StateDictType.FULL_STATE_DICT:
            super().save_model(output_dir, _internal_call)
            return
        before, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.state_dict_type = before

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """``Trainer``'s; a weight that FSDP has put together once for each of its names is saved once."""
        for name, source in getattr(self.model, "all_tied_weights_keys", {}).items():
            if state_dict is not None and name in state_dict and source in state_dict:
                state_dict[name] = state_dict[source]
        super()._save(output_dir, state_dict)


def _mark(part: Path) -> None:
    """Makes the folder `part` with an empty record, which tells a later run that it may be removed."""
    # Files of another save of this step would become a part of this one.
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / RECORD).write_text("{}")


def _remove_interrupted(folder: Path) -> list[str]:
    """Removes what interrupted saves left in `folder`, and returns the names. Other files stay."""
    found = sorted(record.parent for record in folder.glob(f"*checkpoint-*/{RECORD}"))
    for part in found:
        shutil.rmtree(part)
    _remove_if_empty(folder)
    return [part.name for part in found]


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _move(part: Path, final: Path) -> None:
    replaced = part.with_name(f"replaced-{part.name}")
    if final.exists():
        # A run that started anew meets its old checkpoint: a folder that is not empty cannot be renamed over.
        os.replace(final, replaced)
    try:
        os.replace(part, final)
    except FileNotFoundError:
        # On a disk that nodes share, another node may have moved it already.
        if not final.exists():
            raise
    shutil.rmtree(replaced, ignore_errors=True)
    _remove_if_empty(part.parent)
