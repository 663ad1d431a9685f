"""How a figure is taken: interleaved rounds, memory by allocation, and the stamp of a run."""

from __future__ import annotations

import gc
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from importlib import metadata
from pathlib import Path

import orpo_kernels
import torch
from orpo_kernels.cpu.logits import multiplies_bfloat16
from torch.profiler import ProfilerActivity, profile

from .cases import Case, make_batch
from .gate import KINDS, gate, truth_of
from .peers import Peer

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")


@cache
def stamp() -> dict[str, object]:
    """Hardware, versions and commit of this run."""

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return ""

    def git(*command: str) -> str:
        try:
            return subprocess.run(["git", *command], capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:
            return ""

    # Figures stored a moment ago are no change of what is measured.
    written = (f":(top,exclude){name}" for name in ("benchmarks/results", "benchmarks/RESULTS.md", "docs/memory.png"))
    changed = git("status", "--porcelain", "--", ":/", *written)
    root = git("rev-parse", "--show-toplevel")
    elsewhere = root and not Path(orpo_kernels.__file__).resolve().is_relative_to(Path(root).resolve() / "kernels")
    commit = (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        # What is measured may be an installation of any age, while the commit is that of the folder.
        "commit": commit + (" with installed kernels" if elsewhere else ""),
    }


def _cpu() -> str:
    """The CPU's name and what of it torch uses: one name stands for several generations on rented machines."""
    try:
        with open("/proc/cpuinfo") as info:
            name = next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    bfloat16 = "bfloat16" if multiplies_bfloat16() else "no bfloat16"
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}, {bfloat16})"


def default_device() -> str:
    """Where everything is measured, and what `stamp` names."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def emulates_bfloat16() -> bool:
    """Whether a step in bfloat16 takes most peers minutes here: a CPU without instructions for it."""
    return default_device() == "cpu" and not multiplies_bfloat16()


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(function: Callable[[], object]) -> int:
    """Most bytes alive at once that a call allocated."""
    if torch.cuda.is_available():
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    alive = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def wall_clock(function: Callable[[], object]) -> float:
    """Seconds that a call takes, to its end on the device."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def orders(names: Iterable[str], rounds: int) -> Iterator[list[str]]:
    """The names once a round, in an order of its own, the same in every run.

    In a fixed one, who comes after a peer that frees much memory would always find it warm: in a virtual machine that
    was a fifth of the time of a large head's evaluation.
    """
    order, shuffle = list(names), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        yield list(order)


def interleaved(
    functions: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[Callable[[], object]], float] = wall_clock,
) -> dict[str, list[float]]:
    """Seconds of every function in every round, in which they take turns: a busy moment of the machine hits them all.

    Run each once before: the first call compiles, and touches memory for the first time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for order in orders(functions, rounds):
        for name in order:
            seconds[name].append(clock(functions[name]))
    return seconds


def summary(seconds: list[float], baseline: list[float] | None = None) -> dict[str, float]:
    """Median, quantiles and the least; `ratio` is how many times as long the baseline took, by the medians."""
    ordered = sorted(seconds)

    def quantile(share: float) -> float:
        at = share * (len(ordered) - 1)
        low = int(at)
        return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    out = {"median": quantile(0.5), "q20": quantile(0.2), "q80": quantile(0.8), "least": ordered[0]}
    if baseline:
        out["ratio"] = statistics.median(baseline) / out["median"]
    return out


def measure_case(
    case: Case,
    dtype: torch.dtype,
    peers: dict[str, Peer],
    kinds: Iterable[str],
    rounds: int,
    device: str | None = None,
    baseline: str = "trl",
    clock: Callable[[Callable[[], object]], float] = wall_clock,
) -> list[dict[str, object]]:
    """Every peer on one case, kind by kind: errors against float64, then, for those that are right, time and memory.

    Loss and gradients are compared in forward and backward, the loss (and dX, with a frozen head) in every other kind.

    Returns:
        One record for each peer and kind. A peer whose answer is wrong, or that raised, has a record that says so, and
        no time.
    """
    # Every case compiles afresh: torch.compile gives up on a function after eight shapes.
    torch.compiler.reset()
    batch = make_batch(case, dtype, device or default_device())
    truth = truth_of(batch)
    shape = {
        "head": case.name,
        "pairs": case.pairs,
        "positions": case.positions,
        "prompt": case.prompt,
        "padded": case.lengths is not None,
        "rows": case.rows,
        "V": case.vocabulary,
        "D": case.hidden_size,
        "dtype": str(dtype).removeprefix("torch."),
    }
    right, refused = gate(peers, batch, truth, "step")
    # The head's gradient, the largest of the three, is compared once.
    truth = *truth[:2], None
    gc.collect()
    records: list[dict[str, object]] = []
    for kind in kinds:
        passed, others = (right, {}) if kind == "step" else gate({n: peers[n] for n in right}, batch, truth, kind)
        records += [{**shape, "kind": kind, "peer": n, **said} for n, said in {**refused, **others}.items()]
        functions = {name: partial(KINDS[kind], peers[name], batch) for name in passed}
        memory = {}
        for name, function in functions.items():
            # Gradients that the call before left would be freed within this one, and hide as many bytes of its own.
            batch.requiring_grad()
            memory[name] = peak_memory(function)
        seconds = interleaved(functions, rounds, clock)
        for name, times in seconds.items():
            figures = summary(times, seconds.get(baseline))
            record = {**shape, "kind": kind, "peer": name, "status": "measured", **figures, "seconds": times}
            memory_and_errors = {"peak_bytes": memory[name], **right[name], **passed[name]}
            records.append({**record, "rounds": rounds, **memory_and_errors})
    return records
