"""SFT, ORPO, DPO and the probability ratio from one checkpoint, on the same batches, resumable run by run.

    python -m benchmarks.paper.train                                            the demonstration's data and model
    python -m benchmarks.paper.train --model FOLDER --data pairs.jsonl.gz       another model, another file of pairs
    python -m benchmarks.paper.train --quick --output FOLDER

A run is a method with its beta and a seed; `--runs orpo:0.5 dpo:0.1 sft` and `--seeds 0 1 2` choose some. Each finished
run is one line of ``results/<name>.jsonl``; those that are there with the same settings are not repeated, so a series
that was stopped goes on where it was. All methods start from the same weights, take the same batches in the same order
and the same learning rate, whose schedule is linear warm-up and cosine decay. DPO's frozen reference is the start.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import stamp

from . import methods
from .start import QUICK, Plan, Start, demonstration, from_files

RESULTS = Path(__file__).parent / "results"
RUNS = ("sft", "orpo:0.1", "orpo:0.5", "orpo:1.0", "dpo:0.1", "probability_ratio:1.0")


def autocast(plan: Plan, device: str = "cpu") -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=plan.dtype == "bfloat16")


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) for name, value in batch.items()}


@torch.no_grad()
def evaluate(model: nn.Module, start: Start, plan: Plan) -> dict[str, torch.Tensor]:
    """``sums`` and ``means`` (2, pairs) of the held-out answers, chosen first, and ``nll`` per token of the chosen."""
    layout, size = methods.layout_of("orpo", start.pad_token_id), 4 * plan.batch_size
    sums, means, nll, tokens = [], [], 0.0, 0
    for i in range(0, len(start.heldout), size):
        with autocast(plan, model.device.type):
            batch = to_device(layout(start.heldout[i : i + size]), model.device)
            found = methods.scores(model, batch)
        rows = batch["orpo"].rows
        sums.append(found.sum_S.view(2, -1))
        means.append(found.mean_S.view(2, -1))
        nll -= (found.logp_N * rows.in_nll_N).sum().item()
        tokens += batch["orpo"].num_nll_tokens
    return {"sums": torch.cat(sums, 1), "means": torch.cat(means, 1), "nll": torch.tensor(nll / tokens)}


def point(step: int, now: dict[str, torch.Tensor], first: dict[str, torch.Tensor]) -> dict[str, float]:
    """One point of a curve. `accuracy` and `margin` compare mean log-probabilities per token, as ORPO's metrics do;
    `gain_accuracy` compares what both answers gained over the start, in sums, which is DPO's implicit reward."""
    chosen, rejected = now["means"]
    gained = now["sums"] - first["sums"]
    return {
        "step": step,
        "chosen": chosen.mean().item(),
        "rejected": rejected.mean().item(),
        "accuracy": (chosen > rejected).float().mean().item(),
        "margin": (chosen - rejected).mean().item(),
        "gain_accuracy": (gained[0] > gained[1]).float().mean().item(),
        "nll": now["nll"].item(),
    }


def batches(train: list[dict], plan: Plan, seed: int) -> Iterator[list[dict]]:
    """The same order for every method: epochs, each shuffled; an incomplete batch at an epoch's end is left out."""
    generator, order = random.Random(seed), []
    if len(train) < plan.batch_size:
        raise ValueError(f"the train set has {len(train)} pairs, a batch {plan.batch_size}")
    for _ in range(plan.steps):
        if len(order) < plan.batch_size:
            order = generator.sample(range(len(train)), len(train))
        yield [train[order.pop()] for _ in range(plan.batch_size)]


