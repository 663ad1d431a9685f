"""Accuracy, time and memory of the loss against what people use today, on one machine. Stores nothing.

    pip install '.[bench]'
    python -m benchmarks.loss --case smollm2 --dtype float32
    python -m benchmarks.loss --case Mistral-7B-v0.3 --pairs 1 --positions 512 --prompt-share 0.25 --kinds step,frozen
    python -m benchmarks.loss --model FOLDER --dtype bfloat16 --rounds 5 --peers 'ours,trl,liger'
    python -m benchmarks.loss --vocabulary 128256 --hidden-size 2048

First the error of loss, hidden-state gradient and weight gradient against float64; a result that is further off than
its dtype explains gets no time. Then rounds in which the peers take turns: medians, the spread, and how many times
slower TRL was by the medians. Errors that a kind does not have, as the gradients of an evaluation, are those of forward
and backward. Memory is the most that a call allocates beyond its inputs. What is kept is measured by `python -m
benchmarks.run`.
"""

from __future__ import annotations

import argparse

import torch

from .cases import CASES, HEADS, Case, head_case
from .gate import KINDS
from .measure import emulates_bfloat16, measure_case, stamp
from .peers import PEERS, available


def table(records: list[dict]) -> str:
    """The records of one case, one line each."""
    lines = [
        f"{'':40s} {'s':>10s} {'20 to 80 %':>24s} {'TRL took x':>10s} {'MiB':>7s} {'loss':>8s} {'dX':>8s} {'dW':>8s}"
    ]
    for r in records:
        line = f"{r['kind']:11s} {r['peer']:28s} "
        if "error_dx" in r:
            errors = " ".join(f"{r[name]:8.1e}" for name in ("error_loss", "error_dx", "error_dw"))
        if r["status"] == "measured":
            # Four digits of whatever it is: a GPU's step is a few milliseconds.
            spread = f"{r['q20']:.4g} to {r['q80']:.4g}"
            ratio = f"{r['ratio']:10.2f}" if "ratio" in r else " " * 10
            line += f"{r['median']:10.4g} {spread:>24s} {ratio} {r['peak_bytes'] / 2**20:7.0f} {errors}"
        elif "error_loss" in r:
            said = (f"{r[n]:.1e}" if n in r else "-" for n in ("error_loss", "error_dx", "error_dw"))
            line += f"{r['status']}, not timed: loss, dX, dW off by {', '.join(said)}"
        else:
            line += f"{r['status']}, not timed"
        lines.append(line)
    return "\n".join(lines)


def size_of_head(model: str) -> tuple[int, int]:
    """(V, D) of the matrix behind a model's head, by its configuration.

    Raises:
        ValueError: there is no such model, or it is none that writes text.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
        # OPT-350M's head follows a projection to half of its hidden size.
        return config.vocab_size, getattr(config, "word_embed_proj_dim", config.hidden_size)
    except (OSError, AttributeError) as problem:
        raise ValueError(f"--model {model}: {(str(problem) or type(problem).__name__).splitlines()[0]}") from problem


def chosen_case(arguments: argparse.Namespace) -> Case:
    """The case that the options name or spell out.

    Raises:
        ValueError: they name two, or half of one, or a batch that is none; or `size_of_head` has none to give.
    """
    given = {name: getattr(arguments, name) for name in ("pairs", "positions", "prompt_share")}
    given = {name: value for name, value in given.items() if value is not None}
    sizes = {name: getattr(arguments, name) for name in ("vocabulary", "hidden_size")}
    spelled = any(size is not None for size in sizes.values())
    if sum((arguments.case is not None, arguments.model is not None, spelled)) > 1:
        raise ValueError("give one of --case, --model, and --vocabulary with --hidden-size")
    for name, least in (("pairs", 1), ("positions", 2), ("vocabulary", 2), ("hidden_size", 1)):
        if (value := (given | sizes).get(name)) is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it is at least {least}")
    if spelled:
        if None in sizes.values():
            raise ValueError("--vocabulary and --hidden-size go together")
        name, size = "custom", tuple(sizes.values())
    elif arguments.model is not None:
        name, size = arguments.model, size_of_head(arguments.model)
    elif (name := arguments.case or "smollm2") in HEADS:
        size = None
    elif given:
        options = ", no ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{name} has a batch of its own, and takes no {options}; heads do: {', '.join(HEADS)}")
    else:
        return CASES[name]
    share = given.pop("prompt_share", 0.5)
    if not 0 <= share < 1:
        raise ValueError(f"--prompt-share is {share}; it is at least 0 and below 1")
    case = head_case(name, share, **given, size=size)
    if case.prompt == case.positions:
        raise ValueError(f"--prompt-share {share} of {case.positions} positions leaves none to the answer")
    return case


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=(*CASES, *HEADS), help="a batch, or a model's head (default: smollm2)")
    parser.add_argument("--model", help="name or folder of a model: vocabulary and hidden size of its head")
    parser.add_argument("--vocabulary", type=int, help="with --hidden-size: any other head")
    parser.add_argument("--hidden-size", type=int)
    parser.add_argument("--pairs", type=int, help="of a head (default: 4, of a named one fewer if it is large)")
    parser.add_argument("--positions", type=int, help="prompt and answer of a sequence (default: 256, likewise)")
    parser.add_argument("--prompt-share", type=float, help="of the positions (default: 0.5)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--kinds", default="step,evaluation", help=f"comma-separated, of {', '.join(KINDS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", help="comma-separated; default: all that are installed")
    arguments = parser.parse_args()
    names = arguments.peers.split(",") if arguments.peers else list(PEERS)
    for option, given, known in (("--peers", names, PEERS), ("--kinds", arguments.kinds.split(","), KINDS)):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"{option} names {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}; it is at least 1")
    try:
        case = chosen_case(arguments)
    except ValueError as error:
        parser.error(str(error))
    missing = [name for name in names if not available(name)]
    if missing:
        print(f"not installed, left out: {', '.join(missing)} (pip install '.[bench]')")
    if arguments.dtype == "bfloat16" and emulates_bfloat16():
        print("this CPU has no instructions for bfloat16 and emulates them: most peers may take minutes a call")
    print(f"{case}: {case.rows} of {2 * case.pairs * case.positions} rows count\n{stamp()}", flush=True)
    peers = {name: PEERS[name] for name in names if name not in missing}
    kinds = arguments.kinds.split(",")
    print(table(measure_case(case, getattr(torch, arguments.dtype), peers, kinds, arguments.rounds)))


if __name__ == "__main__":
    main()
