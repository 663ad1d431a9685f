"""A short run of TRL's ORPOTrainer, recorded: its tokens and what it logs, for tests that have no TRL.

    python tests/record_trl_trace.py        writes tests/trl_trace.json; needs trl==1.16.0

Weights, tokenizer and pairs come from integer arithmetic alone, so they are the same with every torch and on every CPU.
"""

import json
import platform
import tempfile
from pathlib import Path

import numpy as np
import torch
from tiny import SPECIALS, make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TRACE = Path(__file__).with_name("trl_trace.json")

WORDS = "amber birch cedar dusk elm fern glade heath iris jade kelp lark moss nut oak pine".split()
SETTINGS = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "learning_rate": 2e-3,
    "optim": "adamw_torch",
    "beta": 0.1,
    "max_length": 50,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "train_sampling_strategy": "sequential",
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
RUNS = {
    "plain": {},
    "unclipped": {"beta": 0.5, "max_grad_norm": 0.0, "gradient_checkpointing": True, "lr_scheduler_type": "constant"},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}
# Whole batches, since TRL's evaluation averages batches whatever their size.
EVALUATED = 12
# Of the machine, not of the run.
LEFT_OUT = ("runtime", "per_second", "total_flos", "epoch")


def trace_pairs() -> list[dict[str, str]]:
    """Thirteen pairs; some answers are cut at 50 tokens, and the last chosen one merges with its prompt."""

    def text(start: int, words: int) -> str:
        return " ".join(WORDS[(start * start + 5 * i + i * i * start) % len(WORDS)] for i in range(words))

    pairs = [
        {"prompt": text(i, 2 + i % 3), "chosen": f" {text(i + 5, 1 + i % 4)}", "rejected": f" {text(i + 9, 1 + i % 7)}"}
        for i in range(12)
    ]
    return [*pairs, {"prompt": "the birch is re", "chosen": "d", "rejected": " green"}]


def trace_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and three merges."""
    merges = [("e", "d"), ("a", "r"), ("Ġ", "m")]
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def trace_model() -> torch.nn.Module:
    """The tiny Llama, its weights numbers that look random: an integer hash of where each stands."""
    model, first = make_model("llama", vocab_size=264), 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            x = np.arange(first, first + parameter.numel(), dtype=np.uint32) * np.uint32(2654435761)
            x = (x ^ (x >> np.uint32(15))) * np.uint32(2246822519)
            x = x ^ (x >> np.uint32(13))
            # 20 bits, all of which float32 holds.
            uniform = torch.from_numpy((x >> np.uint32(12)).astype(np.float32)) / 2**20 - 0.5
            parameter.copy_((uniform * 0.5).view_as(parameter) + (1.0 if "norm" in name else 0.0))
            first += parameter.numel()
    return model


def record() -> dict:
    """TRL's tokens of every pair, and of every run the log and the evaluation after it."""
    import transformers
    import trl
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    pairs, trace = Dataset.from_list(trace_pairs()), {"runs": {}}
    for name, changes in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            args = ORPOConfig(output_dir=folder, **{**SETTINGS, **changes})
            data = {"train_dataset": pairs, "eval_dataset": pairs.select(range(EVALUATED))}
            trainer = ORPOTrainer(trace_model(), args, processing_class=trace_tokenizer(), **data)
            trainer.train()
            entries = [_kept(entry) for entry in trainer.state.log_history if "loss" in entry]
            trace["runs"][name] = {"log": entries, "eval": _kept(trainer.evaluate())}
    trace["tokens"] = [
        {
            side: (row[f"{side}_input_ids"], sum(label == -100 for label in row[f"{side}_labels"]))
            for side in ("chosen", "rejected")
        }
        for row in trainer.train_dataset
    ]
    trace["versions"] = {module.__name__: module.__version__ for module in (trl, torch, transformers)}
    trace["versions"]["machine"] = platform.machine()
    return trace


def _kept(entry: dict[str, float]) -> dict[str, float]:
    kept = {name: value for name, value in entry.items() if not name.endswith(LEFT_OUT)}
    return {name: float(f"{value:.8g}") for name, value in kept.items()}


if __name__ == "__main__":
    TRACE.parent.mkdir(exist_ok=True)
    TRACE.write_text(json.dumps(record()) + "\n")
