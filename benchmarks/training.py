"""Training step and whole run: ours in each layout, TRL's ORPOTrainer, and TRL's SFTTrainer on the chosen half.

    python -m benchmarks.run --group training --model FOLDER --data pairs.jsonl     all of it, float32 and bfloat16
    python -m benchmarks.training --model FOLDER --data pairs.jsonl --dtype bfloat16
    python -m benchmarks.training --model FOLDER --shares 10,50,90                  random words, so much of them prompt
    python -m benchmarks.training --kinds "ours shared,ours shared (strips)"        the demonstration's model
    python -m benchmarks.training --quick

FOLDER is any local copy of a causal language model with its tokenizer, for example SmolLM2-135M-Instruct as
`huggingface-cli download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir FOLDER` leaves it. Without `--data` the pairs
are random words as many as real answers have (lengths.py). All trainers get the same rows, the same batch size, the
same start and the same order. They take turns, each for some steps from the same weights; a time is that of one
optimizer step, data loading included. Before any time stands, ours has to give TRL's loss at the first step. Memory is
the most that a process of its own held resident over the same steps, interpreter, weights and optimizer included.
bfloat16 is `bf16=True`, mixed precision over float32 weights, for all. `(strips)` is `logits_budget=0`.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from . import lengths, results
from .measure import stamp, summary, synchronize

LAYOUTS = ("padded", "packed", "shared")
STRIPS = " (strips)"
KINDS = (*(f"ours {layout}" for layout in LAYOUTS), "trl orpo", "trl sft")
BATCH, STEPS, ROUNDS, LONGEST = 4, 3, 3, 512
# Relative difference between our first loss and TRL's beyond which one of them computes something else.
SAME_LOSS = {"float32": 1e-4, "bfloat16": 2e-2}
# Tokens of a sequence where the share of the prompt is given.
SHARED_TOTAL = 256
SHARES = (10, 30, 50, 70, 90)


def load(folder: str | None) -> tuple[Any, Any]:
    """(model in float32, tokenizer) of a local folder; without one the demonstration's model of 1M parameters."""
    if folder:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    from orpo.demo.model import build_model, train_tokenizer

    tokenizer = train_tokenizer([f" {chr(97 + i)}{chr(97 + j)}" for i in range(8) for j in range(8)] * 3)
    return build_model(tokenizer, seed=0), tokenizer


def synthetic_pairs(
    tokenizer: Any, count: int, longest: int, seed: int = 0, share: int | None = None
) -> list[dict[str, str]]:
    """Pairs of random words, each word one token, as long as those of the data set, or with `share` % of prompt."""
    g = random.Random(seed)
    single = [w for w in tokenizer.get_vocab() if w.startswith("Ġ") and w[1:].isascii() and w[1:].isalpha()]
    words = sorted(word[1:] for word in single)

    def text(tokens: int) -> str:
        return "".join(f" {g.choice(words)}" for _ in range(max(tokens, 1)))

    if share is None:
        drawn = lengths.draw(count, seed, longest)
    else:
        prompt = SHARED_TOTAL * share // 100
        drawn = [(prompt, SHARED_TOTAL - prompt, SHARED_TOTAL - prompt)] * count
    # Of the counted tokens one is BOS and one EOS.
    return [dict(prompt=text(p - 1), chosen=text(c - 1), rejected=text(r - 1)) for p, c, r in drawn]


def pairs_of(data: str | None, tokenizer: Any, count: int, longest: int) -> list[dict[str, str]]:
    """`count` pairs of strings that no trainer cuts or drops."""
    if data is None:
        return synthetic_pairs(tokenizer, count, longest)
    from orpo.formats import UnusableRow, pair_text
    from orpo.sources import load_pairs

    out: list[dict[str, str]] = []
    for row in load_pairs(data, "train"):
        try:
            text = pair_text(row, tokenizer)
        except UnusableRow:
            continue
        sides = [len(tokenizer(text.chosen_prompt + answer)["input_ids"]) for answer in (text.chosen, text.rejected)]
        if text.chosen_prompt == text.rejected_prompt and max(sides) + 2 <= longest:
            out.append(dict(prompt=text.chosen_prompt, chosen=text.chosen, rejected=text.rejected))
        if len(out) == count:
            return out
    raise ValueError(f"data has {len(out)} pairs of at most {longest} tokens; {count} are needed")


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
    if kind == "trl orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer(model, args=ORPOConfig(**common), train_dataset=data, processing_class=tokenizer)
    from orpo import ORPOConfig, ORPOTrainer

    layout = kind.removeprefix("ours ").removesuffix(STRIPS)
    arguments = ORPOConfig(**common, layout=layout, logits_budget=0 if kind.endswith(STRIPS) else None)
    return ORPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)


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


