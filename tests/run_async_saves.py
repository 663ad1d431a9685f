"""Short runs of FSDP2 on two ranks that save in shards, and writers of shards that wait, fail or end their process.

The processes are those of run_forked.
"""

import contextlib
import errno
import os
import signal
import time
from pathlib import Path

import torch.distributed as dist
from run_ranks import EIGHT, make_trainer, whole_weights
from torch.distributed.checkpoint import FileSystemWriter
from transformers import TrainerCallback

import orpo.runs.checkpoints as checkpoints
from orpo.runs.find_checkpoint import complete_checkpoints

SHARDED = {"fsdp": {"state_dict_type": "SHARDED_STATE_DICT"}}
SAVING = {
    **SHARDED,
    "max_steps": 6,
    "optim": "adamw_torch",
    "save_strategy": "steps",
    "save_steps": 2,
    # Dropout shows whether random states were resumed.
    "disable_dropout": False,
    "model": {"attention_dropout": 0.2},
}


def is_last_rank():
    return dist.get_rank() == dist.get_world_size() - 1


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


def no_space():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def before_shards(step, act):
    """Lets every rank call ``act(is the optimizer's)`` before it writes its shards of `step`."""
    plain = FileSystemWriter.write_data

    def write_data(self, plan, planner):
        if Path(self.path).parent.name == f"checkpoint-{step}":
            act(Path(self.path).name.startswith("optimizer"))
        return plain(self, plan, planner)

    FileSystemWriter.write_data = write_data


def before_record(step, act):
    """Lets rank 0 call `act` before it writes the record of `step`."""
    plain = checkpoints.write_record

    def write_record(part, *arguments, **options):
        if part.name == f"checkpoint-{step}":
            act()
        plain(part, *arguments, **options)

    checkpoints.write_record = write_record


def plant(place):
    """What `place` says happens in the save of a step: kill or fail, in the last rank's shards or rank 0's record."""
    kind, where, step = place.split()
    act = kill_this_process if kind == "kill" else no_space
    if where == "record":
        before_record(int(step), act)
    else:
        before_shards(int(step), lambda optimizer: act() if optimizer and is_last_rank() else None)


def run(folder, options, place=None, resume=None):
    """Trains; what this rank saw."""
    trainer, _ = make_trainer(folder, train=EIGHT, **{**SAVING, **options})
    if place:
        plant(place)
    error = None
    try:
        trainer.train(resume_from_checkpoint=resume)
    except RuntimeError as raised:
        if not place:
            raise
        error = "\n".join([type(raised).__name__, str(raised), *raised.__notes__])
    return seen_by(trainer, folder) | {"error": error, "interrupted": trainer.interrupted}


def seen_by(trainer, folder):
    return {
        "losses": {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry},
        "weights": whole_weights(trainer.model),
        "best": trainer.state.best_model_checkpoint,
        "step": trainer.state.global_step,
        "complete": [path.name for path in complete_checkpoints(folder / "out")],
        "left": sorted(path.name for path in (folder / "out").iterdir()),
    }


def write_while_training_goes_on(folder, seconds):
    """The shards of step 2 are written only when this rank has begun to save step 4; what it saw meanwhile."""
    trainer, _ = make_trainer(folder, train=EIGHT, **SAVING, async_save=True)
    seen = {}

    def wait_for_training(optimizer):
        if optimizer:
            return
        end = time.monotonic() + 60
        while trainer.state.global_step < 4 and time.monotonic() < end:
            time.sleep(0.01)
        seen["reached"] = trainer.state.global_step
        end = time.monotonic() + seconds
        while trainer.state.global_step < 5 and time.monotonic() < end:
            time.sleep(0.01)
        # The next save waits for this one.
        seen["still at"] = trainer.state.global_step
        seen["complete"] = [path.name for path in complete_checkpoints(folder / "out")]

    before_shards(2, wait_for_training)
    trainer.train()
    return seen | {"at end": [path.name for path in complete_checkpoints(folder / "out")]}


def time_saves(folder, options, seconds):
    """How long each save kept this rank, where writing weights takes `seconds` more."""
    trainer, _ = make_trainer(folder, train=EIGHT, **{**SAVING, "save_steps": 3, "max_steps": 3, **options})
    before_shards(3, lambda optimizer: None if optimizer else time.sleep(seconds))
    plain, waits = trainer._save_checkpoint, []

    def save_checkpoint(*arguments):
        start = time.perf_counter()
        plain(*arguments)
        waits.append(time.perf_counter() - start)

    trainer._save_checkpoint = save_checkpoint
    trainer.train()
    return waits


class Ending(TrainerCallback):
    """In step 3: an error on all ranks after it, or what the handler of SIGTERM does in the end, on rank 0."""

    def __init__(self, way, trainer):
        self.way = way
        self.managers = [c.jit_manager for c in trainer.callback_handler.callbacks if hasattr(c, "jit_manager")]

    def on_optimizer_step(self, args, state, control, **_):
        if state.global_step == 2 and self.way == "signal" and args.process_index == 0:
            self.managers[0].is_checkpoint_requested = True

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3 and self.way == "error":
            raise RuntimeError("enough")


def end_while_writing(folder, way, place=None):
    """The save of step 2 is written a second after training has ended in the `way` of :class:`Ending`."""
    jit = {"enable_jit_checkpoint": True} if way == "signal" else {}
    trainer, _ = make_trainer(folder, train=EIGHT, **SAVING, **jit, async_save=True)
    trainer.add_callback(Ending(way, trainer))

    def write_late(optimizer):
        end = time.monotonic() + 60
        while not optimizer and trainer.state.global_step < 3 and time.monotonic() < end:
            time.sleep(0.01)
        if not optimizer:
            time.sleep(1)
        elif place and is_last_rank():
            no_space()

    before_shards(2, write_late)
    notes = []
    with contextlib.suppress(RuntimeError):
        try:
            trainer.train()
        except RuntimeError as error:
            notes = [str(error), *getattr(error, "__notes__", [])]
            raise
    return seen_by(trainer, folder) | {"said": "\n".join(notes), "interrupted": trainer.interrupted}