def rate(step: int, plan: Plan) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine decay to 0.

    transformers' schedule begins at 0, and the first of a few steps would train nothing.
    """
    warm = max(1, round(plan.warmup * plan.steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, plan.steps - warm)))


def train(method: str, beta: float, start: Start, first: dict[str, torch.Tensor], plan: Plan, seed: int) -> dict:
    """One run: its held-out curve, the loss of each step, and the model calls that a step made."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = copy.deepcopy(start.model).to(device).train()
    reference = copy.deepcopy(start.model).to(device).requires_grad_(False) if method == "dpo" else None
    calls = [0]
    hooks = [count_calls(m, calls) for m in (model, reference) if m is not None]
    optimizer = torch.optim.AdamW(
        model.parameters(), plan.learning_rate, betas=(0.9, plan.adam_beta2), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, plan))
    layout, every = methods.layout_of(method, start.pad_token_id), max(1, plan.steps // plan.evaluations)
    curve, losses, seconds, called = [point(0, first, first)], [], [], set()
    for step, examples in enumerate(batches(start.train, plan, seed), 1):
        begun, calls[0] = time.perf_counter(), 0
        with autocast(plan, device.type):
            batch = to_device(layout(examples), device)
            reference_S = None if reference is None else methods.reference_sums(reference, batch)
            loss = methods.loss_of(method, model, batch, beta, reference_S)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of {method} is {losses[-1]} at step {step}")
        seconds.append(time.perf_counter() - begun)
        called.add(calls[0])
        if step % every == 0 or step == plan.steps:
            curve.append(point(step, evaluate(model.eval(), start, plan), first))
            model.train()
    for hook in hooks:
        hook.remove()
    return {"curve": curve, "losses": losses, "step_seconds": sorted(seconds)[len(seconds) // 2], "calls": max(called)}


def count_calls(model: nn.Module, calls: list[int]) -> Any:
    """Adds one to ``calls[0]`` at every forward pass of the decoder; the handle that is returned ends it."""

    def add(*_: Any) -> None:
        calls[0] += 1

    return model.base_model.register_forward_hook(add)


def parse_run(text: str) -> tuple[str, float]:
    """'orpo:0.5' -> ('orpo', 0.5); SFT has no beta.

    Raises:
        ValueError: the method is not known, or its beta is missing.
    """
    method, _, beta = text.partition(":")
    if method not in methods.METHODS:
        raise ValueError(f"the method of run {text!r} has to be one of {', '.join(methods.METHODS)}")
    if (method == "sft") == bool(beta):
        raise ValueError(f"run {text!r}: sft takes no beta, the others need one, as in 'orpo:0.1'")
    return method, float(beta or 0.0)


def load(name: str, folder: Path = RESULTS) -> list[dict]:
    """The finished runs of a series; [] where there is none."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def series(
    plan: Plan,
    runs: list[str],
    seeds: list[int],
    folder: Path,
    source: tuple[str, str] | None = None,
    quick: bool = False,
) -> None:
    """Every run that is not stored yet; each is stored as it finishes."""
    settings = asdict(plan) | {"model": Path(source[0]).name if source else "orpo.demo"}
    done = {(r["run"], r["seed"]) for r in load(plan.name, folder) if r["settings"] == settings}
    for seed in seeds:
        missing = [run for run in runs if (run, seed) not in done]
        if not missing:
            continue
        torch.manual_seed(seed)
        start = from_files(plan, *source) if source else demonstration(plan, seed, quick)
        first = evaluate(start.model.to("cuda" if torch.cuda.is_available() else "cpu"), start, plan)
        sizes = {"train": len(start.train), "heldout": len(start.heldout)}
        for run in missing:
            begun = time.perf_counter()
            result = train(*parse_run(run), start, first, plan, seed)
            record = {"run": run, "seed": seed, **sizes, **result, "settings": settings, "stamp": stamp()}
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"{plan.name}.jsonl", "a") as file:
                file.write(json.dumps(_rounded(record)) + "\n")
            last = result["curve"][-1]
            shown = ", ".join(f"{name} {last[name]:.3f}" for name in ("accuracy", "margin", "chosen", "rejected"))
            print(f"{run}, seed {seed}: {shown}; {time.perf_counter() - begun:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), help="method:beta, of " + " ".join(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--model", help="local folder or name of a causal language model; with --data")
    parser.add_argument("--data", help="JSON lines of pairs, gzipped or not; with --model")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny runs")
    for name, value in asdict(Plan()).items():
        kind = int if value is None else type(value)
        parser.add_argument(f"--{name}", type=kind, help=f"default {value}")
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.data is None):
        parser.error("--model and --data go together")
    try:
        for run in options.runs:
            parse_run(run)
    except ValueError as error:
        parser.error(str(error))
    given = {name: getattr(options, name) for name in asdict(Plan()) if getattr(options, name) is not None}
    plan = Plan(**asdict(QUICK if options.quick else Plan()) | given)
    source = (options.model, options.data) if options.model else None
    series(plan, options.runs, options.seeds, options.output, source, options.quick)


if __name__ == "__main__":
    main()
