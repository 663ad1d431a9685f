"""Where the time of a training step goes: attention, other layers, loss, optimizer, data.

    python -m benchmarks.step_profile --model FOLDER --data pairs.jsonl
    python -m benchmarks.step_profile                                      the demonstration's model, random words

One optimizer step under torch's profiler, for each trainer. Every operator's own time goes to the first part that has
a word in its name or in that of an operator around it: a matmul of the loss belongs to the loss. Backward is included,
since autograd's nodes carry the names of what they differentiate. The profiler itself slows a step, one of many small
operators most: the shares of one trainer can be compared, the seconds of two cannot.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from typing import Any

import torch

from .training import BATCH, make_trainer
from .training_data import LONGEST, load_all

STEPS = 3
# In the order in which they claim an operator.
PARTS = {
    "optimizer": ("Optimizer.", "clip_grad", "_foreach_norm", "zero_grad"),
    "data": ("enumerate(DataLoader)",),
    "head and loss": ("orpo::", "linear_orpo", "log_softmax", "LogSoftmax", "logsumexp", "NllLoss", "cross_entropy"),
    "attention, softmax": ("scaled_dot_product", "ScaledDotProduct"),
    "linear layers": ("aten::linear", "AddmmBackward", "MmBackward", "aten::mm", "aten::addmm", "AccumulateGrad"),
}
OTHER = "other layers and copies"


def part_of(names: list[str]) -> str | None:
    """The first part that has a word in one of `names`, or None."""
    return next((part for part, words in PARTS.items() if any(w in name for w in words for name in names)), None)


def attribute(events: list[Any]) -> dict[str, float]:
    """Seconds of every part: each operator's own time, by its name and the names of the operators around it."""
    seconds: Counter[str] = Counter()
    for event in events:
        names, at = [], event
        while at is not None:
            names.append(at.name)
            at = at.cpu_parent
        seconds[part_of(names) or OTHER] += event.self_cpu_time_total / 1e6
    return dict(seconds)


def profile(trainer: Any) -> dict[str, float]:
    """Seconds of every part of the trainer's last step."""
    from torch.profiler import ProfilerActivity
    from transformers import TrainerCallback

    profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU])

    class Window(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            # The data of the next step is fetched before it begins, so the window opens where the last one ends.
            if state.global_step == args.max_steps - 1:
                profiler.start()
            elif state.global_step == args.max_steps:
                profiler.stop()

    trainer.add_callback(Window())
    trainer.train()
    return attribute(profiler.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=os.environ.get("ORPO_BENCH_MODEL"), help="folder of a model")
    parser.add_argument("--data", help="pairs as JSONL or parquet, or a hub name")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--trainers", default="ours shared,trl sft", help="with commas; as in benchmarks.training")
    options = parser.parse_args()
    for kind in options.trainers.split(","):
        model, tokenizer, rows = load_all(options.model, options.data, BATCH * STEPS, LONGEST, None)
        with tempfile.TemporaryDirectory() as out:
            seconds = profile(make_trainer(kind, model, tokenizer, rows, out, BATCH, LONGEST, options.dtype))
        whole = sum(seconds.values())
        print(f"{kind}: {whole:.2f} s")
        for part in (*PARTS, OTHER):
            print(f"  {part:24s} {seconds.get(part, 0):7.3f} s  {seconds.get(part, 0) / whole:6.1%}")


if __name__ == "__main__":
    main()
