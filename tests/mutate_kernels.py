"""Plant each fault of mutations*.py in a copy of the tree, and show which check notices it.

    python tests/mutate_kernels.py                 all; exit status 1 if one is not noticed
    python tests/mutate_kernels.py --only strip    those whose name or file contains "strip"

A fault that names a test is tried with that test. The others are of the kernels, and tried with the checks below, in
order until one fails: kernels interpreted with every access watched, the loss against float64 truth, the same kernels
compiled and executed, the choice of tiles (first for the file that it is about). All of them have to pass on the
untouched copy first, which is taken once: the working tree is never edited, and may change meanwhile.

A check that does not end has noticed nothing: it may be slow for another reason. Nor has one that could not start.
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
from mutations_data import DATA
from mutations_training import TRAINING

ROOT = Path(__file__).parents[1]
COPIED = ("kernels", "orpo", "tests", "benchmarks", "pyproject.toml")
ALL = [*MUTATIONS, *DATA, *TRAINING]

# Seconds each; the loss's own tests come after the watched ones because they take longer.
CHECKS = (
    ("watched", ["--kernels=interpret", "tests/kernel/test_kernel_memory.py", "tests/kernel/test_kernel_numerics.py"]),
    (
        "loss",
        [
            "--kernels=interpret",
            "-m",
            "kernels",
            "tests/kernel/test_fused.py::test_float32_is_exact",
            "tests/kernel/test_kernel_kept.py",
            "tests/kernel/test_kernel_blocks.py",
        ],
    ),
    ("executed", ["--kernels=simt", "-m", "kernels", "tests/kernel/test_fused.py::test_float32_is_exact"]),
    (
        "tiles",
        [
            "--kernels=interpret",
            "tests/kernel/test_kernel_tuning.py",
            "tests/kernel/test_kernel_tiles.py",
        ],
    ),
)
# A fault may make a loop endless.
SECONDS = 300

NOTICED, SURVIVED, TIMED_OUT, NOT_RUN = "noticed", "SURVIVED", "TIMED OUT", "NOT RUN"


def copy_tree(folder: Path, root: Path) -> None:
    """Copy what the tests need."""
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".pytest_cache"))
        elif source.exists():
            shutil.copy(source, folder / name)


def checks_of(mutation: Mutation) -> tuple[tuple[str, list[str]], ...]:
    """(name, arguments of pytest) of what may notice `mutation`, in order."""
    if mutation.test:
        return (("test", [mutation.test]),)
    if Path(mutation.file).name == "tuning.py":
        return tuple(sorted(CHECKS, key=lambda check: check[0] != "tiles"))
    return CHECKS


def run_checks(folder: Path, checks: tuple[tuple[str, list[str]], ...], seconds: float | None) -> tuple[str, str]:
    """Run `checks` on the tree in `folder` until one does not pass: (a status, in words what happened)."""
    environment = dict(os.environ, PYTHONPATH=f"{folder / 'kernels'}{os.pathsep}{folder}", PYTHONDONTWRITEBYTECODE="1")
    environment.pop("TRITON_INTERPRET", None)
    environment.setdefault("OMP_NUM_THREADS", "1")
    for name, arguments in checks:
        command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
        try:
            result = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return TIMED_OUT, f"{name}: no end within {seconds} s"
        if result.returncode:
            # pytest's 1 is a test that failed, a signal is a crash of one; 2 to 5 say that no test came to its verdict.
            return NOT_RUN if result.returncode > 1 else NOTICED, f"{name}: {_what_failed(result)}"
    return SURVIVED, "every check passes"


def _what_failed(result: subprocess.CompletedProcess) -> str:
    summary = re.search(r"^(?:FAILED|ERROR) \S*/?(test_\w+\.py::.*)$", result.stdout, re.MULTILINE)
    if summary is None:
        return (result.stdout + result.stderr).strip()[-500:]
    return summary[1]


def try_mutation(mutation: Mutation, root: Path = ROOT) -> tuple[str, str]:
    """Plant `mutation` in a copy of the tree at `root`: (a status, in words which check noticed it)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tree(folder, root)
        file = folder / mutation.file
        file.write_text(mutation.apply(file.read_text()))
        return run_checks(folder, checks_of(mutation), SECONDS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="try the mutations whose fault or file contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutations tried at once")
    options = parser.parse_args()
    chosen = [mutation for mutation in ALL if options.only in f"{mutation.fault} {mutation.file}"]
    for mutation in chosen:
        mutation.apply((ROOT / mutation.file).read_text())

    found = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        copy_tree(root, ROOT)
        named = sorted({mutation.test for mutation in chosen if mutation.test})
        checks = CHECKS if any(not mutation.test for mutation in chosen) else ()
        status, words = run_checks(root, (*checks, *([("tests", named)] if named else [])), None)
        if status != SURVIVED:
            print(f"the checks fail without any mutation: {words}")
            return 1
        with ThreadPoolExecutor(options.jobs) as pool:
            for mutation, outcome in zip(chosen, pool.map(partial(try_mutation, root=root), chosen), strict=True):
                found.append((*outcome, f"{mutation.file}: {mutation.fault}"))
                print("{2}: {0}: {1}".format(*found[-1]), flush=True)
    others = [entry for entry in found if entry[0] != NOTICED]
    print(f"{len(found)} mutations, {len(others)} not noticed")
    for status, words, fault in others:
        print(f"  {status}: {fault}: {words}")
    return 1 if others or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
