"""A short run on one or two processes, of which one may be killed, and its continuation.

The processes are forked from one that has imported everything; `start` returns how they ended.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import torch
from run_ranks import let_accelerate_shard_on_cpu
from tiny import SEVEN, make_model, make_tokenizer
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from orpo import ORPOConfig, ORPOTrainer

KILLED = -signal.SIGKILL


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


class KillInTraining(TrainerCallback):
    """The last process ends after its fifth step, between the saves of steps 4 and 6."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 5 and args.process_index == args.world_size - 1:
            kill_this_process()


def kill_in_save(trainer):
    """The last process ends at step 4 while it still has to write its part, after the first has written its last file.

    A single process writes everything itself and then ends.
    """
    plain, folder = trainer._save_rng_state, Path(trainer.args.output_dir)

    def state_of_step_4():
        return [path for path in folder.rglob("trainer_state.json") if path.parent.name == "checkpoint-4"]

    def save_rng_state(output_dir):
        if trainer.state.global_step < 4 or trainer.args.process_index < trainer.args.world_size - 1:
            plain(output_dir)
        elif trainer.args.world_size == 1:
            trainer.accelerator.wait_for_everyone = kill_this_process
            plain(output_dir)
        else:
            limit = time.monotonic() + 30
            while not state_of_step_4() and time.monotonic() < limit:
                time.sleep(0.02)
            kill_this_process()

    trainer._save_rng_state = save_rng_state


def make_args(folder, ranks=1, sharded=None, **settings):
    fsdp = {}
    if sharded:
        fsdp_config = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "cpu_ram_efficient_loading": False}
        fsdp = {"fsdp": True, "fsdp_config": {**fsdp_config, "state_dict_type": sharded}}
    defaults = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2 // ranks,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "save_total_limit": 1,
        "disable_dropout": False,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return ORPOConfig(**{**defaults, **fsdp, **settings})


def process(rank, ranks, port, folder, kill, resume, options):
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # The store is the launcher's, as torchrun has it: that of rank 0 would be gone while others still end.
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    torch.set_num_threads(1)
    if options.get("sharded"):
        let_accelerate_shard_on_cpu()
    with open(folder / f"printed-{rank}.txt", "w") as out, contextlib.redirect_stdout(out):
        # Dropout shows whether random states were resumed.
        model = make_model("llama", tie_word_embeddings=True, attention_dropout=0.2)
        pairs = options.pop("train_dataset", SEVEN)
        args = make_args(folder / "out", ranks, **options)
        trainer = ORPOTrainer(model, args, train_dataset=pairs, tokenizer=make_tokenizer())
        if kill == "training":
            trainer.add_callback(KillInTraining())
        elif kill == "save":
            kill_in_save(trainer)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
    if rank == 0:
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        sharded = sum(isinstance(module, FSDPModule) for module in trainer.model.modules())
        seen = {"losses": losses, "sharded": sharded, "first_step": trainer._initial_global_step}
        (folder / "seen.json").write_text(json.dumps(seen))
    if ranks > 1:
        # All is written, and threads of the process group may wait for a rank that has ended.
        os._exit(0)


def start(folder, ranks=1, kill=None, resume=None, **options):
    """(exit codes, what rank 0 saw or None, what rank 0 printed)."""
    folder.mkdir(exist_ok=True)
    (folder / "seen.json").unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    # The server of the forks reads it, and finds this file and what the tests' own interpreter found.
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(Path(__file__).parent), *filter(None, sys.path)]))
    context.set_forkserver_preload([Path(__file__).stem])
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    processes = [
        context.Process(target=process, args=(rank, ranks, port, folder, kill, resume, options))
        for rank in range(ranks)
    ]
    for child in processes:
        child.start()
    limit = time.monotonic() + 120
    while any(child.is_alive() for child in processes) and time.monotonic() < limit:
        if any(child.exitcode for child in processes):
            # As a launcher does: the others wait for the one that is gone.
            limit = min(limit, time.monotonic() + 1)
        time.sleep(0.05)
    for child in processes:
        child.kill()
        child.join()
    seen = folder / "seen.json"
    return (
        [child.exitcode for child in processes],
        json.loads(seen.read_text()) if seen.exists() else None,
        (folder / "printed-0.txt").read_text(),
    )
