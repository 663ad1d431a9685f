"""Plant each fault of mutations.py in a copy of the tree, and show which check notices it.

    python tests/mutate_kernels.py                 all; exit status 1 if one survives
    python tests/mutate_kernels.py --only strip    those whose name or file contains "strip"

The checks run in order until one fails: kernels interpreted with every access watched, the loss against float64 truth,
the same kernels compiled and executed, the choice of a form (first for the files that it is about). First they have to
pass on the untouched copy, which is taken once: the working tree is never edited, and may change meanwhile.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[1]
COPIED = ("kernels", "orpo", "tests", "benchmarks", "pyproject.toml")

# Seconds each; the loss's own tests come after the watched ones because they take longer.
CHECKS = (
    ("watched", ["--kernels=interpret", "tests/test_kernel_memory.py", "tests/test_kernel_numerics.py"]),
    (
        "loss",
        [
            "--kernels=interpret",
            "-m",
            "kernels",
            "tests/test_fused.py::test_float32_is_exact",
            "tests/test_kernel_kept.py",
            "tests/test_kernel_blocks.py",
        ],
    ),
    ("executed", ["--kernels=simt", "-m", "kernels", "tests/test_fused.py::test_float32_is_exact"]),
    (
        "form",
        [
            "--kernels=interpret",
            "tests/test_kernel_form.py",
            "tests/test_kernel_tuning.py",
            "tests/test_kernel_configs.py",
        ],
    ),
)
FORM_FILES = ("triton_strip_backend.py", "form.py", "tuning.py")
# A fault may make a loop endless.
SECONDS = 300


def copy_tree(folder: Path, root: Path = ROOT) -> None:
    """Copy what the kernel tests need."""
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))
        elif source.exists():
            shutil.copy(source, folder / name)


def first_failure(folder: Path, file: str = "") -> str | None:
    """Run the checks on the tree in `folder`, first those about `file`; in words the first that fails, or None."""
    environment = dict(os.environ, PYTHONPATH=f"{folder / 'kernels'}{os.pathsep}{folder}", PYTHONDONTWRITEBYTECODE="1")
    environment.pop("TRITON_INTERPRET", None)
    environment.setdefault("OMP_NUM_THREADS", "1")
    about_form = Path(file).name in FORM_FILES
    for name, arguments in sorted(CHECKS, key=lambda check: check[0] != "form") if about_form else CHECKS:
        command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
        try:
            result = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return f"{name}: no end within {SECONDS} s"
        if result.returncode:
            return f"{name}: {_what_failed(result)}"
    return None


def _what_failed(result: subprocess.CompletedProcess) -> str:
    summary = re.search(r"^(?:FAILED|ERROR) \S*/?(test_\w+\.py::.*)$", result.stdout, re.MULTILINE)
    if summary is None:
        return (result.stdout + result.stderr).strip()[-500:]
    return summary[1]


def try_mutation(mutation: Mutation, root: Path = ROOT) -> str | None:
    """In words which check notices `mutation` in a copy of the tree at `root`, or None."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tree(folder, root)
        file = folder / mutation.file
        file.write_text(mutation.apply(file.read_text()))
        return first_failure(folder, mutation.file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="try the mutations whose fault or file contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutations tried at once")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if options.only in f"{mutation.fault} {mutation.file}"]
    for mutation in chosen:
        mutation.apply((ROOT / mutation.file).read_text())

    survivors = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        copy_tree(root)
        if failure := first_failure(root):
            print(f"the checks fail without any mutation: {failure}")
            return 1
        with ThreadPoolExecutor(options.jobs) as pool:
            found = pool.map(partial(try_mutation, root=root), chosen)
            for mutation, noticed in zip(chosen, found, strict=True):
                print(f"{mutation.file}: {mutation.fault}: {noticed or 'SURVIVED'}", flush=True)
                survivors += [mutation] if noticed is None else []
    print(f"{len(chosen)} mutations, {len(survivors)} survived")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
