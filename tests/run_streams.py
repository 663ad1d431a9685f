"""Runs on streams of files with unequal numbers of rows, in the processes that run_forked starts."""

import json
import os

import datasets
from datasets.distributed import split_dataset_by_node
from run_ranks import finish, make_trainer

from orpo.data import prepare
from orpo.data.pair_tokens import PairTokenizer


def write_files(folder, sizes):
    """A JSON lines file of each of `sizes`, of rows that differ in length."""
    files, row = [], 0
    for size in sizes:
        files.append(folder / f"{len(files)}.jsonl")
        rows = [
            {
                "prompt": f"{'how are you ' * (i % 4)}hello",
                "chosen": f" fine {i}",
                "rejected": f" go {'away ' * (i % 3)}{i}",
            }
            for i in range(row, row + size)
        ]
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
        row += size
    return [str(file) for file in files]


def read(folder, files, how=""):
    """The stream of `files`, as a rank has it that does one thing wrong, or none."""
    stream = datasets.load_dataset("json", data_files=files, split="train", streaming=True, cache_dir=folder / "cache")
    if how == "split":
        return split_dataset_by_node(stream, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    if how == "shuffled":
        # Without a seed every process draws its own.
        return stream.shuffle(seed=int(os.environ["RANK"]), buffer_size=100)
    return stream


def train(folder, files, how, options):
    """`run_ranks.finish` on a stream, evaluated on another one; and what ``predict`` gives."""
    trainer, seen = make_trainer(folder, train=read(folder, files, how), evaluate=read(folder, files[:1]), **options)
    seen = finish(trainer, seen)
    trainer.compute_metrics = lambda predictions: {}
    return {**seen, "predictions": trainer.predict(read(folder, files)).predictions}


def train_counted(folder, files, options, resume=None, fault=None):
    """Trains; the steps with their pairs and losses, and the rows that this rank tokenized in training, by number.

    Args:
        resume: a checkpoint.
        fault: a row whose tokenization fails.
    """
    prepare.ROWS_OF_A_STREAM = 4
    trainer, seen = make_trainer(folder, train=read(folder, files), eval_strategy="no", **options)
    counted, plain = [], PairTokenizer.__call__

    def call(self, rows, indices):
        counted.extend(indices)
        if fault in indices:
            raise RuntimeError(f"row {fault} cannot be read")
        return plain(self, rows, indices)

    PairTokenizer.__call__ = call
    trainer.train(resume_from_checkpoint=resume)
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return {"pair_ids": seen["pair_ids"], "losses": losses, "tokenized": counted}
