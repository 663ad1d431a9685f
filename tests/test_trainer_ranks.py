"""orpo.trainer on two ranks: the same losses, metrics and weights as on one."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("run_ranks.py")


def launch(folder, ranks, *arguments, **variables):
    folder.mkdir()
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [*launcher, str(SCRIPT), str(folder), "4", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run(folder, ranks, *arguments):
    done = launch(folder, ranks, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((folder / "seen.json").read_text())
    return {**seen, "weights": torch.load(folder / "weights.pt")}, done.stdout


@pytest.mark.parametrize("sharded", [(), ("tied", "fsdp")], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("death", ["exit", "raise"])
def test_one_rank_dying_ends_the_run(death, sharded, tmp_path):
    start = time.monotonic()
    done = launch(tmp_path / "out", 2, *sharded, ORPO_TEST=death)
    # The other rank waits for the dead one in a reduction that never ends; it has to be taken down.
    assert done.returncode != 0 and time.monotonic() - start < 60
    assert ("the last rank has had enough" if death == "raise" else "exitcode  : 9") in done.stderr
    assert not (tmp_path / "out" / "seen.json").exists()


def test_two_ranks_equal_one(tmp_path):
    """Answers of unequal length, an accumulation window of four or two micro-batches, and an odd evaluation set."""
    (one, _), (two, printed) = run(tmp_path / "one", 1), run(tmp_path / "two", 2)
    assert (one["wrapper"], two["wrapper"]) == ("LlamaForCausalLM", "DistributedDataParallel")
    assert_same_run(one, two)
    assert printed.count("train: kept 8 of 8") == 1


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_fsdp2_equals_one_process(head, tmp_path):
    one, _ = run(tmp_path / "one", 1, head)
    two, _ = run(tmp_path / "two", 2, head, "fsdp")
    # accelerate falls back to DDP in silence: both layers and the root have to be sharded.
    assert two["sharded"] >= 3 and one["sharded"] == 0
    assert_same_run(one, two)


def test_fsdp2_in_bfloat16_rounds_no_loss_and_no_metric(tmp_path):
    done = launch(tmp_path / "out", 2, "tied", "fsdp", ORPO_TEST="bf16")
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads((tmp_path / "out" / "seen.json").read_text())
    assert seen["sharded"] >= 3 and seen["dtypes"] == ["torch.float32"]


def test_an_error_before_training_is_every_ranks(tmp_path):
    """Rank 0 alone looks at the model; the others must not wait for it."""
    done = launch(tmp_path / "out", 2, "untied", "fsdp", ORPO_TEST="head")
    assert done.returncode != 0
    assert all(f"[rank{rank}]: ValueError" in done.stderr for rank in (0, 1)), done.stderr[-3000:]


def assert_same_run(one, two):
    compared = [(a, b) for a, b in zip(one["log"], two["log"], strict=True) if "loss" in a]
    assert len(compared) == 3
    for mine, other in [*compared, (one["eval"], two["eval"])]:
        for name, value in mine.items():
            if name.startswith("eval_") and name.endswith(("runtime", "per_second")):
                continue
            assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert two["weights"].keys() == one["weights"].keys()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-5, atol=1e-6)
