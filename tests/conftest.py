"""Shared by all tests: where kernels run (`--kernels=`), and the folder of large reference material, if it is there."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytest_plugins = ["kernelcheck.plugin"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference runs and data too large for the repository, looked for beside it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the reference data, a folder `shared` beside the repository")
    return folder


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch) -> None:
    """Files that `datasets` prepares go to a folder of the test's own, not to the user's."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def heads_taken_for_frozen(monkeypatch) -> list[bool]:
    """Whether the schedule by strips took the head for a frozen one, a call each."""
    from orpo_kernels import strips

    seen: list[bool] = []
    original = strips.token_stats

    def spy(plan, *more):
        seen.append(plan.needs.frozen)
        return original(plan, *more)

    monkeypatch.setattr(strips, "token_stats", spy)
    return seen


@pytest.fixture(params=[True, False], ids=["bfloat16 multiplied", "bfloat16 widened"])
def bfloat16_cpu(request, monkeypatch) -> bool:
    """A CPU with instructions for bfloat16, and one without: the loss is computed in different dtypes on the two."""
    from orpo_kernels.cpu import logits as cpu_logits

    monkeypatch.setattr(cpu_logits, "multiplies_bfloat16", lambda: request.param)
    return request.param
