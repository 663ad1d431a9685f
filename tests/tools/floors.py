"""Runs tests with the oldest packages that pyproject.toml allows, in environments made for it.

python -m tests.tools.floors                                 all, and writes the table of docs/installing.md
python -m tests.tools.floors loss --folder envs --no-write   one of them, in an environment that is kept
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "installing.md"
TOOLS = "pytest pytest-xdist hypothesis mpmath"


@dataclass(frozen=True)
class Floor:
    """Packages with their versions, in the order in which they are installed, and the tests that have to pass."""

    what: str
    packages: tuple[str, ...]
    tests: str


FLOORS = {
    "loss": Floor(
        "the loss",
        # The interpreter of triton 3.4 fails with a newer numpy.
        ("torch==2.8.0 triton==3.4.0", f"numpy<2.4 {TOOLS}"),
        "package loss loss_edges loss_refusals fused preferences reference rows bins cpu_logits kernel_blocks "
        "kernel_kept kernel_memory kernel_numerics kernel_tiles kernel_tuning",
    ),
    "trainer": Floor(
        "the trainer",
        (
            "torch==2.13.0",
            "transformers==5.23.0 datasets==5.2.0 accelerate==1.15.0 peft==0.21.2 triton==3.9.0 numpy matplotlib "
            f"pyyaml tqdm tensorboard {TOOLS}",
        ),
        "attach trainer probe config layout prefix_mask flash lora train checkpoints evaluation prepare start resuming "
        "find_checkpoint generate newcomer arguments trainer_refusals broken_files samples merge load",
    ),
    "trl": Floor(
        "`orpo.integrations.trl`",
        ("torch==2.13.0", f"transformers==4.57.6 trl==0.24.0 datasets==4.0.0 accelerate==1.10.0 triton==3.9.0 {TOOLS}"),
        "integration_trl",
    ),
}
SHOWN = ("torch", "triton", "transformers", "datasets", "accelerate", "peft", "trl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("floors", nargs="*", metavar="floor", help=", ".join(FLOORS))
    parser.add_argument("--folder", type=Path, help="of the environments; default: one that is deleted")
    parser.add_argument("--no-write", action="store_true", help="leave the page as it is")
    options = parser.parse_args()
    if unknown := set(options.floors) - FLOORS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(FLOORS)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        rows = [try_floor(FLOORS[name], folder / name) for name in options.floors or FLOORS]
    print("\n".join(rows))
    if not options.no_write:
        PAGE.write_text(with_rows(PAGE.read_text(), rows))


def try_floor(floor: Floor, folder: Path) -> str:
    """Its row of the table; ends the process where a test fails."""
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for packages in floor.packages:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages.split()], check=True)
    tests = [str(path) for name in floor.tests.split() for path in (ROOT / "tests").glob(f"*/test_{name}.py")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    if done.returncode:
        raise SystemExit(f"{floor.what}: tests fail with {' '.join(floor.packages)}")
    passed = re.search(r"(\d+) passed", done.stdout)[1]
    listing = subprocess.run([python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True, text=True)
    there = {entry["name"]: entry["version"].partition("+")[0] for entry in json.loads(listing.stdout)}
    return row(floor.what, [there.get(name, "") for name in SHOWN], passed)


def row(what: str, versions: list[str], passed: str) -> str:
    """A line of the table."""
    return " | ".join([f"| {what}", *versions, f"{passed} |"])


def with_rows(page: str, rows: list[str]) -> str:
    """`page` with these rows in place of those of the same first cell."""
    for new in rows:
        first = new.split(" | ")[0]
        page, found = re.subn(rf"^{re.escape(first)} \|.*$", lambda _, new=new: new, page, flags=re.M)
        if found != 1:
            raise ValueError(f"{PAGE.name} has {found} rows that begin with {first!r}; the table needs one")
    return page


if __name__ == "__main__":
    main()
