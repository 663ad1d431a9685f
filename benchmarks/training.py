"""Training step and whole run: ours in each layout, TRL's ORPOTrainer, plain and with `orpo.integrations.trl.patch()`
("trl orpo patched"), and TRL's SFTTrainer on the chosen half.

    python -m benchmarks.run --group training --model FOLDER --data pairs.jsonl     all of it, float32 and bfloat16
    python -m benchmarks.training --model FOLDER --data pairs.jsonl --dtype bfloat16
    python -m benchmarks.training --model FOLDER --shares 10,50,90                  random words, so much of them prompt
    python -m benchmarks.training --kinds "ours shared,ours shared (strips)"        the demonstration's model
    python -m benchmarks.training --quick

FOLDER is any local copy of a causal language model with its tokenizer, for example SmolLM2-135M-Instruct as
`hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir FOLDER` leaves it. Without `--data` the pairs
are random words as many as real answers have (cases.py). All trainers get the same rows, the same batch size, the
same start and the same order. They take turns, in another order each round, each for some steps from the same weights;
a time is that of one optimizer step, its batches already made (the whole run has their making in it). Before any time
stands, ours has to give TRL's loss at the first step. Memory is the most that a process of its own held over the same
steps, weights and optimizer included: on a CPU resident, with the interpreter, on a GPU allocated there.
bfloat16 is `bf16=True`, mixed precision over float32 weights, for all. `(strips)` is `logits_budget=0`.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import results
from .measure import orders, summary, synchronize
from .training_data import LONGEST, SHARED_TOTAL, load_all

LAYOUTS = ("padded", "packed", "shared")
STRIPS = " (strips)"
PATCHED = "trl orpo patched"
KINDS = (*(f"ours {layout}" for layout in LAYOUTS), "trl orpo", PATCHED, "trl sft")
SHARE_KINDS = tuple(kind for kind in KINDS if kind not in ("ours padded", PATCHED))
BATCH, STEPS, ROUNDS = 4, 3, 3
# Relative difference between our first loss and TRL's beyond which one of them computes something else: the odds ratio
# is a hundredth of it.
SAME_LOSS = {"float32": 1e-4, "bfloat16": 2e-3}
SHARES = (10, 30, 50, 70, 90)
# Options that leave no room for others.
ALONE = {"quick": "it is the small model, one round, in float32", "shares": "its pairs are random words"}


def make_trainer(
    kind: str, model: Any, tokenizer: Any, rows: list[dict], folder: str, batch: int, longest: int, dtype: str
) -> Any:
    """The trainer called `kind`, over `model` itself."""
    import datasets

    common = dict(
        output_dir=folder, per_device_train_batch_size=batch, max_steps=len(rows) // batch, learning_rate=1e-5,
        use_cpu=not torch.cuda.is_available(), bf16=dtype == "bfloat16", gradient_checkpointing=False, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, max_length=longest, seed=0,
    )  # fmt: skip
    data = datasets.Dataset.from_list(rows)
    if kind == "trl sft":
        from trl import SFTConfig, SFTTrainer

        data = data.rename_column("chosen", "completion").remove_columns("rejected")
        arguments = SFTConfig(**common, completion_only_loss=False)
        return SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    if kind in ("trl orpo", PATCHED):
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer(model, args=ORPOConfig(**common), train_dataset=data, processing_class=tokenizer)
    from orpo import ORPOConfig, ORPOTrainer

    layout = kind.removeprefix("ours ").removesuffix(STRIPS)
    arguments = ORPOConfig(**common, layout=layout, logits_budget=0 if kind.endswith(STRIPS) else None)
    return ORPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)


@contextmanager
def patched(kind: str) -> Iterator[None]:
    """TRL's trainers with our loss in the block, where `kind` says so."""
    if kind != PATCHED:
        yield
        return
    from orpo.integrations import trl

    trl.patch()
    try:
        yield
    finally:
        trl.unpatch()


def train(trainer: Any) -> tuple[list[float], float, float]:
    """(seconds of each optimizer step, seconds of the whole call, loss of the first step)."""
    from transformers import TrainerCallback

    begins, ends = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            synchronize()
            begins.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            synchronize()
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    start = time.perf_counter()
    trainer.train()
    whole = time.perf_counter() - start
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return [b - a for a, b in zip(begins, ends, strict=True)], whole, first


def peak_alone(kind: str, source: dict[str, Any], batch: int, longest: int, dtype: str) -> dict[str, int]:
    """Most bytes that a process of its own holds while it trains: "peak_bytes" of a GPU, or "peak_resident_bytes"."""
    # A fork would start with this process's memory.
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_train_alone, (kind, source, batch, longest, dtype, torch.get_num_threads()))


def _train_alone(
    kind: str, source: dict[str, Any], batch: int, longest: int, dtype: str, threads: int
) -> dict[str, int]:
    torch.set_num_threads(threads)
    model, tokenizer, rows = load_all(**source)
    with tempfile.TemporaryDirectory() as out, patched(kind):
        train(make_trainer(kind, model, tokenizer, rows, out, batch, longest, dtype))
    if torch.cuda.is_available():
        return {"peak_bytes": torch.cuda.max_memory_allocated()}
    # Not getrusage's: that begins with the memory of who started the process. Only Linux has the file.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return {"peak_resident_bytes": next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)}


