"""What a training step costs: forward passes, time and memory of SFT, ORPO, DPO and PPO on the same pairs.

    python -m benchmarks.paper.costs                            the demonstration's model
    python -m benchmarks.paper.costs --model FOLDER --data pairs.jsonl.gz --batch_size 4

DPO twice: with its frozen reference beside it in every step, and with the reference's sums computed before training,
which takes one more pass over the data and lets the second model go. PPO answers the pairs' prompts, asks reference and
reward model (of random weights, which cost the same), and makes one pass for each of its epochs. The methods take
turns, round by round. Weights are the models that a step needs, optimizer states not counted; working memory is the
most that a step allocates beyond them, gradients included.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn
from transformers import AutoModelForSequenceClassification

from benchmarks.measure import interleaved, peak_memory, stamp, summary

from . import methods, ppo
from .start import QUICK, Plan, Start, demonstration, from_files
from .train import RESULTS, count_calls, to_device

# Models that a step needs.
KINDS = {"sft": 1, "orpo": 1, "dpo": 2, "dpo precomputed": 1, "ppo": 3}


def steps_of(start: Start, pairs: int) -> tuple[dict[str, Callable[[], None]], list[int]]:
    """(one step without the optimizer for each kind, the counter of forward passes)."""
    calls = [0]
    model = start.model.train()
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    for m in (model, reference):
        count_calls(m, calls)
    examples = [start.train[i % len(start.train)] for i in range(pairs)]
    batches = {k: methods.layout_of(k, start.pad_token_id)(examples) for k in ("sft", "orpo")}
    known_S = methods.reference_sums(reference, to_device(batches["orpo"], model.device))

    def step(kind: str) -> Callable[[], None]:
        def run() -> None:
            batch = to_device(batches["sft" if kind == "sft" else "orpo"], model.device)
            sums = methods.reference_sums(reference, batch) if kind == "dpo" else known_S
            methods.loss_of(kind.split()[0], model, batch, 0.1, sums).backward()
            model.zero_grad()

        return run

    steps = {kind: step(kind) for kind in KINDS if kind != "ppo"}
    return {**steps, "ppo": _ppo_step(start, reference, examples, calls)}, calls


def _ppo_step(start: Start, reference: nn.Module, examples: list[dict], calls: list[int]) -> Callable[[], None]:
    """All that PPO does with a batch of prompts: the epochs take it whole."""
    model, tokenizer = start.model, start.tokenizer
    settings = replace(ppo.PPOSettings(), batch_size=len(examples), mini_batch_size=len(examples))
    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, start.pad_token_id
    judge = AutoModelForSequenceClassification.from_config(config).requires_grad_(False)
    count_calls(judge, calls)
    prompts = [list(e["chosen_input_ids"][: e["chosen_prompt_length"]]) for e in examples]
    judged = ppo.judged_by(judge, tokenizer, tokenizer.batch_decode(prompts, skip_special_tokens=True))
    value_head = ppo.value_head_of(model)
    models, score = (model, reference, value_head), partial(judged, range(len(prompts)))

    def run() -> None:
        found = ppo.experience(models, tokenizer, prompts, score, settings, settings.kl_coefficient)
        for _ in range(settings.epochs):
            ppo.batch_loss(model, value_head, found.batch, found.old, found.target, settings).backward()
            model.zero_grad()
            value_head.zero_grad()

    return run


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="two rounds of a tiny batch")
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else Plan(heldout_pairs=8)
    pairs, rounds = (4, 2) if options.quick else (options.batch_size, options.rounds)
    if options.model:
        start = from_files(Plan(train_pairs=pairs, heldout_pairs=8), options.model, options.data)
    else:
        start = demonstration(plan, seed=0, quick=True)
    steps, calls = steps_of(start, pairs)
    passes = {}
    for kind, step in steps.items():
        calls[0] = 0
        step()
        passes[kind] = calls[0]
    seconds = interleaved(steps, rounds)
    weights = sum(p.numel() * p.element_size() for p in start.model.parameters())
    figures = {
        kind: {
            "forward passes": passes[kind],
            **{name: round(summary(seconds[kind])[name], 5) for name in ("median", "least")},
            "weights MiB": round(weights * KINDS[kind] / 2**20, 1),
            "working MiB": round(peak_memory(step) / 2**20, 1),
        }
        for kind, step in steps.items()
    }
    name = Path(options.model).name if options.model else "demo"
    options.output.mkdir(parents=True, exist_ok=True)
    record = {"model": name, "pairs": pairs, "rounds": rounds, "kinds": figures, "stamp": stamp()}
    (options.output / f"costs-{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
