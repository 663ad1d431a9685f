"""Train a causal language model on preference pairs, or run the demonstration.

    orpo-train                                                       the demonstration, on what this machine has
    orpo-train --model_name_or_path M --dataset_name pairs.jsonl     a run
    orpo-train --config run.yaml --learning_rate 8e-6                the same from a file, one setting changed
    orpo-train --config smollm2-lora                                 a shipped recipe; --list_recipes names them all
    orpo-train --print-config fsdp2 > fsdp2.yaml                     for accelerate launch --config_file fsdp2.yaml

Every field of ORPOConfig and of transformers' TrainingArguments is an option: --help_all has them.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState

from orpo.cli.arguments import HELD_OUT, DataArguments, ModelArguments, parse
from orpo.cli.errors import out_of_memory, run_command
from orpo.model.adapters import adapter_folder
from orpo.model.merging import check_output, merge_adapter
from orpo.packages import require
from orpo.runs.disk import leaves_no_empty_folder, refuse_own_sources
from orpo.runs.find_checkpoint import complete_checkpoints
from orpo.runs.lock import run_lock
from orpo.runs.non_finite import check_evaluation
from orpo.trainer.config import ORPOConfig
from orpo.trainer.trainer import ORPOTrainer


class InterruptedRun(RuntimeError):
    """SIGTERM ended training before its last step, and a checkpoint was saved (``enable_jit_checkpoint``)."""

    exit_code = 128 + signal.SIGTERM


def train(model_args: ModelArguments, data_args: DataArguments, args: ORPOConfig) -> ORPOTrainer:
    """One run: loads, trains, evaluates, saves the model, its metrics, its state and its curves in ``output_dir``."""
    args.model_init_kwargs = {**model_args.init_kwargs(), **(args.model_init_kwargs or {})}
    if model_args.merge_adapter:
        goes_on = adapter_folder(model_args.model_name_or_path, **args.model_init_kwargs) is not None
        if not model_args.use_peft and not goes_on:
            raise ValueError("merge_adapter is given without use_peft: there is no adapter to merge")
        # Said now, not when the adapter is trained.
        check_output(Path(args.output_dir) / "merged", args.output_dir, model_args.model_name_or_path)
    if args.max_steps <= 0 and args.num_train_epochs == 0:
        raise ValueError("num_train_epochs is 0, and max_steps is not given: nothing would be trained")
    evaluates = args.do_eval or args.eval_strategy != "no" or data_args.eval_dataset_name is not None
    if args.generate_during_eval and not evaluates:
        raise ValueError(
            "--generate_during_eval answers held-out prompts at each evaluation, and nothing is evaluated: give "
            f"--eval_strategy steps and {HELD_OUT}"
        )
    optim = args.optim.value
    # adamw_torch_8bit and its like are torchao's.
    if "torch" not in optim and any(part in optim for part in ("paged", "bit", "bnb")):
        require("bitsandbytes", f"optim {optim}")
    trainer = ORPOTrainer(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=data_args.train_pairs(),
        eval_dataset=data_args.held_out_pairs() if evaluates else None,
        peft_config=model_args.peft_config(),
        processing_class=model_args.tokenizer(args),
    )
    try:
        result = trainer.train(resume_from_checkpoint=_resume_from(args))
    except Exception as error:
        if out_of_memory(error):
            error.add_note(_memory_advice(args, model_args))
        raise
    if trainer.interrupted and trainer.state.global_step < trainer.state.max_steps:
        newest = complete_checkpoints(args.output_dir)[-1]
        raise InterruptedRun(
            f"SIGTERM ended training after step {trainer.state.global_step} of {trainer.state.max_steps}, and no final "
            f"model is written; {newest} is whole, and the next start resumes from it"
        )
    trainer.save_model()
    if "train_loss" in result.metrics:
        # A finished run that is started again keeps the figures that it left.
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
    curves = trainer.state.log_history
    if evaluates:
        if args.load_best_model_at_end:
            # The best weights are evaluated now: as figures of the last step they would hide where the curves end.
            curves = list(curves)
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        check_evaluation(metrics, trainer.state.global_step)
        trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero() and any("nll_loss" in entry for entry in curves):
        from orpo.report.curves import plot_curves, write_curves_csv

        history = {"ORPO": curves}
        plot_curves(history, Path(args.output_dir) / "curves.png")
        write_curves_csv(history, Path(args.output_dir) / "curves.csv")
    card = {"dataset": data_args.dataset_name, "dataset_args": data_args.dataset_config}
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    if model_args.merge_adapter and trainer.is_world_process_zero():
        merge_adapter(
            args.output_dir,
            Path(args.output_dir) / "merged",
            dtype=model_args.dtype,
            trust_remote_code=args.trust_remote_code,
        )
    return trainer


def _memory_advice(args: ORPOConfig, model_args: ModelArguments) -> str:
    """What makes a run that ran out of memory smaller, of what it does not do yet."""
    batch, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    smaller = f"per_device_train_batch_size 1 and gradient_accumulation_steps {steps * batch}, which trains the same"
    ways = (
        (smaller, batch > 1),
        (f"max_length below {args.max_length}", True),
        ("gradient_checkpointing", not args.activation_checkpointing),
        ("use_peft", not model_args.use_peft),
        ("load_in_4bit, with use_peft", not model_args.load_in_4bit),
        ("an 8-bit optimizer (optim paged_adamw_8bit)", "8bit" not in args.optim and not model_args.use_peft),
        ("several GPUs with FSDP", args.world_size == 1),
    )
    return "out of memory; what needs less: " + "; ".join(text for text, applies in ways if applies)


def _resume_from(args: ORPOConfig) -> str | bool | None:
    """``--resume_from_checkpoint``: a folder, "true" (there has to be one), "false", or "auto" (if there is one)."""
    # A YAML file gives true and false themselves.
    wanted = "auto" if args.resume_from_checkpoint is None else str(args.resume_from_checkpoint)
    words = {"auto": "auto", "true": True, "yes": True, "false": None, "no": None}
    return words.get(wanted.lower(), wanted)


def end_process_group() -> None:
    """Ends the process group of several ranks, if there is one, after the last use of what was trained with it."""
    if not torch.distributed.is_initialized():
        return
    # A model in DDP keeps the group, and a trainer is a cycle. A group that is kept has threads that still run when
    # Python exits, and abort a process that has done all its work, now and then.
    gc.collect()
    torch.distributed.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> None:
    """The command ``orpo-train``."""
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, args = parse(argv, description=__doc__)
    model, data = model_args.model_name_or_path, data_args.dataset_name
    if model is None and data is None:
        from orpo.demo import run_demo

        given = {part.partition("=")[0].lstrip("-").replace("-", "_") for part in argv if part.startswith("--")}
        if others := sorted(given - {"output_dir", "seed", "use_cpu"}):
            raise SystemExit(
                f"orpo-train: --{others[0]} is given, but no model and no data set; with neither, the demonstration "
                "runs, whose options are --output_dir, --seed and --use_cpu"
            )
        print("no model and no data set are given: the demonstration (your own: orpo-train --help)", flush=True)
        # Its own defaults stand unless the line says otherwise: the figures in the README are those of its seed.
        options = {name: getattr(args, name) for name in ("output_dir", "seed") if name in given}
        run_demo(device="cpu" if args.use_cpu else None, **options)
    elif model is None or data is None:
        missing, given = ("model_name_or_path", data) if model is None else ("dataset_name", model)
        raise SystemExit(f"orpo-train: {given} is given, but not --{missing}; with neither, the demonstration runs")
    else:
        merged = (Path(args.output_dir) / "merged",) if model_args.merge_adapter else ()
        refuse_own_sources((Path(args.output_dir), *merged), model, (data, data_args.eval_dataset_name))
        with leaves_no_empty_folder(args.output_dir), run_lock(args.output_dir, PartialState()):
            train(model_args, data_args, args)
        end_process_group()


def command() -> None:
    """:func:`main` as the shell runs it."""
    run_command("orpo-train", main)


if __name__ == "__main__":
    command()
