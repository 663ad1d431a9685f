"""Until it dies: one pair of ever longer sequences, each peer in a process of its own that may use so much memory.

    python -m benchmarks.run --group long
    python -m benchmarks.limits --peer trl --length 8192 --memory 16     (one attempt, in this process)

The process limits itself (RLIMIT_DATA), so that a peer which asks for more gets an error and the machine survives. A
peer's row ends at the length at which it died or took longer than `SECONDS`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

from . import results

HEAD = "SmolLM2-135M"
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
PEERS = (
    "ours (strips)",
    "ours",
    "trl",
    "trl chunked",
    "liger",
    "liger compiled",
    "cce",
    "torch linear_cross_entropy",
    "torch linear_cross_entropy (chunked)",
    "torch eager",
)
MEMORY_GIB = 8
SECONDS = 150


def attempt(peer: str, length: int, memory_gib: float) -> dict[str, object]:
    """One forward and backward at `length` in this process, after which it may be over.

    Raises:
        RuntimeError, MemoryError: more memory was asked for than the limit.
    """
    import torch

    from .cases import head_case, make_batch
    from .gate import step
    from .peers import PEERS as ALL

    case = head_case(HEAD, 0.5, pairs=1, positions=length)
    batch = make_batch(case, torch.float32)
    tiny = make_batch(head_case(HEAD, 0.5, pairs=1, positions=16), torch.float32)
    # What compiles, compiles before the limit: a compiler's memory is not the loss's.
    step(ALL[peer], tiny)
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    start = time.perf_counter()
    step(ALL[peer], batch)
    seconds = time.perf_counter() - start
    return {**_shape(length, peer, memory_gib), "status": "measured", "median": seconds, "rounds": 1}


def _shape(length: int, peer: str, memory_gib: float = MEMORY_GIB) -> dict[str, object]:
    return {
        "head": HEAD,
        "pairs": 1,
        "positions": length,
        "prompt": length // 2,
        "dtype": "float32",
        "kind": "step",
        "peer": peer,
        "memory_gib": memory_gib,
    }


def run(lengths: tuple[int, ...] = LENGTHS, peers: tuple[str, ...] = PEERS) -> None:
    """Every peer at every length until it fails, each result stored."""
    from .measure import default_device, stamp
    from .peers import available

    if default_device() != "cpu":
        raise SystemExit("the group long limits and measures a CPU's memory: hide the GPU with CUDA_VISIBLE_DEVICES=")
    here = [r for r in results.load("long") if r["device"] == stamp()["device"]]
    stored = {(r["peer"], r["positions"]): r["status"] for r in here}
    for peer in filter(available, peers):
        for length in lengths:
            status = stored.get((peer, length))
            if status is None:
                record = _in_a_process(peer, length)
                results.append("long", [record])
                status = record["status"]
                print(f"{peer:28s} {length:7d}  {status}  {record.get('median', float('nan')):.1f} s", flush=True)
            if status != "measured":
                break


def _in_a_process(peer: str, length: int) -> dict[str, object]:
    command = [sys.executable, "-m", "benchmarks.limits", "--peer", peer, "--length", str(length)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {**_shape(length, peer), "status": f"longer than {SECONDS} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    lines = done.stderr.strip().splitlines()
    died = any(sign in done.stderr for sign in ("not enough memory", "MemoryError", "Cannot allocate", "bad_alloc"))
    if died or done.returncode < 0:
        return {**_shape(length, peer), "status": "out of memory"}
    return {**_shape(length, peer), "status": f"failed: {lines[-1][:120] if lines else done.returncode}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--memory", type=float, default=MEMORY_GIB, help="GiB")
    options = parser.parse_args()
    print(json.dumps(attempt(options.peer, options.length, options.memory)))


if __name__ == "__main__":
    main()
