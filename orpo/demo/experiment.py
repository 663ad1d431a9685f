"""One checkpoint, two ways on: plain fine-tuning on the chosen answers, and ORPO on the pairs.

After a warm-up on both answers of every pair, which teaches the model the shop and all six manners alike, the same
checkpoint is trained twice by :class:`orpo.ORPOTrainer`, with beta 0 (plain fine-tuning) and with beta 1 (ORPO), on the
same batches in the same order. What to expect is Figure 3 of the paper: fine-tuning raises the chosen and the rejected
log-probabilities together, ORPO opens a gap between them.

Why beta 1 and not the usual 0.1: beta weighs one odds ratio a pair against a next-token loss, and within the 250 steps
of this run 0.1 hardly outweighs it. Lowest and highest of seeds 0, 1 and 2, on the held-out pairs:

    ====================  ============  =================  ==============  ============
    .                     before        plain fine-tuning  ORPO, beta 0.1  ORPO, beta 1
    ====================  ============  =================  ==============  ============
    reward accuracy       0.55 to 0.58  0.68 to 0.71       0.71 to 0.74    0.87 to 0.92
    margin (gap, nats)    0.01          0.03               0.08 to 0.11    0.35 to 0.42
    ====================  ============  =================  ==============  ============

The price is in the table too: after ORPO with beta 1 a chosen answer is likelier than before and less likely than after
plain fine-tuning.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import datasets
import torch
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from orpo.demo.data import MANNERS
from orpo.trainer.config import ORPOConfig
from orpo.trainer.trainer import ORPOTrainer

# Rewards are beta times a log-probability. All three states are measured with this one, so that their margins compare.
METRICS_BETA = 1.0


@dataclass(frozen=True)
class DemoSettings:
    """What the demonstration runs; the defaults take about two minutes on one CPU core.

    Attributes:
        warmup_steps: steps of the warm-up on both answers of each pair.
        steps: steps of plain fine-tuning, and of ORPO.
        batch_size: pairs a step.
        warmup_learning_rate, learning_rate: peaks of a cosine schedule, of the warm-up and of both runs after it.
        beta: weight of the odds-ratio term in the ORPO run.
        evaluations: held-out evaluations during each run, for the curves.
        questions: use only this many of the 720 questions (None: all).
        held_out: questions set aside, five pairs each.
    """

    warmup_steps: int = 150
    steps: int = 250
    batch_size: int = 16
    warmup_learning_rate: float = 3e-3
    learning_rate: float = 1e-3
    beta: float = 1.0
    evaluations: int = 10
    questions: int | None = None
    held_out: int = 64

    def arguments(self, output_dir: Path, seed: int, use_cpu: bool) -> dict:
        """Keyword arguments of TrainingArguments that the warm-up and both runs share."""
        return {
            "output_dir": str(output_dir),
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": 64,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
            # A second moment over 50 steps rather than 1,000: the runs are a few hundred steps long.
            "adam_beta2": 0.98,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": False,
            "activation_checkpointing": False,
            "seed": seed,
            "use_cpu": use_cpu,
        }


class _Bar(TrainerCallback):
    """Moves one progress bar over several trainings."""

    def __init__(self, bar: tqdm, phase: str) -> None:
        self.bar, self.phase = bar, phase

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.bar.set_description(self.phase)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")


@contextmanager
def quiet() -> Iterator[None]:
    """Without what every ORPOTrainer prints of its data, and without the bars of loading, saving and tokenizing.

    Five trainers see the same pairs here, and their bars would break up the one that shows the whole run.
    """
    switches = (
        (not datasets.are_progress_bars_disabled(), datasets.disable_progress_bars, datasets.enable_progress_bars),
        (logging.is_progress_bar_enabled(), logging.disable_progress_bar, logging.enable_progress_bar),
    )
    for was_on, off, _ in switches:
        if was_on:
            off()
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        for was_on, _, on in switches:
            if was_on:
                on()


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """One CPU thread for a run on the CPU.

    The matmuls are so small that a second thread gains little, and where other programs want the cores the threads wait
    for each other: measured on two busy cores, more than three times as long. It also keeps the figures independent of
    the number of cores.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Model and tokenizer in `folder`, where ``from_pretrained`` finds both."""
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def load(folder: Path) -> PreTrainedModel:
    """The model that :func:`save` wrote."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder)


def warm_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[dict],
    settings: DemoSettings,
    arguments: dict,
    bar: tqdm,
) -> None:
    """Ordinary next-token training, in place, on the chosen and the rejected answer of every pair alike."""
    texts = [row["prompt"] + row[side] + tokenizer.eos_token for row in pairs for side in ("chosen", "rejected")]
    arguments = {
        **arguments,
        "per_device_train_batch_size": 2 * settings.batch_size,
        "learning_rate": settings.warmup_learning_rate,
        "max_steps": settings.warmup_steps,
        "logging_steps": 5,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=[{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]],
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[_Bar(bar, "warm-up on both answers")],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: tuple[list[dict], list[dict]],
    beta: float,
    settings: DemoSettings,
    arguments: dict,
    bar: tqdm,
    phase: str,
) -> list[dict]:
    """Train `model` in place with ORPO; beta 0 is plain fine-tuning. Returns the log history."""
    config = ORPOConfig(
        **arguments,
        beta=beta,
        learning_rate=settings.learning_rate,
        max_steps=settings.steps,
        logging_steps=min(5, settings.steps),
        eval_strategy="steps",
        eval_steps=max(1, settings.steps // settings.evaluations),
        eval_on_start=True,
    )
    with quiet():
        trainer = ORPOTrainer(
            model=model,
            args=config,
            train_dataset=data[0],
            eval_dataset=data[1],
            processing_class=tokenizer,
            callbacks=[_Bar(bar, phase)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return copy.deepcopy(trainer.state.log_history)


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[dict], arguments: dict
) -> dict[str, float]:
    """The held-out metrics by TRL's names, with beta 1, and ``margins/<manner> over <manner>`` for each step up."""

    def margins(prediction) -> dict[str, float]:
        chosen, rejected = torch.as_tensor(prediction.predictions, dtype=torch.float64).unbind(1)
        gaps, levels = chosen - rejected, torch.tensor([row["level"] for row in pairs])
        return {
            f"margins/{MANNERS[level]} over {MANNERS[level - 1]}": gaps[levels == level].mean().item()
            for level in range(1, len(MANNERS))
        }

    with quiet():
        trainer = ORPOTrainer(
            model=model,
            args=ORPOConfig(**arguments, beta=METRICS_BETA),
            eval_dataset=pairs,
            processing_class=tokenizer,
            compute_metrics=margins,
        )
        trainer.remove_callback(PrinterCallback)
        metrics = trainer.evaluate()
    # The loss itself depends on beta and would put the three states on one scale that only one was trained on.
    left_out = ("loss", "epoch", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    metrics = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    return {name: float(value) for name, value in metrics.items() if name not in left_out}
