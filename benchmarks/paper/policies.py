"""The models whose answers are compared: SFT, DPO and ORPO on the demonstration's data, of one checkpoint.

SFT and ORPO are the demonstration's own two runs (:mod:`orpo.demo.experiment`). DPO goes on from SFT, with a frozen
copy of it as its reference, as in the paper; it is a few lines on top of :func:`orpo.token_logprobs`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from orpo import token_logprobs
from orpo.demo import experiment
from orpo.demo.data import make_pairs
from orpo.demo.experiment import DemoSettings
from orpo.demo.model import build_model, train_tokenizer

NAMES = ("sft", "dpo", "orpo")


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
    """Folders of the trained models, and what they were trained with."""

    tokenizer: Any
    train: list[dict]
    heldout: list[dict]
    folders: dict[str, Path]


def train_policies(output: Path, seed: int, settings: DemoSettings, dpo: DPOSettings) -> Policies:
    """Trains the checkpoint ``before``, then the three of NAMES from it, each saved in `output` under its name.

    The whole is the demonstration's with this seed, on a CPU with one thread; the pairs do not depend on the seed.
    """
    settings = replace(settings, evaluations=1)
    arguments = settings.arguments(output, seed, use_cpu=True)
    train, heldout = make_pairs(held_out=settings.held_out, questions=settings.questions)
    tokenizer = train_tokenizer(sorted({row["prompt"] + row[side] for row in train for side in ("chosen", "rejected")}))
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


def answer_logps(model: Any, tokenizer: Any, pairs: list[dict]) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities of the chosen and of the rejected answers, end token included: two of shape (pairs,)."""
    ids, starts = [], []
    for side in ("chosen", "rejected"):
        for row in pairs:
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = tokenizer(row[side], add_special_tokens=False)["input_ids"]
            ids.append(torch.tensor([*prompt, *answer, tokenizer.eos_token_id]))
            starts.append(len(prompt))
    batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    lengths = torch.tensor([len(x) for x in ids])[:, None]
    position = torch.arange(batch.shape[1])[None]
    hidden = model.model(input_ids=batch, attention_mask=(position < lengths).long()).last_hidden_state
    # The state before a token predicts it.
    counted = ((position >= torch.tensor(starts)[:, None]) & (position < lengths))[:, 1:]
    sequence = counted.nonzero()[:, 0]
    logp = token_logprobs(hidden[:, :-1][counted], model.lm_head.weight, batch[:, 1:][counted])
    sums = torch.zeros(len(ids)).index_add(0, sequence, logp)
    return sums[: len(pairs)], sums[len(pairs) :]


def dpo_loss(policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], beta: float) -> Tensor:
    """DPO's loss of summed (chosen, rejected) log-probabilities, each (pairs,): their mean over the pairs."""
    ratio = (policy[0] - reference[0]) - (policy[1] - reference[1])
    return -logsigmoid(beta * ratio).mean()


def train_dpo(model: Any, tokenizer: Any, pairs: list[dict], settings: DPOSettings, seed: int) -> list[float]:
    """Trains `model` in place, with its state at the start as the reference. Returns the loss of each step."""
    model.eval()
    with torch.no_grad():
        chunks = [answer_logps(model, tokenizer, pairs[i : i + 64]) for i in range(0, len(pairs), 64)]
    chosen, rejected = (torch.cat(side) for side in zip(*chunks, strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.steps // 10, settings.steps)
    shuffled, order, losses = random.Random(seed), [], []
    model.train()
    for _ in tqdm(range(settings.steps), desc="dpo", unit="step"):
        if len(order) < settings.batch_size:
            order = shuffled.sample(range(len(pairs)), len(pairs))
        batch, order = order[: settings.batch_size], order[settings.batch_size :]
        policy = answer_logps(model, tokenizer, [pairs[i] for i in batch])
        loss = dpo_loss(policy, (chosen[batch], rejected[batch]), settings.beta)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses
