"""The package itself: importing it is cheap, and its public names are found."""

import subprocess
import sys

import pytest

import orpo


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_brings_in_neither_transformers_nor_triton():
    code = "import orpo, sys; print([m for m in ('torch', 'transformers', 'triton', 'datasets') if m in sys.modules])"
    assert run(code).strip() == "[]"


def test_the_loss_needs_neither_transformers_nor_triton():
    blocked = "import sys; sys.modules['transformers'] = sys.modules['triton'] = sys.modules['datasets'] = None;"
    code = (
        f"{blocked} import torch; from orpo import orpo_loss;"
        "x = torch.randn(2, 4, 8, requires_grad=True);"
        "orpo_loss(x, torch.randn(16, 8), torch.ones(2, 4, dtype=torch.long)).loss.backward();"
        "print(bool(x.grad.isfinite().all()))"
    )
    assert run(code).strip() == "True"


@pytest.mark.parametrize("name", sorted(set(orpo.__all__)))
def test_public_names_exist(name):
    assert getattr(orpo, name) is not None and name in dir(orpo)


def test_other_names_do_not():
    with pytest.raises(AttributeError, match="has no attribute 'orpo_gain'"):
        orpo.orpo_gain  # noqa: B018
