"""The demonstration: what ORPO does that plain fine-tuning does not, on one's own machine in a few minutes.

    orpo-train                     the same as  python -c "from orpo.demo import run_demo; run_demo()"

The preference pairs are made by :mod:`orpo.demo.data`, a model of about 1M parameters by :mod:`orpo.demo.model`; the
training is :mod:`orpo.demo.experiment`, the printed result :mod:`orpo.demo.report`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from orpo.demo.experiment import DemoSettings

__all__ = ["run_demo"]

# Lies in a folder that the demonstration has made.
MARK = ".orpo-demo"


def run_demo(
    output_dir: str | Path = "orpo-demo",
    seed: int = 0,
    device: str | None = None,
    settings: DemoSettings | None = None,
) -> dict:
    """Train a tiny model from a common checkpoint with plain fine-tuning and with ORPO, and show what differs.

    Prints a table of held-out figures and a few answers, and leaves in `output_dir`: ``summary.json`` (the same figures
    under ``before``, ``sft`` and ``orpo``, by TRL's metric names), ``curves.png`` and ``curves.csv``, the pairs
    (``train.jsonl``, ``heldout.jsonl``), the model trained with ORPO and its tokenizer (``from_pretrained(output_dir)``
    loads them), and the other two models in ``before/`` and ``sft/``.

    Args:
        output_dir: folder to write to; made if it is missing. An earlier demonstration there is written over.
        seed: of the initialisation and of the order of batches. The pairs do not depend on it.
        device: "cpu" or "cuda". None takes the accelerator where there is one.
        settings: the lengths and rates of the experiment.

    Returns:
        What ``summary.json`` holds.

    Raises:
        ValueError: `device` is not there, the run was started on several processes, or `output_dir` holds anything but
            an earlier demonstration.
    """
    from orpo.demo.experiment import DemoSettings, one_thread

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"the demonstration runs on 1 process, not on {os.environ['WORLD_SIZE']}: start it without a launcher"
        )
    where = _device(device)
    _refuse_other_files(Path(output_dir))
    with one_thread(where):
        return _run(Path(output_dir), seed, where, settings or DemoSettings())


def _run(output_dir: Path, seed: int, device: torch.device, settings: DemoSettings) -> dict:
    started = time.perf_counter()
    from tqdm.auto import tqdm

    from orpo.demo import experiment, report
    from orpo.demo.data import make_pairs, write_jsonl
    from orpo.demo.model import build_model, tokenizer_of
    from orpo.generation import generate
    from orpo.report.curves import plot_curves, write_curves_csv

    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / MARK).touch()
    folders = {"before": output_dir / "before", "sft": output_dir / "sft", "orpo": output_dir}

    data = train_pairs, heldout_pairs = make_pairs(held_out=settings.held_out, questions=settings.questions)
    for name, rows in zip(("train", "heldout"), data, strict=True):
        write_jsonl(rows, output_dir / f"{name}.jsonl")
    tokenizer = tokenizer_of(train_pairs)
    model = build_model(tokenizer, seed).to(device)
    print(
        f"{len(train_pairs):,} training pairs and {len(heldout_pairs)} held-out pairs of our own (orpo.demo.data); "
        f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens, on {device}"
    )
    arguments = settings.arguments(output_dir, seed, use_cpu=device.type == "cpu")
    seconds, histories = {}, {}
    with tqdm(total=settings.warmup_steps + 2 * settings.steps, unit="step", smoothing=0.05) as bar:
        start = time.perf_counter()
        experiment.warm_up(model, tokenizer, train_pairs, settings, arguments, bar)
        experiment.save(model, tokenizer, folders["before"])
        seconds["warm_up"] = time.perf_counter() - start
        for state, beta in (("sft", 0.0), ("orpo", settings.beta)):
            start = time.perf_counter()
            model = experiment.load(folders["before"])
            name = report.titles(settings)[state]
            histories[name] = experiment.train(model, tokenizer, data, beta, settings, arguments, bar, name)
            experiment.save(model, tokenizer, folders[state])
            seconds[state] = time.perf_counter() - start

    start = time.perf_counter()
    questions = {row["prompt"]: row["fact"] for row in heldout_pairs}
    results, answers = {}, {}
    for state, folder in folders.items():
        model = experiment.load(folder)
        results[state] = experiment.evaluate(model, tokenizer, heldout_pairs, arguments)
        answers[state] = [
            answer.strip() for answer in generate(model, tokenizer, list(questions), max_new_tokens=48, batch_size=64)
        ]
        right = [fact in answer for fact, answer in zip(questions.values(), answers[state], strict=True)]
        results[state]["facts_right"] = sum(right) / len(right)
    title = f"{len(heldout_pairs)} held-out pairs, from one checkpoint"
    picture = plot_curves(histories, output_dir / "curves.png", title=title)
    write_curves_csv(histories, output_dir / "curves.csv")
    seconds["evaluation"] = time.perf_counter() - start
    seconds["total"] = time.perf_counter() - started

    shown = list(questions)[:4]
    print(f"\nHeld-out pairs ({len(heldout_pairs)})\n\n{report.table(results, settings)}\n")
    print(report.findings(results))
    print(f"\nGreedy answers to held-out questions\n\n{report.side_by_side(shown, answers, settings)}\n")
    summary = report.write_summary(
        output_dir / "summary.json",
        results,
        settings,
        seed,
        device,
        (len(train_pairs), len(heldout_pairs)),
        seconds,
        [{"prompt": p, **{state: answers[state][i] for state in folders}} for i, p in enumerate(questions)],
    )
    print(f"{seconds['total']:.0f} s. Curves: {picture}; figures: {output_dir / 'summary.json'}; model: {output_dir}")
    return summary


def _refuse_other_files(folder: Path) -> None:
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    # A run that was trained where a demonstration had been has left these.
    trained = [name for name in there if name == "training_args.bin" or name.startswith("checkpoint-")]
    if there and (MARK not in there or trained):
        raise ValueError(
            f"output_dir {folder} holds files that are not the demonstration's ({min(trained or there)}), which would "
            "write over some: give another folder, or, to train on pairs of your own, --model_name_or_path and "
            "--dataset_name"
        )


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type not in ("cpu", "cuda") or (device.index or 0) != 0:
        raise ValueError(f"device is {name!r}; the demonstration runs on 'cpu' or 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device is {name!r}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
        )
    return device
