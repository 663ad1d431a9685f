"""DeepSpeed's ZeRO-2 and ZeRO-3 on two ranks: losses and weights of one process without it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_ranks import EIGHT
from tiny import make_model, make_tokenizer

SCRIPT = Path(__file__).parents[1] / "run_zero.py"
OPTIMIZERS = {2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}


def launched(ranks, *command):
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    # Without the first DeepSpeed looks for a GPU, without the second it compiles.
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_SKIP_CUDA_CHECK": "1"}
    command = [*launcher, *map(str, command)]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run(path, stage, ranks):
    launched(ranks, SCRIPT, path, stage)
    return torch.load(path)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs pip install deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_one_process(stage, tmp_path):
    one, two = run(tmp_path / "one.pt", 0, 1), run(tmp_path / "two.pt", stage, 2)
    assert two["engine"] == OPTIMIZERS[stage]
    # Stage 3 keeps no parameter whole, the head's neither.
    assert two["cut"] == (len(one["weights"]) if stage == 3 else 0)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs pip install deepspeed")
def test_orpo_train_with_zero_2_has_the_losses_of_one_process(tmp_path):
    """DeepSpeed on a CPU takes bfloat16 alone: losses agree to its digits."""
    make_model("llama").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [dict(zip(EIGHT, row, strict=True)) for row in zip(*EIGHT.values(), strict=True)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
    zero = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}, **auto}
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    settings = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    losses = {}
    for ranks, own in ((1, {}), (2, {"deepspeed": tmp_path / "zero.json", "bf16": True})):
        files = {"model_name_or_path": "model", "dataset_name": "pairs.jsonl", "output_dir": f"out-{ranks}"}
        files = {name: tmp_path / file for name, file in files.items()}
        options = files | settings | {"use_cpu": True, "per_device_train_batch_size": 4 // ranks} | own
        launched(ranks, "-m", "orpo.train", *(f"--{name}={value}" for name, value in options.items()))
        state = json.loads((tmp_path / f"out-{ranks}/trainer_state.json").read_text())
        losses[ranks] = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses[1]) == 3 and losses[1][0] > losses[1][2] + 0.1
    assert losses[2] == pytest.approx(losses[1], rel=5e-3)
