"""The one command for someone with a GPU: tests, times, memory, a table and a picture.

    pip install '.[test,bench]'
    python -m benchmarks.gpu --out gpu-results
    python -m benchmarks.gpu --device cpu --quick        the same path with tiny shapes, on any machine

1. Runs the kernel tests natively (`pytest tests --kernels=cuda`) and stops where they fail.
2. Times forward, forward and backward, evaluation and a frozen head in bfloat16, with CUDA events, interleaved, against
   TRL, Liger, CCE and torch, each gated by its error against float64; records peak memory.
3. Writes gpu.csv, each row stamped with device, versions and commit, and gpu.png.

Without a GPU it says so and ends with exit status 0.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .cases import HEADS as ALL_HEADS
from .cases import TINY, Case, head_case
from .measure import measure_case, stamp, synchronize, wall_clock
from .peers import BUDGET, PEERS, available, ours_within
from .pictures import bars

HEADS = ("OPT-350M", "SmolLM2-135M", "Phi-2", "Mistral-7B-v0.3", "Llama-3-8B", "Qwen2.5-0.5B", "Gemma-2-2B")
PAIRS, POSITIONS, PROMPT_SHARE = 4, 1024, 0.5
LABELS = {"step": "forward and backward", "forward": "forward", "evaluation": "evaluation", "frozen": "frozen head"}


def event_clock(function: Callable[[], object]) -> float:
    """Seconds between two CUDA events around a call."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize()
    before.record()
    function()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def run_tests(device: str) -> int:
    """The kernel tests natively, or a part of them interpreted; the exit status of pytest."""
    if device == "cuda":
        command = ["tests", "-m", "kernels", "--kernels=cuda", "-q"]
    else:
        command = ["tests/kernel/test_kernel_numerics.py", "-m", "kernels", "--kernels=interpret", "-q", "-x"]
    return subprocess.run([sys.executable, "-m", "pytest", *command], cwd=Path(__file__).parents[1]).returncode


def write_csv(records: list[dict], path: Path) -> None:
    """All records with this run's stamp, every field that any of them has."""
    records = [{**record, **stamp()} for record in records]
    fields = list(dict.fromkeys(name for record in records for name in record if name != "seconds"))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)


def plot(records: list[dict], path: Path) -> bool:
    """One panel a kind: milliseconds of each peer by head. Returns whether anyone was timed, and drawn."""
    timed = [r for r in records if not r["peer"].startswith(BUDGET)]
    panels = {label: [r for r in timed if r["kind"] == kind] for kind, label in LABELS.items()}
    versions = "{device}, torch {torch}, commit {commit}".format(**stamp())
    return bars(panels, path, lambda r: 1e3 * r["median"] if "median" in r else None, "ms", versions, "log")


def budgets(text: str) -> list[int]:
    """MiB with commas.

    Raises:
        ValueError: one is no number of MiB.
    """
    found = [int(mib) for mib in text.split(",")]
    if min(found) < 0:
        raise ValueError(text)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of gpu.csv and gpu.png")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--heads", help="comma-separated; default: " + ", ".join(HEADS))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--budgets", default=[], type=budgets, help="also ours with these logits_budget, MiB with commas"
    )
    parser.add_argument("--skip-tests", action="store_true")
    options = parser.parse_args(arguments)
    # All of it before the tests, which take minutes.
    if options.quick and options.heads:
        parser.error("--quick has a tiny head of its own, and would ignore --heads")
    heads = options.heads.split(",") if options.heads else HEADS
    if unknown := [head for head in heads if head not in ALL_HEADS]:
        parser.error(f"--heads names {unknown[0]!r}; there are {', '.join(ALL_HEADS)}")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; it is at least 1")
    if options.device == "cpu" and torch.cuda.is_available():
        parser.error("memory and stamp would be the GPU's: hide it with CUDA_VISIBLE_DEVICES= to measure on the CPU")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No GPU here: torch.cuda.is_available() is False. Nothing was run; --device cpu --quick tries the path.")
        return 0
    if not options.skip_tests and (status := run_tests(options.device)):
        print("The kernel tests failed here, so nothing was timed.")
        return status
    cases: list[Case] = [TINY] if options.quick else [head_case(h, PROMPT_SHARE, PAIRS, POSITIONS) for h in heads]
    clock = event_clock if options.device == "cuda" else wall_clock
    peers = {name: function for name, function in PEERS.items() if available(name)}
    peers |= {f"{BUDGET}{mib} MiB": ours_within(mib * 2**20) for mib in options.budgets}
    options.out.mkdir(parents=True, exist_ok=True)
    records: list[dict] = []
    for case in cases:
        records += measure_case(case, torch.bfloat16, peers, LABELS, options.rounds, options.device, clock=clock)
        # After every case, so that an interruption costs one.
        write_csv(records, options.out / "gpu.csv")
        for r in records:
            if r["head"] == case.name:
                figures = f"{1e3 * r['median']:9.2f} ms {r['peak_bytes'] / 2**20:8.0f} MiB" if "median" in r else ""
                print(f"{r['head']:18s} {r['kind']:11s} {r['peer']:28s} {figures or r['status']}")
    table, picture = options.out / "gpu.csv", options.out / "gpu.png"
    # An earlier run's would pass for this one's.
    picture.unlink(missing_ok=True)
    if plot(records, picture):
        print(f"written: {table}, {picture}")
    else:
        print(f"written: {table}; no peer was timed, so there is no picture")
    return 0


if __name__ == "__main__":
    sys.exit(main())
