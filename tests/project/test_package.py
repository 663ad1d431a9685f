"""The package itself: importing it is cheap, and its public names are found."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import orpo
from orpo.packages import TRAINER

ROOT = Path(__file__).resolve().parents[2]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_brings_in_neither_transformers_nor_triton():
    code = "import orpo, sys; print([m for m in ('torch', 'transformers', 'triton', 'datasets') if m in sys.modules])"
    assert run(code).strip() == "[]"


# All but torch that any part of the project imports; in a place of their own, so that a package found missing is not.
OTHERS = (
    "accelerate datasets huggingface_hub matplotlib numpy pandas peft safetensors tokenizers tqdm transformers triton "
    "yaml"
)
BLOCKED = f"import sys; sys.modules.update(dict.fromkeys({OTHERS.split()!r}));"


def test_the_loss_needs_torch_alone():
    code = (
        f"{BLOCKED} import torch, orpo_kernels; from orpo import FusedLinearORPOLoss, orpo_loss, token_logprobs;"
        "x, w = torch.randn(2, 4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True);"
        "y = torch.ones(2, 4, dtype=torch.long);"
        "orpo_loss(x, w, y).loss.backward(); FusedLinearORPOLoss()(w, x, y)[0].backward();"
        "token_logprobs(x[0], w, y[0]).sum().backward();"
        "print(bool((x.grad.isfinite() & (x.grad != 0)).any()), bool(w.grad.isfinite().all()))"
    )
    assert run(code).strip() == "True True"


def test_what_is_installed_without_extras_is_torch_and_triton():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [re.match(r"\w+", entry)[0] for entry in project["dependencies"]] == ["torch", "triton"]


def fails(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr.strip()


def test_the_trainer_without_its_extra_says_what_to_install():
    error = fails(f"{BLOCKED} from orpo import ORPOTrainer").splitlines()[-1]
    assert error.startswith(
        "ImportError: orpo.ORPOTrainer belongs to the trainer, which needs accelerate, datasets, numpy"
    )
    assert "pip install '.[train]'" in error


@pytest.mark.parametrize("command", ["train", "generate"])
def test_a_command_without_the_extra_says_so_in_one_line(command):
    error = fails(f"{BLOCKED} import orpo.commands; orpo.commands.{command}()")
    assert len(error.splitlines()) == 1
    assert error.startswith(f"orpo-{command} belongs to the trainer") and "pip install '.[train]'" in error


def test_only_pictures_need_what_draws_them():
    pytest.importorskip("transformers", reason="needs pip install '.[train]'")
    without = "import sys; sys.modules['matplotlib'] = None; import orpo"
    assert run(f"{without}; print(orpo.ORPOTrainer.__name__)").strip() == "ORPOTrainer"
    # Said before a run, not when its curves are drawn.
    assert "needs matplotlib" in fails(f"{without}.commands; orpo.commands.train()")


def test_the_extra_installs_what_the_trainer_is_refused_without():
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    installed = {re.match(r"\w+", entry)[0].replace("pyyaml", "yaml") for entry in extra}
    assert installed == {*TRAINER, "jinja2", "matplotlib"}


@pytest.mark.parametrize("name", sorted(set(orpo.__all__)))
def test_public_names_exist(name):
    if name in ("ORPOConfig", "ORPOTrainer"):
        pytest.importorskip("transformers", reason="needs pip install '.[train]'")
    assert getattr(orpo, name) is not None and name in dir(orpo)


def test_other_names_do_not():
    with pytest.raises(AttributeError, match="has no attribute 'orpo_gain'"):
        orpo.orpo_gain  # noqa: B018