def peak_resident(kind: str, source: dict[str, Any], batch: int, longest: int, dtype: str) -> int:
    """Most bytes that a process of its own holds resident while it trains on the rows; 0 where /proc is not Linux's."""
    # A fork would start with this process's memory.
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_train_alone, (kind, source, batch, longest, dtype, torch.get_num_threads()))


def _train_alone(kind: str, source: dict[str, Any], batch: int, longest: int, dtype: str, threads: int) -> int:
    torch.set_num_threads(threads)
    model, tokenizer, rows = load_all(**source)
    with tempfile.TemporaryDirectory() as out:
        train(make_trainer(kind, model, tokenizer, rows, out, batch, longest, dtype))
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0


def load_all(folder: str | None, data: str | None, count: int, longest: int, share: int | None) -> tuple:
    model, tokenizer = load(folder)
    if share is not None:
        return model, tokenizer, synthetic_pairs(tokenizer, count, longest, share=share)
    return model, tokenizer, pairs_of(data, tokenizer, count, longest)


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
    for _ in range(rounds):
        for kind in kinds:
            with tempfile.TemporaryDirectory() as out:
                trainer = make_trainer(kind, copy.deepcopy(model), tokenizer, rows, out, batch, longest, dtype)
                seconds, whole, losses[kind] = train(trainer)
            # The first step of a process allocates for the first time.
            times[kind]["training step"].append(sum(seconds[1:]) / len(seconds[1:]))
            times[kind]["whole run"].append(whole)
    for kind in kinds:
        off = abs(losses[kind] - losses["trl orpo"])
        if kind.startswith("ours") and off > SAME_LOSS[dtype] * abs(losses["trl orpo"]):
            raise ValueError(f"first loss of {kind} is {losses[kind]}, of TRL's ORPOTrainer {losses['trl orpo']}")
    held = {kind: peak_resident(kind, source, batch, longest, dtype) for kind in kinds} if memory else {}
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
    return [
        {
            **shape,
            "kind": what,
            "peer": kind,
            **summary(times[kind][what], times["trl orpo"][what]),
            "seconds": times[kind][what],
            "pairs_per_second": (batch if what == "training step" else batch * steps)
            / summary(times[kind][what])["median"],
            "first_loss": losses[kind],
            "peak_resident_bytes": held.get(kind),
            **stamp(),
        }
        for what in ("training step", "whole run")
        for kind in kinds
    ]


def show(records: list[dict]) -> None:
    for r in records:
        figures = f"{r['median']:8.3f} s  x{r['ratio']:5.2f}  {r['pairs_per_second']:8.2f} pairs/s"
        print(f"{r['kind']:14s} {r['peer']:12s} {figures}")


def run(
    folder: str | None,
    data: str | None,
    dtypes: tuple[str, ...] = tuple(SAME_LOSS),
    rounds: int = ROUNDS,
    kinds: tuple[str, ...] = KINDS,
) -> None:
    """Measure, store and print the trainers on the data, in each dtype."""
    for dtype in dtypes:
        keep(measure(folder, data, dtype=dtype, rounds=rounds, memory=True, kinds=kinds))


def run_shares(folder: str | None, shares: tuple[int, ...] = SHARES, rounds: int = ROUNDS) -> None:
    """The same on random words, for each share of prompt, in float32."""
    kinds = tuple(kind for kind in KINDS if kind != "ours padded")
    for share in shares:
        keep(measure(folder, None, share=share, rounds=rounds, steps=2, kinds=kinds))


def keep(records: list[dict]) -> None:
    results.append("training", records)
    show(records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = os.environ.get("ORPO_BENCH_MODEL")
    parser.add_argument("--model", default=own, help="folder of a model (default: the variable ORPO_BENCH_MODEL)")
    parser.add_argument("--data", help="pairs as JSONL or parquet, or a hub name")
    parser.add_argument("--dtype", default="float32,bfloat16", help="float32, bfloat16, or both with a comma")
    parser.add_argument("--shares", default="", help="percent of prompt in random words, with commas, instead of data")
    known = (*KINDS, *(f"ours {layout}{STRIPS}" for layout in LAYOUTS))
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(known)}; trl orpo always runs")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="the 1M-parameter model, two pairs a batch, two steps")
    options = parser.parse_args()
    if options.quick:
        show(measure(None, None, batch=2, steps=2, rounds=1, longest=200))
        return
    if options.shares:
        run_shares(options.model, tuple(int(share) for share in options.shares.split(",")), options.rounds)
    else:
        kinds = tuple(dict.fromkeys([*options.kinds.split(","), "trl orpo"]))
        if wrong := [kind for kind in kinds if kind not in known]:
            raise SystemExit(f"--kinds {wrong[0]!r} is none of {', '.join(known)}")
        run(options.model, options.data, tuple(options.dtype.split(",")), options.rounds, kinds)


if __name__ == "__main__":
    main()
