"""Ranks as processes forked from one that has imported everything: a run on two of them takes a second or two."""

import contextlib
import multiprocessing
import os
import sys
import time
import traceback
from pathlib import Path

import torch

# One server forks for all files of tests; it imports what any of them needs.
PRELOAD = [
    "run_checkpoints",
    "run_ranks",
    "run_mesh",
    "run_pitfalls",
    "run_shards",
    "run_slices",
    "run_streams",
    "run_tensor_parallel",
    "run_check_ranks",
    "run_async_saves",
    "peft",
]


def launch(function, ranks, folder, *arguments, limit=120):
    """Runs ``function(folder, *arguments)`` in processes of their own, in one process group if they are several.

    Returns, for each rank: (exit code, what the function returned or None, what it printed, its traceback or "").
    Where one rank ends with an error, the others have five seconds more for theirs, as under a launcher.
    """
    folder.mkdir(exist_ok=True)
    for old in [*folder.glob("returned-*.pt"), *folder.glob("error-*.txt")]:
        old.unlink()
    context = multiprocessing.get_context("forkserver")
    # In front of what is there already, which may say where the package is.
    path = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, path)))
    context.set_forkserver_preload(PRELOAD)
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        context.Process(target=_process, args=(rank, ranks, store.port, function, folder, arguments))
        for rank in range(ranks)
    ]
    for child in processes:
        child.start()
    end = time.monotonic() + limit
    while any(child.is_alive() for child in processes) and time.monotonic() < end:
        if any(child.exitcode for child in processes):
            end = min(end, time.monotonic() + 5)
        time.sleep(0.05)
    for child in processes:
        child.kill()
        child.join()
    return [(child.exitcode, *_left(folder, rank)) for rank, child in enumerate(processes)]


def returned(function, ranks, folder, *arguments, **options):
    """What every rank returned; fails with the first error."""
    ends = launch(function, ranks, folder, *arguments, **options)
    errors = [error for *_, error in ends if error]
    assert not errors, errors[0]
    assert not any(code for code, *_ in ends), f"exit codes {[code for code, *_ in ends]}: a hang, or a crash"
    return [value for _, value, *_ in ends]


def _left(folder, rank):
    value, error = folder / f"returned-{rank}.pt", folder / f"error-{rank}.txt"
    return (
        torch.load(value, weights_only=False) if value.exists() else None,
        (folder / f"printed-{rank}.txt").read_text(),
        error.read_text() if error.exists() else "",
    )


def _process(rank, ranks, port, function, folder, arguments):
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        # The store is the launcher's, as torchrun has it: that of rank 0 would be gone while others still end.
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    torch.set_num_threads(1)
    try:
        with open(folder / f"printed-{rank}.txt", "w") as out, contextlib.redirect_stdout(out):
            value = function(folder, *arguments)
    except BaseException:
        (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)
    torch.save(value, folder / f"returned-{rank}.pt")
    # All is written, and threads of the process group may wait for a rank that has ended.
    os._exit(0)
