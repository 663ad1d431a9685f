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
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parents[1] / "run_zero.py"
OPTIMIZERS = {2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}


def started(ranks, *command):
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    # Without the first DeepSpeed looks for a GPU, without the second it compiles.
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_SKIP_CUDA_CHECK": "1"}
    command = [*launcher, *map(str, command)]
    return subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=600)


def launched(ranks, *command):
    done = started(ranks, *command)
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


def write_run(folder, **changes):
    """What `orpo-train` needs in `folder`: a model, pairs, and settings of DeepSpeed for stages 2 and 3."""
    make_model("llama", **changes).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rows = [dict(zip(EIGHT, row, strict=True)) for row in zip(*EIGHT.values(), strict=True)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
    whole = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    for name, zero in {"2": {"stage": 2}, "3": whole, "3-parts": {"stage": 3}}.items():
        settings = {"zero_optimization": zero, "bf16": {"enabled": "auto"}, **auto}
        (folder / f"zero-{name}.json").write_text(json.dumps(settings))


def line(folder, out, ranks, zero=None, **settings):
    """The command line of a run in `folder`."""
    given = {"max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    given |= {"model_name_or_path": folder / "model", "dataset_name": folder / "pairs.jsonl", "use_cpu": True}
    given |= {"output_dir": folder / out, "per_device_train_batch_size": 4 // ranks}
    given |= {"deepspeed": folder / f"zero-{zero}.json", "bf16": True} if zero else {}
    return ["-m", "orpo.train", *(f"--{name}={value}" for name, value in (given | settings).items())]


def logged(folder, out, name="loss"):
    state = json.loads((folder / out / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs pip install deepspeed")
def test_orpo_train_with_zero_2_has_the_losses_of_one_process(tmp_path):
    """DeepSpeed on a CPU takes bfloat16 alone: losses agree to its digits."""
    write_run(tmp_path)
    launched(1, *line(tmp_path, "one", 1))
    launched(2, *line(tmp_path, "two", 2, zero=2))
    one, two = logged(tmp_path, "one"), logged(tmp_path, "two")
    assert len(one) == 3 and one[0] > one[2] + 0.1
    assert two == pytest.approx(one, rel=5e-3)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs pip install deepspeed")
@pytest.mark.parametrize("tied", [False, True])
def test_orpo_train_with_zero_3_has_the_losses_of_one_process(tied, tmp_path):
    """Weights are cut up while they load; the saved model is whole, and a checkpoint goes on as the run did."""
    write_run(tmp_path, tie_word_embeddings=tied)
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset_name": tmp_path / "pairs.jsonl"}
    saved = {"save_strategy": "steps", "save_steps": 2}
    launched(1, *line(tmp_path, "one", 1, **evaluated))
    said = launched(2, *line(tmp_path, "three", 2, zero=3, **evaluated, **saved))
    assert "2 ranks (cpu), ZeRO-3: each holds 1/2 of optimizer states and gradients and weights" in said
    assert "layout shared: a few pairs score as in the padded layout" in said
    one, three = logged(tmp_path, "one"), logged(tmp_path, "three")
    assert len(one) == 3 and one[0] > one[2] + 0.1
    assert three == pytest.approx(one, rel=5e-3)
    assert logged(tmp_path, "three", "eval_loss") == pytest.approx(logged(tmp_path, "one", "eval_loss"), rel=5e-3)
    weights, wanted = whole(tmp_path / "three"), whole(tmp_path / "one")
    assert {name: w.shape for name, w in weights.items()} == {name: w.shape for name, w in wanted.items()}
    for name, weight in wanted.items():
        # A step of Adam moves a weight by the rate, whose sign may go by a rounding where its gradient is nearly 0.
        apart = (weights[name].float() - weight).abs()
        assert apart.mean() < 4e-3 and apart.max() < 7e-2, name
    resumed = {"resume_from_checkpoint": tmp_path / "three/checkpoint-2"}
    said = launched(2, *line(tmp_path, "again", 2, zero=3, **evaluated, **resumed))
    assert "resumes from" in said
    assert logged(tmp_path, "again") == three
    for name, weight in whole(tmp_path / "again").items():
        assert torch.equal(weight, weights[name]), name


def whole(folder):
    """All weights of the model in `folder`, by name."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs pip install deepspeed")
def test_a_zero_3_that_would_save_parts_is_refused_in_words(tmp_path):
    write_run(tmp_path)
    done = started(1, *line(tmp_path, "parts", 1, zero="3-parts"))
    assert done.returncode != 0 and "set stage3_gather_16bit_weights_on_model_save true" in done.stderr
