"""Accuracy and time of the loss against what people use today, on one machine.

    pip install '.[bench]'
    python -m benchmarks.loss --case smollm2 --dtype float32
    python -m benchmarks.loss --case smollm2 --dtype bfloat16 --rounds 5 --peers 'ours,trl,liger'

First the error of loss, hidden-state gradient and weight gradient against float64; a result that is further off than
its dtype explains gets no time. Then rounds in which the peers take turns, so that a busy moment of the machine hits
all of them: medians, the spread, and each peer's ratio to TRL within the rounds. Memory is the most that a call
allocates beyond its inputs, from the allocation events of the profiler, not the size of the process.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from orpo import orpo_loss

from .cases import CASES, Batch, Case, make_batch
from .peers import PEERS, Peer, available

BETA = 0.1

# Relative errors beyond which a result is wrong, not rounded: loss, and the larger of both gradients.
LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 1e-1), torch.float16: (2e-3, 2e-2)}


def stamp() -> str:
    """Hardware, versions and commit, to stand beside every figure."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{_cpu()}, {torch.get_num_threads()} threads"
    )
    return f"{device}; torch {torch.__version__}, Python {platform.python_version()}, commit {commit or 'unknown'}"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """|value - truth| / |truth| in the Euclidean norm."""
    return ((value.detach().double() - truth).norm() / truth.norm()).item()


def truth_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and both gradients in float64, by strips so that the largest heads fit."""
    exact = batch.double().requiring_grad()
    out = orpo_loss(
        exact.hidden,
        exact.weight,
        exact.labels,
        nll_labels=exact.input_ids,
        beta=BETA,
        logits_budget=0,
        backend="torch",
    )
    out.loss.backward()
    return out.loss.detach(), exact.hidden.grad, exact.weight.grad


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step(peer: Peer, batch: Batch) -> torch.Tensor:
    """Forward and backward."""
    loss = peer(batch.requiring_grad(), BETA)
    loss.backward()
    return loss.detach()


def evaluate(peer: Peer, batch: Batch) -> torch.Tensor:
    """Forward of parameters that require grad, under no_grad."""
    batch.requiring_grad()
    with torch.no_grad():
        return peer(batch, BETA)


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


def check(names: list[str], batch: Batch) -> list[str]:
    """Print every peer's error against float64 and return those whose answer is right."""
    loss, dh, dw = truth_of(batch)
    right = []
    print(f"{'relative error in':28s} {'loss':>9s} {'dX':>9s} {'dW':>9s}")
    for name in names:
        value = step(PEERS[name], batch)
        errors = [
            relative_error(a, b)
            for a, b in zip((value, batch.hidden.grad, batch.weight.grad), (loss, dh, dw), strict=True)
        ]
        loss_limit, grad_limit = LIMITS[batch.hidden.dtype]
        passes = errors[0] < loss_limit and max(errors[1:]) < grad_limit
        print(f"{name:28s} " + " ".join(f"{e:9.1e}" for e in errors) + ("" if passes else "  WRONG: not timed"))
        if passes:
            right.append(name)
    return right


def measure(names: list[str], batch: Batch, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every peer in every round, by what was timed."""
    seconds = {name: {"step": [], "evaluation": []} for name in names}
    for round_ in range(rounds + 1):
        for name in names:
            for kind, function in (("step", step), ("evaluation", evaluate)):
                synchronize()
                start = time.perf_counter()
                function(PEERS[name], batch)
                synchronize()
                # The first round compiles, and touches memory for the first time.
                if round_:
                    seconds[name][kind].append(time.perf_counter() - start)
    return seconds


def report(seconds: dict[str, dict[str, list[float]]], memory: dict[str, int], reference: str) -> None:
    """Median, spread, and ratio to `reference` round by round."""
    print(
        f"{'':28s} {'fwd+bwd s':>22s} {'x ' + reference:>16s} {'evaluation s':>14s} {'x ' + reference:>8s} {'MiB':>7s}"
    )
    for name, times in seconds.items():
        ratios = {k: [b / a for a, b in zip(times[k], seconds[reference][k], strict=True)] for k in times}
        steps, evaluations = times["step"], times["evaluation"]
        print(
            f"{name:28s} {statistics.median(steps):8.3f} ({min(steps):5.2f}-{max(steps):5.2f}) "
            f"{statistics.median(ratios['step']):5.2f} ({min(ratios['step']):4.2f}-{max(ratios['step']):4.2f}) "
            f"{statistics.median(evaluations):13.3f} {statistics.median(ratios['evaluation']):8.2f} "
            f"{memory[name] / 2**20:8.0f}"
        )


def run(case: Case, dtype: torch.dtype, names: list[str], rounds: int, reference: str = "trl") -> None:
    """Check, measure and print one case."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = make_batch(case, dtype, device)
    rows = int((batch.labels[:, 1:] != -100).sum()) + case.pairs * (case.prompt - 1)
    print(f"{case}, {dtype}: {rows} of {batch.labels.numel()} rows count\n{stamp()}")
    right = check(names, batch)
    reference = reference if reference in right else right[0]
    memory = {name: peak_memory(lambda name=name: step(PEERS[name], batch)) for name in right}
    report(measure(right, batch, rounds), memory, reference)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="smollm2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", help="comma-separated; default: all that are installed")
    arguments = parser.parse_args()
    names = arguments.peers.split(",") if arguments.peers else list(PEERS)
    unknown = set(names) - set(PEERS)
    if unknown:
        parser.error(f"--peers names {sorted(unknown)}; there are {list(PEERS)}")
    missing = [name for name in names if not available(name)]
    if missing:
        print(f"not installed, left out: {', '.join(missing)} (pip install '.[bench]')")
    run(
        CASES[arguments.case], getattr(torch, arguments.dtype), [n for n in names if n not in missing], arguments.rounds
    )


if __name__ == "__main__":
    main()
