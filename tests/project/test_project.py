"""What the project says of itself is true: the tree in CONTRIBUTING.md, the packages, the lazy imports."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def tracked() -> list[str]:
    """Files of the repository as git sees them, new ones included, ignored ones not."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listing.stdout.splitlines() if (ROOT / name).exists()]


def tree() -> dict[str, str]:
    """path -> description, from the block of CONTRIBUTING.md that draws the tree by indentation."""
    block = re.search(r"## The tree\n.*?```\n(.*?)```", CONTRIBUTING, re.S)[1]
    entries, folders = {}, []
    for line in block.splitlines():
        indent, name, text = re.match(r"( *)(\S+)\s+(.*)", line).groups()
        folders = folders[: len(indent) // 2]
        path = "".join(folders) + name
        entries[path] = text
        if name.endswith("/"):
            folders.append(name)
    return entries


def test_every_module_has_its_line_in_the_tree():
    entries = tree()
    files = [name for name in tracked() if not Path(name).name.startswith(("__init__", "."))]
    documented = ("kernels/", "orpo/", "benchmarks/")
    modules = {f for f in files if f.endswith(".py") and f.startswith(documented)}
    listed = {path for path in entries if path.endswith(".py")}
    assert modules <= listed, f"not in the tree: {sorted(modules - listed)}"
    for path in entries:
        assert (ROOT / path).exists(), f"in the tree, but not there: {path}"


def test_top_level_holds_what_the_tree_shows():
    top = {name.split("/")[0] for name in tracked() if not name.startswith(".")}
    shown = {path.split("/")[0] for path in tree() if not path.startswith(".")}
    assert top == shown


def test_files_stay_readable():
    for name in tracked():
        if name.endswith(".py"):
            lines = len((ROOT / name).read_text().splitlines())
            limit = 500 if name.startswith("tests/") else 320
            assert lines <= limit, f"{name} has {lines} lines"


def test_no_package_named_kernels():
    # transformers imports Hugging Face's `kernels` by that name; a package of ours would shadow it.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_ruff_is_the_version_that_pyproject_pins():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    assert any(re.fullmatch(r"ruff==[\d.]+", entry) for entry in extras)


def test_triton_asked_for_but_not_installed_is_said():
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, orpo\n"
        "h, w, y = torch.randn(2, 3, 4), torch.randn(5, 4), torch.ones(2, 3, dtype=torch.long)\n"
        "try: orpo.orpo_loss(h, w, y, backend='triton')\n"
        "except ValueError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "triton, which is not installed" in done.stdout


def test_peers_are_imported_by_tests_and_benchmarks_alone():
    for name in tracked():
        # An integration is for programs that have imported its peer already.
        of_peers = name.startswith("orpo/integrations/")
        if name.endswith(".py") and name.startswith(("kernels/", "orpo/")) and not of_peers:
            code = (ROOT / name).read_text()
            assert not re.search(r"^\s*(from|import) (trl|liger_kernel|cut_cross_entropy)\b", code, re.M), name
