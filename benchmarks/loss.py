"""Accuracy, time and memory of the loss against what people use today, on one machine. Stores nothing.

    pip install '.[bench]'
    python -m benchmarks.loss --case smollm2 --dtype float32
    python -m benchmarks.loss --case smollm2 --dtype bfloat16 --rounds 5 --peers 'ours,trl,liger' --kinds step,frozen

First the error of loss, hidden-state gradient and weight gradient against float64; a result that is further off than
its dtype explains gets no time. Then rounds in which the peers take turns: medians, the spread, and how many times
slower TRL was within the rounds. Memory is the most that a call allocates beyond its inputs. What is kept is measured
by `python -m benchmarks.run`.
"""

from __future__ import annotations

import argparse

import torch

from .cases import CASES, HEADS, head_case
from .gate import KINDS
from .measure import measure_case, stamp
from .peers import PEERS, available


def table(records: list[dict]) -> str:
    """The records of one case, one line each."""
    lines = [
        f"{'':40s} {'s':>8s} {'20 to 80 %':>16s} {'TRL took x':>10s} {'MiB':>7s} {'loss':>8s} {'dX':>8s} {'dW':>8s}"
    ]
    for r in records:
        line = f"{r['kind']:11s} {r['peer']:28s} "
        if "error_dx" in r:
            errors = " ".join(f"{r[name]:8.1e}" for name in ("error_loss", "error_dx", "error_dw"))
        if r["status"] == "measured":
            spread = f"{r['q20']:.3f} to {r['q80']:.3f}"
            ratio = f"{r['ratio']:10.2f}" if "ratio" in r else " " * 10
            line += f"{r['median']:8.3f} {spread:>16s} {ratio} {r['peak_bytes'] / 2**20:7.0f} {errors}"
        else:
            line += f"{r['status']}, not timed"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=(*CASES, *HEADS), default="smollm2")
    parser.add_argument("--prompt-share", type=float, default=0.5, help="for a case that is a head's name")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--kinds", default="step,evaluation", help=f"comma-separated, of {', '.join(KINDS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", help="comma-separated; default: all that are installed")
    arguments = parser.parse_args()
    names = arguments.peers.split(",") if arguments.peers else list(PEERS)
    for given, known in ((names, PEERS), (arguments.kinds.split(","), KINDS)):
        if unknown := set(given) - set(known):
            parser.error(f"{sorted(unknown)} given; there are {list(known)}")
    missing = [name for name in names if not available(name)]
    if missing:
        print(f"not installed, left out: {', '.join(missing)} (pip install '.[bench]')")
    case = CASES.get(arguments.case) or head_case(arguments.case, arguments.prompt_share)
    print(f"{case}: {case.rows} of {2 * case.pairs * case.positions} rows count\n{stamp()}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    peers = {name: PEERS[name] for name in names if name not in missing}
    kinds = arguments.kinds.split(",")
    print(table(measure_case(case, getattr(torch, arguments.dtype), peers, kinds, arguments.rounds, device)))


if __name__ == "__main__":
    main()
