"""Train a causal language model on preference pairs, or run the demonstration.

    orpo-train                                                       the demonstration, on what this machine has
    orpo-train --model_name_or_path M --dataset_name pairs.jsonl     a run
    orpo-train --config run.yaml --learning_rate 8e-6                the same from a file, one setting changed
    orpo-train --config smollm2-lora                                 a shipped recipe; --list_recipes names them all
    orpo-train --print-config fsdp2 > fsdp2.yaml                     for accelerate launch --config_file fsdp2.yaml
    orpo-train --config run.yaml --check_ranks                       on all ranks, before the run: can they train?

Every field of ORPOConfig and of transformers' TrainingArguments is an option: --help_all has them.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path

from orpo.cli.before_imports import announce, look
from orpo.cli.errors import run_command


def end_process_group() -> None:
    """Ends the process group of several ranks, if there is one. Call it after the last use of trainer and model."""
    import torch

    if not torch.distributed.is_initialized():
        return
    # A model in DDP holds the group, and a trainer is a reference cycle. The threads of a group that is still held when
    # Python exits sometimes abort the process after all its work is done.
    gc.collect()
    torch.distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``orpo-train``."""
    argv = sys.argv[1:] if argv is None else argv
    look(argv)
    announce()
    # Imported here, since it takes ten seconds, and what was checked above a fraction of one.
    from orpo.cli.arguments import parse

    model_args, data_args, args = parse(argv, description=__doc__)
    model, data = model_args.model_name_or_path, data_args.dataset_name
    names = {"model_name_or_path": model, "dataset_name": data, "eval_dataset_name": data_args.eval_dataset_name}
    for name, value in (names | {"output_dir": args.output_dir}).items():
        if value is not None and not value.strip():
            # A variable of the shell that is not set.
            raise ValueError(f"--{name} is {value!r}; it has to name something, or be left out")
    if model is None and data is None:
        from orpo.demo import run_demo

        given = {part.partition("=")[0].lstrip("-").replace("-", "_") for part in argv if part.startswith("--")}
        if others := sorted(given - {"output_dir", "seed", "use_cpu"}):
            raise SystemExit(
                f"orpo-train: --{others[0]} is given, but no model and no data set; with neither, the demonstration "
                "runs, whose options are --output_dir, --seed and --use_cpu"
            )
        print("no model and no data set are given: the demonstration (your own: orpo-train --help)", flush=True)
        # Only options given on the line: the demonstration's own defaults gave the figures of docs/demonstration.md.
        options = {name: getattr(args, name) for name in ("output_dir", "seed") if name in given}
        run_demo(device="cpu" if args.use_cpu else None, **options)
    elif model is None or data is None:
        missing, given = ("model_name_or_path", data) if model is None else ("dataset_name", model)
        raise SystemExit(f"orpo-train: {given} is given, but not --{missing}; with neither, the demonstration runs")
    else:
        from accelerate import PartialState

        from orpo.cli.run import says_how_to_go_on, train
        from orpo.runs.disk import leaves_no_empty_folder, refuse_own_sources
        from orpo.runs.lock import run_lock

        checks = any(word.replace("-", "_") == "__check_ranks" for word in argv)
        merged = (Path(args.output_dir) / "merged",) if model_args.merge_adapter else ()
        refuse_own_sources((Path(args.output_dir), *merged), model, (data, data_args.eval_dataset_name))
        with (
            says_how_to_go_on(args, argv),
            leaves_no_empty_folder(args.output_dir),
            run_lock(args.output_dir, PartialState()),
        ):
            if checks:
                from orpo.cli.check_ranks import check_ranks

                well = check_ranks(model_args, data_args, args)
            else:
                train(model_args, data_args, args, argv)
        if checks:
            # A launcher ends the other ranks with the first: rank 0 has to say all, and remove what it wrote.
            PartialState().wait_for_everyone()
        end_process_group()
        if checks and not well:
            raise SystemExit(1)


def command() -> None:
    """:func:`main` as the shell runs it."""
    run_command("orpo-train", main)


if __name__ == "__main__":
    command()
