"""DeepSpeed's ZeRO-2 and ZeRO-3 on two ranks: losses and weights of one process without it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "run_zero.py"
OPTIMIZERS = {2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}


def run(path, stage, ranks):
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    # Without the first DeepSpeed looks for a GPU, without the second it compiles.
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "DS_SKIP_CUDA_CHECK": "1"}
    command = [*launcher, str(SCRIPT), str(path), str(stage)]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
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
