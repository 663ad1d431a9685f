"""How a figure is taken: the gate, interleaved rounds, memory by allocation, and the stamp that goes with every row."""

from __future__ import annotations

import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib import metadata

import torch
from orpo_kernels import reference
from orpo_kernels.rows import Rows
from orpo_kernels.torch_logits import multiplies_bfloat16
from torch.profiler import ProfilerActivity, profile

from .cases import Batch, Case, make_batch
from .peers import Peer

BETA = 0.1
# Relative errors beyond which a result is wrong, not rounded: loss, and the larger of both gradients.
LIMITS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 1e-1), torch.float16: (2e-3, 2e-2)}
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")


@cache
def stamp() -> dict[str, object]:
    """Hardware, versions and commit, to stand beside every figure."""

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return ""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True).stdout.strip()

    # Figures stored a moment ago are no change of what is measured.
    changed = git(
        "status", "--porcelain", "--", ":/", *(f":(top,exclude)benchmarks/{name}" for name in ("results", "RESULTS.md"))
    )
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else ""),
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


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forward(peer: Peer, batch: Batch) -> torch.Tensor:
    """The loss, with a graph for backward."""
    return peer(batch.requiring_grad(), BETA).detach()


def step(peer: Peer, batch: Batch) -> torch.Tensor:
    """Forward and backward."""
    loss = peer(batch.requiring_grad(), BETA)
    loss.backward()
    return loss.detach()


def evaluation(peer: Peer, batch: Batch) -> torch.Tensor:
    """Forward under no_grad, of a head that requires grad and of hidden states that came out of such a forward."""
    batch.requiring_grad().hidden.requires_grad_(False)
    with torch.no_grad():
        return peer(batch, BETA)


def frozen_head(peer: Peer, batch: Batch) -> torch.Tensor:
    """Forward and backward to the hidden states alone, as with LoRA."""
    loss = peer(batch.requiring_grad(head=False), BETA)
    loss.backward()
    return loss.detach()


KINDS: dict[str, Callable[[Peer, Batch], torch.Tensor]] = {
    "forward": forward,
    "step": step,
    "evaluation": evaluation,
    "frozen": frozen_head,
}


def truth_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, dX and dW in float64 from the reference; the gradients are kept in float32, half the size."""
    result, dx, dw = exact(batch)
    return result.loss, dx, dw


def exact(batch: Batch) -> tuple[reference.Objective, torch.Tensor, torch.Tensor]:
    """The objective and its gradients by the hidden states and the head, as `truth_of`."""
    pairs, positions = batch.labels.shape[0] // 2, batch.labels.shape[1]
    at = (batch.scored[:, 1:] != -100).nonzero()
    sequence, position = at[:, 0], at[:, 1]
    rows = Rows(
        rows_N=sequence * positions + position,
        targets_N=batch.input_ids[sequence, position + 1],
        sequence_N=sequence,
        in_response_N=batch.labels[sequence, position + 1] != -100,
        in_nll_N=sequence < pairs,
        pairs=pairs,
    )
    x = batch.hidden.detach().flatten(0, 1)[rows.rows_N].double()
    result, dx, dw, _ = reference.orpo(x, batch.weight.detach().double(), rows, beta=BETA)
    whole = torch.zeros(batch.hidden.shape, dtype=torch.float32, device=x.device)
    whole.flatten(0, 1)[rows.rows_N] = dx.float()
    return result, whole, dw.float()


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """|value - truth| / |truth| in the Euclidean norm, some rows at a time."""
    pieces = zip(value.detach().reshape(-1).split(2**24), truth.reshape(-1).split(2**24), strict=True)
    sums = [((a.double() - b.double()).square().sum().item(), b.double().square().sum().item()) for a, b in pieces]
    return (sum(d for d, _ in sums) / sum(t for _, t in sums)) ** 0.5


def errors_of(peer: Peer, batch: Batch, truth: tuple[torch.Tensor, ...]) -> tuple[float, float, float]:
    """Relative errors of loss, dX and dW."""
    loss = step(peer, batch)
    errors = tuple(
        relative_error(value, exact)
        for value, exact in zip((loss, batch.hidden.grad, batch.weight.grad), truth, strict=True)
    )
    batch.requiring_grad()
    return errors


def is_right(errors: tuple[float, float, float], dtype: torch.dtype) -> bool:
    """Whether a result is off by no more than its dtype explains; NaN is not."""
    loss_limit, gradient_limit = LIMITS[dtype]
    return errors[0] < loss_limit and errors[1] < gradient_limit and errors[2] < gradient_limit


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


def interleaved(
    functions: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[Callable[[], object]], float] = wall_clock,
) -> dict[str, list[float]]:
    """Seconds of every function in every round, in which they take turns: a busy moment of the machine hits them all.

    Run each once before: the first call compiles, and touches memory for the first time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(clock(function))
    return seconds


def summary(seconds: list[float], baseline: list[float] | None = None) -> dict[str, float]:
    """Median, quantiles and the least; `ratio` is the median over rounds of how many times slower the baseline was."""
    ordered = sorted(seconds)

    def quantile(share: float) -> float:
        at = share * (len(ordered) - 1)
        low = int(at)
        return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])

    out = {"median": quantile(0.5), "q20": quantile(0.2), "q80": quantile(0.8), "least": ordered[0]}
    if baseline:
        out["ratio"] = statistics.median(b / a for a, b in zip(seconds, baseline, strict=True))
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
    """Every peer on one case: errors against float64, then, for those that are right, time and memory by kind.

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
    records, right = [], {}
    for name, peer in peers.items():
        try:
            errors = errors_of(peer, batch, truth)
        except Exception as problem:
            # A peer may not run in this dtype, or on this machine: that is a result, and it is reported.
            status = f"failed: {type(problem).__name__}: {str(problem).splitlines()[0][:120] if str(problem) else ''}"
            records += [{**shape, "kind": kind, "peer": name, "status": status} for kind in kinds]
            continue
        right[name] = dict(zip(("error_loss", "error_dx", "error_dw"), errors, strict=True))
        if not is_right(errors, dtype):
            wrong = right.pop(name)
            records += [{**shape, "kind": kind, "peer": name, "status": "wrong", **wrong} for kind in kinds]
    del truth
    gc.collect()
    for kind in kinds:
        functions = {name: partial(KINDS[kind], peers[name], batch) for name in right}
        memory = {}
        for name, function in functions.items():
            # Gradients that the call before left would be freed within this one, and hide as many bytes of its own.
            batch.requiring_grad()
            memory[name] = peak_memory(function)
        seconds = interleaved(functions, rounds, clock)
        for name, times in seconds.items():
            figures = summary(times, seconds.get(baseline))
            records.append(
                {
                    **shape,
                    "kind": kind,
                    "peer": name,
                    "status": "measured",
                    **figures,
                    "seconds": times,
                    "rounds": rounds,
                    "peak_bytes": memory[name],
                    **right[name],
                }
            )
    return [{**record, **stamp()} for record in records]
