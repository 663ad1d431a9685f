"""Where a series of runs starts: its plan, and the model and tokens that all methods of a seed share."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import methods


@dataclass(frozen=True)
class Plan:
    """One series: what is trained on, and how long. Lengths in tokens, batches in pairs.

    Attributes:
        name: of the result file.
        train_pairs, heldout_pairs: rows used of the data set (None: all that there are).
        dtype: "float32", or "bfloat16": autocast over float32 weights.
    """

    name: str = "demo"
    steps: int = 250
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup: float = 0.1
    adam_beta2: float = 0.98
    evaluations: int = 5
    train_pairs: int | None = None
    heldout_pairs: int | None = None
    max_length: int = 256
    dtype: str = "float32"


QUICK = Plan(name="quick", steps=4, batch_size=4, evaluations=2, train_pairs=40, heldout_pairs=10)


@dataclass
class Start:
    """What all runs of a seed share: weights, tokens, the first evaluation. The tokenizer has a padding token."""

    model: nn.Module
    tokenizer: Any
    train: list[dict]
    heldout: list[dict]

    @property
    def pad_token_id(self) -> int:
        return self.tokenizer.pad_token_id


def demonstration(plan: Plan, seed: int, quick: bool = False) -> Start:
    """The demonstration's checkpoint: its model after a moment of training on both answers of every pair."""
    from tqdm.auto import tqdm

    from orpo.demo.data import make_pairs
    from orpo.demo.experiment import DemoSettings, warm_up
    from orpo.demo.model import build_model, tokenizer_of

    train, heldout = make_pairs(**{"questions": 40, "held_out": 4} if quick else {})
    tokenizer = tokenizer_of(train)
    model = build_model(tokenizer, seed)
    settings = DemoSettings(warmup_steps=5) if quick else DemoSettings()
    with tempfile.TemporaryDirectory() as folder, tqdm(disable=True) as bar:
        arguments = settings.arguments(Path(folder), seed, use_cpu=not torch.cuda.is_available())
        warm_up(model, tokenizer, train, settings, arguments, bar)
    return _start(model, tokenizer, train, heldout, plan)


def from_files(plan: Plan, model: str, data: str) -> Start:
    """A local model and the first rows of a file of pairs, shuffled once and for all."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    rows = datasets.load_dataset("json", data_files=data, split="train").to_list()
    random.Random(0).shuffle(rows)
    # Some rows cannot train; twice as many as wanted are enough, and the rest need not be tokenized.
    heldout_rows, train_rows = rows[: 2 * (plan.heldout_pairs or 200)], rows[2 * (plan.heldout_pairs or 200) :]
    if plan.train_pairs:
        train_rows = train_rows[: 2 * plan.train_pairs]
    causal = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return _start(causal, AutoTokenizer.from_pretrained(model), train_rows, heldout_rows, plan)


def _start(model: nn.Module, tokenizer: Any, train: list[dict], heldout: list[dict], plan: Plan) -> Start:
    from orpo.data.prepare import Limits, prepare_dataset

    def prepared(rows: list[dict], name: str, most: int | None) -> list[dict]:
        kept = prepare_dataset(rows, tokenizer, Limits(max_length=plan.max_length), name=name).to_list()
        if most is not None and len(kept) < most:
            raise ValueError(f"the {name} set has {len(kept)} pairs that can train, {most} are wanted")
        return kept[:most]

    train = prepared(train, "train", plan.train_pairs)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    start = Start(model.eval(), tokenizer, train, prepared(heldout, "held-out", plan.heldout_pairs))
    methods.check_head(model, methods.layout_of("orpo", start.pad_token_id)(start.heldout[:2]))
    return start