def measure(
    folder: str | None,
    data: str | None,
    batch: int = BATCH,
    steps: int = STEPS,
    rounds: int = ROUNDS,
    longest: int = LONGEST,
    dtype: str = "float32",
    share: int | None = None,
    kinds: tuple[str, ...] = KINDS,
    memory: bool = False,
) -> list[dict[str, object]]:
    """One record for each trainer, for a step and for the whole call.

    Args:
        share: percent of each sequence that is prompt, in random words; None takes `data`.
        kinds: the trainers, "trl orpo" among them.
        memory: whether each trainer runs once more in a process of its own, to see what it holds.

    Raises:
        ValueError: ours and TRL's ORPO differ in the loss of the first step.
    """
    source = dict(folder=folder, data=data, count=batch * steps, longest=longest, share=share)
    model, tokenizer, rows = load_all(**source)
    times: dict[str, dict[str, list[float]]] = {kind: {"training step": [], "whole run": []} for kind in kinds}
    losses: dict[str, float] = {}
    for order in orders(kinds, rounds):
        for kind in order:
            with tempfile.TemporaryDirectory() as out, patched(kind):
                trainer = make_trainer(kind, copy.deepcopy(model), tokenizer, rows, out, batch, longest, dtype)
                seconds, whole, losses[kind] = train(trainer)
            # The first step of a process allocates for the first time.
            times[kind]["training step"].append(sum(seconds[1:]) / len(seconds[1:]))
            times[kind]["whole run"].append(whole)
    for kind in kinds:
        off = abs(losses[kind] - losses["trl orpo"])
        if kind.startswith(("ours", PATCHED)) and off > SAME_LOSS[dtype] * abs(losses["trl orpo"]):
            raise ValueError(f"first loss of {kind} is {losses[kind]}, of TRL's ORPOTrainer {losses['trl orpo']}")
    held = {kind: peak_alone(kind, source, batch, longest, dtype) for kind in kinds} if memory else {}
    words = f"random words, {share} % prompt" if share is not None else "random words of real lengths"
    shape = {
        "head": os.path.basename(os.path.normpath(folder)) if folder else "1M parameters",
        "pairs": batch,
        "positions": longest if share is None else SHARED_TOTAL,
        "prompt": share,
        # With its folder: a file of pairs may be called anything.
        "data": "/".join(Path(data).parts[-2:]) if data and share is None else words,
        "dtype": dtype,
        "status": "measured",
        "rounds": rounds,
    }
    records = []
    for what, pairs in (("training step", batch), ("whole run", batch * steps)):
        for kind in kinds:
            seconds = times[kind][what]
            figures = summary(seconds, times["trl orpo"][what])
            figures |= {"seconds": seconds, "pairs_per_second": pairs / figures["median"], "first_loss": losses[kind]}
            records.append({**shape, "kind": what, "peer": kind, **figures, **held.get(kind, {})})
    return records


def show(records: list[dict]) -> None:
    for r in records:
        figures = f"{r['median']:8.3f} s  x{r['ratio']:5.2f}  {r['pairs_per_second']:8.2f} pairs/s"
        print(f"{r['kind']:14s} {r['peer']:12s} {figures}")


def run(
    folder: str | None,
    data: str | None = None,
    *,
    shares: tuple[int, ...] = (),
    dtypes: tuple[str, ...] = (),
    rounds: int = ROUNDS,
    kinds: tuple[str, ...] = (),
) -> None:
    """Measure, store and print the trainers in each dtype: on the data, or on random words for each share of prompt."""
    for dtype in dtypes or (("float32",) if shares else tuple(SAME_LOSS)):
        for share in shares or (None,):
            how = dict(memory=True) if share is None else dict(share=share, steps=2)
            chosen = kinds or (KINDS if share is None else SHARE_KINDS)
            records = measure(folder, data, dtype=dtype, rounds=rounds, kinds=chosen, **how)
            results.append("training", records)
            show(records)


def percents(text: str) -> tuple[int, ...]:
    shares = tuple(int(share) for share in text.split(","))
    if wrong := [share for share in shares if not 1 <= share <= 99]:
        # Each leaves a token to the prompt and one to the answer.
        raise argparse.ArgumentTypeError(f"a share is 1 to 99 %, not {wrong[0]}")
    return shares


def names_of(*known: str) -> Callable[[str], tuple[str, ...]]:
    """What reads some of `known`, with commas, each once."""

    def names(text: str) -> tuple[str, ...]:
        if wrong := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(known)}")
        return tuple(dict.fromkeys(text.split(",")))

    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model (default: the variable ORPO_BENCH_MODEL)")
    parser.add_argument("--data", help="pairs as JSONL or parquet, or a hub name")
    parser.add_argument("--dtype", type=names_of(*SAME_LOSS), help="default: both; with --shares float32")
    parser.add_argument("--shares", type=percents, help="percent of prompt in random words, with commas")
    known = (*KINDS, *(f"ours {layout}{STRIPS}" for layout in LAYOUTS))
    parser.add_argument("--kinds", type=names_of(*known), help=f"of {', '.join(known)}; trl orpo always runs")
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}")
    parser.add_argument("--quick", action="store_true", help="the 1M-parameter model, two pairs a batch, two steps")
    options = parser.parse_args()
    given = {name for name, value in vars(options).items() if value is not None and value is not False}
    for one, excluded in (("quick", {"model", "data", "dtype", "shares", "rounds"}), ("shares", {"data"})):
        if one in given and (others := sorted(given & excluded)):
            parser.error(f"--{one} has no --{others[0]}: {ALONE[one]}")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; it is at least 1")
    # The others are held against it.
    kinds = tuple(dict.fromkeys([*options.kinds, "trl orpo"])) if options.kinds else ()
    if options.quick:
        show(measure(None, None, batch=2, steps=2, rounds=1, longest=200, kinds=kinds or KINDS))
        return
    model = options.model or os.environ.get("ORPO_BENCH_MODEL")
    settings = dict(shares=options.shares or (), dtypes=options.dtype or (), rounds=options.rounds or ROUNDS)
    run(model, options.data, **settings, kinds=kinds)


if __name__ == "__main__":
    main()
