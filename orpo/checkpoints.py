"""Checkpoints that are whole or absent, which of them a run resumes from, and how many stay."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.fsdp import StateDictType
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from orpo.disk import DiskSpace, readable
from orpo.run_record import compare_runs, describe_run, read_record, write_record
from orpo.sharding import from_rank_0, fsdp_plugin

# Begins with an underscore, since Trainer leaves such names out of what it uploads to the hub.
INCOMPLETE = "_incomplete"
# Trainer's own sign, in the folder of a checkpoint that it saves on SIGTERM.
JIT_SIGN = "checkpoint-is-incomplete.txt"


def complete_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints in `folder` that were written to their end, oldest first.

    Those with a record of their run are ordered by when they were saved, and are newer than those without, which
    are ordered by step: a run that was started anew in the folder of a longer one has the newest.
    """
    found = []
    for path in Path(folder).glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if step and is_complete(path):
            found.append(((read_record(path) or {}).get("saved_at", 0.0), int(step[1]), path))
    return [path for *_, path in sorted(found)]


def is_complete(checkpoint: Path) -> bool:
    """Whether `checkpoint` has the trainer's state, whole.

    :class:`CheckpointingTrainer` gives a folder this name once everything is in it. A plain Trainer writes the state
    last of what its first process writes, so that its interrupted saves are seen too, where only one process saved.
    """
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return not (checkpoint / JIT_SIGN).exists()


def find_checkpoint(wanted: str | bool | None, output_dir: str | Path) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` means, or None for a new run.

    Args:
        wanted: True, the newest complete checkpoint in `output_dir`; "auto", the same if there is one; a folder of
            checkpoints, for the newest in it; or a checkpoint. None and False are a new run.
        output_dir: where the run saves.

    Raises:
        ValueError: there is none, or it cannot be resumed.
    """
    if wanted is None or wanted is False:
        return None
    own = wanted is True or wanted == "auto"
    folder = Path(output_dir) if own else Path(wanted)
    found = complete_checkpoints(folder)
    if not found and not own and is_complete(folder):
        found = [folder]
    if not found:
        if wanted == "auto":
            return None
        raise ValueError(f"resume_from_checkpoint: {folder} holds no complete checkpoint to resume from")
    if not any(path.name.startswith(("optimizer", "global_step")) for path in found[-1].iterdir()):
        raise ValueError(
            f"{found[-1]} holds the model alone (save_only_model), without which the optimizer cannot go on: "
            "give another output_dir, or resume_from_checkpoint false to start anew"
        )
    return found[-1]


class CheckpointingTrainer(Trainer):
    """``Trainer`` whose checkpoints are complete from the moment they have their name.

    They are written to ``output_dir/_incomplete`` and moved when every process has written its part, and only then are
    older ones removed for ``save_total_limit``: a run that is killed at any time leaves the checkpoint before. This
    guards against the end of processes, not of the machine: nothing is forced out of the system's file cache.
    """

    _saving = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(DiskSpace())

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """``Trainer.train``, resumed from what :func:`find_checkpoint` finds.

        Raises:
            ValueError: there is no such checkpoint, or it is of a run with settings that this one does not have.
        """
        if kwargs.get("trial") is not None:
            # A search makes the trial's model in there, and says itself what a trial goes on from.
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self._run_settings = describe_run(self)
        # Of one rank: folders seen over a network may differ, and a rank that starts anew alone would hang the rest.
        checkpoint = from_rank_0(self.accelerator, lambda: self._choose_checkpoint(resume_from_checkpoint))
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _choose_checkpoint(self, wanted: str | bool | None) -> str | None:
        folder = Path(self.args.output_dir)
        report = print if self.args.should_log else lambda _: None
        checkpoint = find_checkpoint(wanted, folder)
        if (folder / INCOMPLETE).is_dir():
            names = sorted(path.name for path in (folder / INCOMPLETE).iterdir())
            shutil.rmtree(folder / INCOMPLETE)
            if names:
                report(f"{folder}: the save of {', '.join(names)} was interrupted; what there was of it is removed")
        complete = complete_checkpoints(folder)
        broken = sorted(p.name for p in folder.glob("checkpoint-*") if p.is_dir() and p not in complete)
        if broken:
            report(f"{folder}: {', '.join(broken)} was not written to its end and is ignored")
        if checkpoint is None:
            if complete:
                report(f"starts anew; {folder} holds checkpoints of an earlier run, the newest {complete[-1].name}")
            return None
        note = compare_runs(checkpoint, self._run_settings)
        report(f"resumes from {checkpoint}{note}")
        return str(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, INCOMPLETE) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        part, final = folder / INCOMPLETE / name, folder / name
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(part):
                self.state.best_model_checkpoint = str(final)
                if self.args.should_save:
                    self.state.save_to_json(str(part / TRAINER_STATE_NAME))
            if self.args.should_save:
                write_record(part, self._run_settings)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _move(part, final)
        except BaseException as error:
            shutil.rmtree(part, ignore_errors=True)
            error.add_note(_failure(name, folder))
            raise
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0 and part.is_dir():
            # A node with a disk of its own, where the first process of the run moves nothing.
            _move(part, final)
        if self.args.should_save:
            self._remove_old(folder)
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(final))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saving:
            super()._push_from_checkpoint(checkpoint_folder)

    def _remove_old(self, folder: Path) -> None:
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        complete = complete_checkpoints(folder)
        kept = {complete[-1], Path(self.state.best_model_checkpoint or complete[-1])}
        removable = [path for path in complete if path not in kept]
        for path in removable[: max(len(complete) - max(limit, len(kept)), 0)]:
            shutil.rmtree(path, ignore_errors=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """``Trainer.save_model``, which writes no model under FSDP with a sharded state dict; this one does.

        A checkpoint keeps the shards alone.
        """
        plugin = fsdp_plugin(self.accelerator)
        if plugin is None or _internal_call or plugin.state_dict_type == StateDictType.FULL_STATE_DICT:
            super().save_model(output_dir, _internal_call)
            return
        before, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.state_dict_type = before


def _move(part: Path, final: Path) -> None:
    replaced = part.with_name(f"replaced-{part.name}")
    if final.exists():
        # Of a run that was started anew: a folder that is not empty cannot be renamed over.
        os.replace(final, replaced)
    try:
        os.replace(part, final)
    except FileNotFoundError:
        # Another node was first, on a disk that the nodes share.
        if not final.exists():
            raise
    shutil.rmtree(replaced, ignore_errors=True)
    if not any(part.parent.iterdir()):
        part.parent.rmdir()


def _failure(name: str, folder: Path) -> str:
    complete = complete_checkpoints(folder)
    left = f"{complete[-1]} is whole, and the run resumes from it" if complete else "there is none before it"
    free = f"{readable(shutil.disk_usage(folder).free)} free" if folder.is_dir() else "the folder is gone"
    return f"{name} could not be saved in {folder} ({free}); {left}"
