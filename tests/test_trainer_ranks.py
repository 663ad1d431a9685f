"""orpo.trainer on two ranks: the same losses, metrics and weights as on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("run_ranks.py")


def run(folder, ranks, *arguments):
    folder.mkdir()
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(folder), "4", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "seen.json").read_text()), done.stdout


def test_two_ranks_equal_one(tmp_path):
    """Answers of unequal length, an accumulation window of four or two micro-batches, and an odd evaluation set."""
    (one, _), (two, printed) = run(tmp_path / "one", 1), run(tmp_path / "two", 2)
    assert (one["wrapper"], two["wrapper"]) == ("LlamaForCausalLM", "DistributedDataParallel")
    assert_same_run(one, two)
    assert printed.count("train: kept 8 of 8") == 1


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_fsdp2_equals_one_process(head, tmp_path):
    one, _ = run(tmp_path / "one", 1, head)
    two, _ = run(tmp_path / "two", 2, head, "FULL_STATE_DICT")
    # accelerate falls back to DDP in silence: both layers and the root have to be sharded.
    assert two["sharded"] >= 3 and one["sharded"] == 0
    assert_same_run(one, two)


def assert_same_run(one, two):
    compared = [(a, b) for a, b in zip(one["log"], two["log"], strict=True) if "loss" in a]
    assert len(compared) == 3
    for mine, other in [*compared, (one["eval"], two["eval"])]:
        for name, value in mine.items():
            if name.startswith("eval_") and name.endswith(("runtime", "per_second")):
                continue
            assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-5, abs=1e-5)
