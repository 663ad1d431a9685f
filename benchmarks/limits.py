"""Until it dies: one pair of ever longer sequences, each peer in a process of its own that may use so much memory.

The process limits itself (RLIMIT_DATA), so that a peer which asks for more gets an error and the machine survives. A
peer's row ends at the length at which it died or took longer than `SECONDS`: `python -m benchmarks.run --group long`.
"""

from __future__ import annotations

import multiprocessing
import resource
from multiprocessing.connection import Connection

import torch

from . import results
from .cases import head_case, make_batch
from .gate import step
from .measure import default_device, stamp, wall_clock
from .peers import PEERS, available

HEAD = "SmolLM2-135M"
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
MEMORY_GIB = 8
SECONDS = 150
DEATHS = ("not enough memory", "Cannot allocate", "bad_alloc", "MemoryError")


def attempt(peer: str, length: int, memory_gib: float, answer: Connection) -> None:
    """Sends the seconds of one forward and backward at `length`, or why there are none; limits this process."""
    try:
        case = head_case(HEAD, 0.5, pairs=1, positions=length)
        batch = make_batch(case, torch.float32)
        # What compiles, compiles before the limit: a compiler's memory is not the loss's.
        step(PEERS[peer], make_batch(head_case(HEAD, 0.5, pairs=1, positions=16), torch.float32))
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gib * 2**30),) * 2)
        answer.send(wall_clock(lambda: step(PEERS[peer], batch)))
    except Exception as problem:
        # Its end is the result.
        words = f"{type(problem).__name__}: {problem}"
        answer.send("out of memory" if any(sign in words for sign in DEATHS) else f"failed: {words[:120]}")


def in_a_process(peer: str, length: int, memory_gib: float = MEMORY_GIB, seconds: float = SECONDS) -> dict[str, object]:
    """The record of one attempt."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=attempt, args=(peer, length, memory_gib, sender))
    process.start()
    sender.close()
    try:
        answer = receiver.recv() if receiver.poll(seconds) else f"longer than {seconds} s"
    except EOFError:
        # The system ended it, before it could say anything.
        answer = "out of memory"
    process.kill()
    process.join()
    shape = {"head": HEAD, "pairs": 1, "positions": length, "prompt": length // 2, "dtype": "float32", "kind": "step"}
    shape |= {"peer": peer, "memory_gib": memory_gib}
    if isinstance(answer, str):
        return {**shape, "status": answer}
    return {**shape, "status": "measured", "median": answer, "rounds": 1}


def run(peers: list[str] | None = None) -> None:
    """Every peer at every length until it fails, each result stored."""
    if default_device() != "cpu":
        raise SystemExit("the group long limits and measures a CPU's memory: hide the GPU with CUDA_VISIBLE_DEVICES=")
    here = [r for r in results.load("long") if r["device"] == stamp()["device"]]
    stored = {(r["peer"], r["positions"]): r["status"] for r in here}
    for peer in filter(available, peers or PEERS):
        for length in LENGTHS:
            status = stored.get((peer, length))
            if status is None:
                record = in_a_process(peer, length)
                results.append("long", [record])
                status = record["status"]
                print(f"{peer:28s} {length:7d}  {status}  {record.get('median', float('nan')):.1f} s", flush=True)
            if status != "measured":
                break
