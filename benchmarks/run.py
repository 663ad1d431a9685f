"""Measures piece by piece, each some minutes long, and stores every piece as it is done.

    python -m benchmarks.run --list                      the groups, their pieces, and which are measured
    python -m benchmarks.run --group heads               all pieces of a group that are not
    python -m benchmarks.run --group heads --pieces 2    the next two of them
    python -m benchmarks.run --group heads --again       measure anew what is measured
    python -m benchmarks.report                          afterwards: RESULTS.md and its picture

For figures to be kept, leave the machine alone. A CPU without instructions for bfloat16 emulates them, and peers take
minutes a step: `--only float32` leaves these pieces out, the group `bfloat16` has one that is short.
A piece that was measured at another commit counts as measured.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from dataclasses import dataclass

import torch

from . import results
from .cases import HEADS, PROMPT_SHARES, Case, head_case, real_case
from .measure import measure_case, stamp
from .peers import PEERS, available

MAIN = ("step", "evaluation")
# Growth is measured on the smallest head, and one size is changed at a time.
BASE = Case("growth", 2, 128, 64, 512, 32768)


@dataclass(frozen=True)
class Piece:
    """One case in one dtype: what is measured together, in one process, peers taking turns."""

    case: Case
    dtype: str
    kinds: tuple[str, ...]
    rounds: int

    def __str__(self) -> str:
        c = self.case
        shape = f"{c.pairs} x {c.positions}, prompt {c.prompt}, V {c.vocabulary}, D {c.hidden_size}"
        return f"{c.name}: {shape}{', padded' if c.lengths else ''}, {self.dtype}, {'+'.join(self.kinds)}"


def _growth() -> list[Case]:
    b = BASE
    sizes = (
        [(b.pairs, t, t // 2, b.vocabulary) for t in (64, 128, 256, 512)]
        + [(b.pairs, b.positions, b.prompt, v) for v in (8192, 16384, 65536, 131072)]
        + [(b.pairs, b.positions, int(s * b.positions), b.vocabulary) for s in (0, 0.25, 0.75, 0.875)]
    )
    return [Case("growth", p, t, prompt, b.hidden_size, v) for p, t, prompt, v in sizes]


LOSS_GROUPS: dict[str, list[Piece]] = {
    # Half of a sequence is prompt: forward and backward, and evaluation, in front of every head.
    "heads": [Piece(head_case(head, 0.5), dtype, MAIN, 5) for dtype in ("float32", "bfloat16") for head in HEADS],
    # Evaluation is in the other groups: its time follows the number of rows. With three rounds, two that the machine
    # disturbed once changed who was the fastest.
    "prompt_share": [
        Piece(head_case(head, share), dtype, ("step",), 5)
        for dtype in ("float32", "bfloat16")
        for head in HEADS
        for share in PROMPT_SHARES
        if share != 0.5
    ],
    "frozen": [
        Piece(head_case(head, 0.5), dtype, ("frozen", "forward"), 5)
        for dtype in ("float32", "bfloat16")
        for head in HEADS
    ],
    # Short enough for a peer's step to end within seconds where bfloat16 is emulated.
    "bfloat16": [Piece(head_case("OPT-350M", 0.5, pairs=1, positions=64), "bfloat16", MAIN, 3)],
    "padding": [
        Piece(real_case(head, pairs), "float32", MAIN, 3)
        for head in ("OPT-350M", "SmolLM2-135M")
        for pairs in (2, 4, 8)
    ],
    "growth": [Piece(case, "float32", ("step",), 3) for case in _growth()],
}
GROUPS = (*LOSS_GROUPS, "accuracy", "long", "training")


def is_measured(group: str, piece: Piece, peers: list[str]) -> bool:
    """Whether every kind of the piece is stored for every peer, on this device."""
    c = piece.case
    wanted = (c.name, c.pairs, c.positions, c.prompt, c.lengths is not None, c.vocabulary, piece.dtype)
    names = ("head", "pairs", "positions", "prompt", "padded", "V", "dtype")
    stored = {
        (r["kind"], r["peer"])
        for r in results.load(group)
        if tuple(r[name] for name in names) == wanted and r["device"] == stamp()["device"]
    }
    return stored >= {(kind, peer) for kind in piece.kinds for peer in peers}


def measure(group: str, piece: Piece, names: list[str]) -> None:
    """Measure one piece, store and print it."""
    start = time.perf_counter()
    print(f"{group}: {piece}", flush=True)
    peers = {name: PEERS[name] for name in names}
    records = measure_case(piece.case, getattr(torch, piece.dtype), peers, piece.kinds, piece.rounds)
    results.append(group, records)
    for r in records:
        figures = (
            f"{r['median']:8.4g} s  x{r.get('ratio', float('nan')):5.2f}  {r['peak_bytes'] / 2**20:7.0f} MiB"
            if r["status"] == "measured"
            else r["status"]
        )
        print(f"  {r['kind']:11s} {r['peer']:28s} {figures}")
    print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)


def listed(wanted: str | None, only: str, names: list[str]) -> list[str]:
    """A line for each piece that holds `only`, of one group where one is wanted."""
    lines = []
    others = {
        "accuracy": "errors against float64",
        "long": "the length at which each peer runs out of memory",
        "training": "training step and whole run",
    }
    for group in GROUPS if wanted is None else (wanted,):
        for piece in LOSS_GROUPS.get(group, ()):
            if only in str(piece):
                lines.append(f"{group:13s} {'measured' if is_measured(group, piece, names) else '-':9s} {piece}")
        if group in others and only in others[group]:
            lines.append(f"{group:13s} {others[group]}")
    return lines


def ignored(options: argparse.Namespace) -> str | None:
    """What to say of an option that the group, or the list, would not look at."""
    group = options.group
    if options.list or not group:
        asked, why = ("pieces", "again", "model", "data"), "a list measures nothing"
    elif group in LOSS_GROUPS:
        asked, why = ("model", "data"), f"{group} measures random hidden states"
    else:
        asked, why = ("only", "pieces", "again"), f"it is for groups of pieces, and {group} has none"
    # By identity: 0 equals False.
    if given := [n for n in asked if (value := getattr(options, n)) is not None and value is not False and value != ""]:
        return f"--{given[0]} would be ignored: {why}"
    if options.list or not group:
        return None
    if group == "training" and options.peers:
        return "--peers would be ignored: training has trainers of its own"
    if group == "long" and (options.model or options.data):
        return "--model and --data would be ignored: long measures random hidden states"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=GROUPS)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--pieces", type=int, help="measure at most so many pieces")
    parser.add_argument("--only", default="", help="only pieces whose line in --list contains this")
    parser.add_argument("--peers", help="comma-separated; default: all that are installed")
    parser.add_argument("--again", action="store_true", help="also what is measured already")
    parser.add_argument(
        "--model", help="groups training and accuracy: folder of a model (default: the variable ORPO_BENCH_MODEL)"
    )
    parser.add_argument("--data", help="groups training and accuracy: pairs as JSONL or parquet, or a hub name")
    options = parser.parse_args()
    names = options.peers.split(",") if options.peers else [name for name in PEERS if available(name)]
    if unknown := sorted(set(names) - set(PEERS)):
        parser.error(f"--peers names {', '.join(map(repr, unknown))}; there are {', '.join(PEERS)}")
    # Measured all the same, their failures would be stored as results.
    if missing := [name for name in names if not available(name)]:
        parser.error(f"--peers names {', '.join(missing)}, not installed here (pip install '.[bench]')")
    if refused := ignored(options):
        parser.error(refused)
    if options.pieces is not None and options.pieces < 1:
        parser.error(f"--pieces is {options.pieces}; it is at least 1")
    if options.list or not options.group:
        lines = listed(options.group, options.only, names)
        if not lines:
            parser.error(f"--only {options.only!r} is in no line of {options.group or 'any group'}")
        print("\n".join(lines))
        return
    model = options.model or os.environ.get("ORPO_BENCH_MODEL")
    if options.group == "long":
        from . import limits

        limits.run(names)
        return
    if options.group == "accuracy":
        from . import accuracy

        if options.data and not model:
            parser.error("--data goes with --model, whose hidden states it makes")
        accuracy.run(names, model, options.data)
        return
    if options.group == "training":
        from . import training

        training.run(model, options.data)
        training.run(model, shares=training.SHARES)
        return
    chosen = [piece for piece in LOSS_GROUPS[options.group] if options.only in str(piece)]
    if not chosen:
        parser.error(f"--only {options.only!r} is in no line of {options.group}; --list shows them")
    pieces = [p for p in chosen if options.again or not is_measured(options.group, p, names)]
    if not pieces:
        print("all of it is measured on this machine; --again measures it anew")
    for piece in pieces[: options.pieces]:
        measure(options.group, piece, names)
        gc.collect()


if __name__ == "__main__":
    main()
