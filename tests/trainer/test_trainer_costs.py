"""What training does not do: wait for the device in a micro-batch, tokenize twice, open a connection."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from tiny import ROWS, make_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from trainers import make_trainer

from orpo.data.files.sources import load_pairs
from orpo.data.prepare import Limits, prepare_dataset

ROOT = Path(__file__).resolve().parents[2]
TORCH = str(Path(torch.__file__).parent)
# Operators that hand a value from the device to Python, or whose size depends on one.
SYNCHRONIZING = ("_local_scalar_dense", "nonzero", "masked_select", "unique")


class Synchronizations(TorchDispatchMode):
    """The lines of ours that made the device wait."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in SYNCHRONIZING):
            stack = [f for f in traceback.extract_stack() if not f.filename.startswith((TORCH, __file__))]
            # What transformers' models wait for inside their forward is theirs.
            if stack[-1].filename.startswith(f"{ROOT}/orpo/"):
                self.lines.append(f"{stack[-1].filename}:{stack[-1].lineno}")
        return func(*args, **(kwargs or {}))


def synchronizations(tmp_path, monkeypatch, **settings):
    """What `compute_loss` of a run of two steps of two micro-batches waited for."""
    trainer = make_trainer(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=100, **settings
    )
    plain, seen = trainer.compute_loss, Synchronizations()

    def watched(*args, **kwargs):
        with seen:
            return plain(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", watched)
    trainer.train()
    return seen.lines


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_no_micro_batch_waits_for_the_device(layout, tmp_path, monkeypatch):
    assert synchronizations(tmp_path, monkeypatch, layout=layout) == []


def test_a_wait_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("orpo.runs.non_finite.NonFiniteGuard.watch", lambda self, loss, *_: loss.item())
    assert len(synchronizations(tmp_path, monkeypatch)) == 4


def test_tokens_are_cached(tmp_path, monkeypatch, own_cache):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    first = prepare_dataset(load_pairs(str(file), "train"), make_tokenizer(), Limits(max_length=64), report=str)
    calls = []
    # That reads a row by itself, whatever is cached.
    monkeypatch.setattr("orpo.data.prepare.check_first_rows", lambda *_: None)
    monkeypatch.setattr("orpo.data.pair_tokens.PairTokenizer._side", lambda *a: calls.append(a))
    second = prepare_dataset(load_pairs(str(file), "train"), make_tokenizer(), Limits(max_length=64), report=str)
    assert second.to_list() == first.to_list() and not calls
    with pytest.raises(ValueError, match="no row of the train set can train"):
        # Another length is another result, not the cached one.
        prepare_dataset(load_pairs(str(file), "train"), make_tokenizer(), Limits(max_length=60), report=str)
    assert calls


def test_nothing_is_sent_anywhere(tmp_path):
    # A process of its own, without the variables that keep Hugging Face's libraries offline.
    program = f"""
import socket
calls = []
def refuse(*args, **kwargs):
    calls.append(args)
    raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
import sys; sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from trainers import make_trainer
from tiny import SEVEN
evaluates = dict(eval_strategy="steps", eval_steps=1, eval_dataset=SEVEN)
make_trainer(Path({str(tmp_path)!r}), save_strategy="steps", save_steps=1, **evaluates).train()
assert not calls, calls
print("trained alone")
"""
    environment = {k: v for k, v in os.environ.items() if "OFFLINE" not in k and "TELEMETRY" not in k}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300)
    assert "trained alone" in done.stdout, done.stderr[-2000:]
