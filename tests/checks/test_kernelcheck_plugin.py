"""`--kernels=` selects a mode, and a mode in which nothing ran is a failure (kernelcheck/plugin.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernelcheck import plugin

MARKED = "import pytest\n@pytest.mark.kernels\ndef test_marked(kernel_mode):\n    assert kernel_mode == 'interpret'\n"
SKIPPED = "import pytest\n@pytest.mark.kernels(modes=('cuda',))\ndef test_marked():\n    pass\n"
UNMARKED = "def test_unmarked():\n    pass\n"


def _pytest(folder: Path, test: str, *options: str) -> subprocess.CompletedProcess:
    (folder / "test_sample.py").write_text(test)
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[1]), PYTHONDONTWRITEBYTECODE="1")
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "kernelcheck.plugin", "-p", "no:cacheprovider", *options]
    return subprocess.run([*command, "test_sample.py"], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("test", "options", "passes"),
    [
        (MARKED, ["--kernels=interpret"], True),
        (SKIPPED, ["--kernels=interpret"], False),
        (MARKED + UNMARKED, ["--kernels=interpret", "-k", "unmarked"], False),
        (UNMARKED, [], True),
    ],
    ids=["one-ran", "all-skipped", "all-deselected", "no-choice"],
)
def test_a_chosen_mode_in_which_nothing_ran_fails(tmp_path, test, options, passes):
    result = _pytest(tmp_path, test, *options)
    assert (result.returncode == 0) == passes, result.stdout + result.stderr
    assert ("no test marked `kernels` ran" in result.stdout) != passes


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what a machine without a GPU is told")
def test_cuda_without_a_gpu_is_refused_in_words(tmp_path):
    result = _pytest(tmp_path, MARKED, "--kernels=cuda")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "torch.cuda.is_available() is False" in result.stderr


def test_a_second_mode_in_one_process_is_refused(kernel_mode):
    other = next(mode for mode in plugin.MODES if mode != kernel_mode)
    with pytest.raises(RuntimeError, match="a process of its own"):
        plugin.configure(other)


@pytest.mark.kernels
def test_fresh_memory_is_poisoned():
    like = torch.zeros(3, dtype=torch.bfloat16)
    for fresh in (torch.empty(3), torch.empty_like(like), torch.empty_strided((2, 2), (2, 1)), like.new_empty(4)):
        assert fresh.isnan().all()
    assert (torch.empty(5, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert torch.empty(2, requires_grad=True).requires_grad


def test_a_device_named_first_among_poison_is_one_afterwards():
    program = """
import torch
from kernelcheck.memory import poisoned_empty
with poisoned_empty(), torch.device("meta"):
    assert torch.empty(1).is_meta
with torch.device("meta"):
    assert torch.empty(1).is_meta
"""
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=True)


def test_other_tests_are_not_poisoned():
    assert torch.empty.__name__ == "empty" and not hasattr(torch.empty, "__wrapped__")
