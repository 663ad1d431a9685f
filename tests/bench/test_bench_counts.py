"""Launches and waits of one step, counted without a GPU, stay within their limits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.counts import LIMITS, MODELS, WAITS_FROM_LABELS, WAITS_FROM_ROWS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def counted() -> dict[str, list[int]]:
    """(launches, operations, waits) by line; in a process of its own, where no kernel is interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.counts"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = (line.partition(": ") for line in run.stdout.splitlines())
    return {name: [int(part.split()[0]) for part in counts.split(", ")] for name, _, counts in lines}


@pytest.mark.parametrize("model", MODELS)
def test_a_step_from_labels_is_few_launches_and_one_wait(model, counted):
    launches, operations, waits = counted[model]
    # Both products of stage 3 are there, so that it cannot have counted nothing.
    assert 3 <= operations < launches <= LIMITS[model] and waits == WAITS_FROM_LABELS


@pytest.mark.parametrize("model", MODELS)
def test_a_step_from_rows_makes_the_host_wait_for_nothing(model, counted):
    """On the meta device, whose tensors have no numbers: reading one, or a size that depends on one, would raise."""
    launches, operations, waits = counted[f"{model} from rows"]
    assert 3 <= operations < launches and waits == WAITS_FROM_ROWS


def test_a_number_that_is_read_is_counted():
    import torch

    from benchmarks.counts import Counts

    device = torch.ones(3, device="meta")
    with Counts([5.0, torch.tensor([[1]])]) as counts:
        assert device.sum().item() == 5 and device.nonzero().tolist() == [[1]]
    assert counts.waits.total() == 2 and counts.launches == 1
    with pytest.raises(IndexError), Counts([]):
        device.cpu()
