"""The models whose answers are compared: SFT, DPO, ORPO and PPO on the demonstration's data, of one checkpoint.

SFT and ORPO are the demonstration's own two runs (:mod:`orpo.demo.experiment`). DPO goes on from SFT, with a frozen
copy of it as its reference, as in the paper; its loss is that of :mod:`benchmarks.paper.methods`. PPO goes on from SFT
too, once there is a reward model (:mod:`benchmarks.paper.ppo`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from orpo.data.prepare import Limits, prepare_dataset
from orpo.demo import experiment
from orpo.demo.data import make_pairs
from orpo.demo.experiment import DemoSettings
from orpo.demo.model import build_model, tokenizer_of

from . import loop, methods

NAMES = ("sft", "dpo", "orpo", "ppo")
# Beyond the longest text of the demonstration.
MAX_LENGTH = 256


@dataclass(frozen=True)
class DPOSettings:
    """How DPO goes on from SFT.

    Attributes:
        beta: of the slides.
        learning_rate: as many times ORPO's as on the slides (5e-6 beside 8e-6).
        steps, batch_size: those of the demonstration's runs.
    """

    beta: float = 0.1
    learning_rate: float = 1e-3 * 5 / 8
    steps: int = 250
    batch_size: int = 16


@dataclass(frozen=True)
class Policies:
    """Folders of the trained models, PPO's for when it is trained, and what they were trained with."""

    tokenizer: Any
    train: list[dict]
    heldout: list[dict]
    folders: dict[str, Path]


def train_policies(output: Path, seed: int, settings: DemoSettings, dpo: DPOSettings) -> Policies:
    """Trains the checkpoint ``before``, then those of NAMES but PPO from it, each saved in `output` under its name.

    The whole is the demonstration's with this seed, on a CPU with one thread; the pairs do not depend on the seed.
    """
    settings = replace(settings, evaluations=1)
    arguments = settings.arguments(output, seed, use_cpu=True)
    train, heldout = make_pairs(held_out=settings.held_out, questions=settings.questions)
    tokenizer = tokenizer_of(train)
    folders = {name: output / name for name in ("before", *NAMES)}
    model = build_model(tokenizer, seed)
    with tqdm(total=settings.warmup_steps + 2 * settings.steps, unit="step") as bar:
        experiment.warm_up(model, tokenizer, train, settings, arguments, bar)
        experiment.save(model, tokenizer, folders["before"])
        for name, beta in (("sft", 0.0), ("orpo", settings.beta)):
            model = experiment.load(folders["before"])
            experiment.train(model, tokenizer, (train, heldout), beta, settings, arguments, bar, name)
            experiment.save(model, tokenizer, folders[name])
    model = experiment.load(folders["sft"])
    train_dpo(model, tokenizer, train, dpo, seed)
    experiment.save(model, tokenizer, folders["dpo"])
    return Policies(tokenizer, train, heldout, folders)


def train_dpo(model: Any, tokenizer: Any, pairs: list[dict], settings: DPOSettings, seed: int) -> list[float]:
    """Trains `model` in place, with its state at the start as the reference. Returns the loss of each step."""
    with experiment.quiet():
        examples = prepare_dataset(pairs, tokenizer, Limits(max_length=MAX_LENGTH), report=lambda _: None).to_list()
    layout = methods.layout_of("dpo", tokenizer.pad_token_id)
    model.eval()
    chunks = [layout(examples[i : i + 64]) for i in range(0, len(examples), 64)]
    # (pairs, 2): chosen and rejected, in the order of the examples.
    reference = torch.cat([methods.reference_sums(model, chunk).view(2, -1).T for chunk in chunks])
    shuffled, order, batches = random.Random(seed), [], []
    for _ in range(settings.steps):
        if len(order) < settings.batch_size:
            order = shuffled.sample(range(len(examples)), len(examples))
        batches.append(order[: settings.batch_size])
        order = order[settings.batch_size :]

    def loss_of(batch: list[int]) -> Tensor:
        sums_S = reference[batch].T.flatten()
        return methods.loss_of("dpo", model, layout([examples[i] for i in batch]), settings.beta, sums_S)

    return loop.fit(model, batches, loss_of, learning_rate=settings.learning_rate, betas=(0.9, 0.98), title="dpo")
