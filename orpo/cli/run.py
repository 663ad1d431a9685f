"""One run of ``orpo-train``: loads, trains, evaluates, saves, and says where everything is."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orpo.cli.arguments import HELD_OUT, DataArguments, ModelArguments
from orpo.cli.errors import out_of_memory
from orpo.model.adapters import adapter_folder
from orpo.model.merging import check_output, merge_adapter
from orpo.packages import require
from orpo.ranks import from_rank_0
from orpo.report.page import write_page
from orpo.runs.find_checkpoint import complete_checkpoints
from orpo.runs.finished import finished_at, forget_finished, write_finished
from orpo.runs.non_finite import check_evaluation
from orpo.runs.record import describe_data, describe_run
from orpo.runs.signals import ctrl_c_saves
from orpo.trainer.config import ORPOConfig
from orpo.trainer.redact import is_secret
from orpo.trainer.samples import FILE as SAMPLES
from orpo.trainer.trainer import ORPOTrainer


class InterruptedRun(RuntimeError):
    """SIGTERM ended training before its last step, and a checkpoint was saved (``enable_jit_checkpoint``)."""

    exit_code = 128 + signal.SIGTERM


@contextmanager
def says_how_to_go_on(args: ORPOConfig, words: Sequence[str]) -> Iterator[None]:
    """Where Ctrl-C ends the block, names the newest checkpoint and the command line `words`, once more.

    Training may have ended by then: what follows it, an evaluation for instance, is all that is left to do.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        if str(error) or not (complete := complete_checkpoints(args.output_dir)):
            raise
        raise KeyboardInterrupt(
            f"; {complete[-1]} is whole, to go on: {_again(words, args.resume_from_checkpoint)}"
        ) from error


def train(
    model_args: ModelArguments, data_args: DataArguments, args: ORPOConfig, words: Sequence[str] = ()
) -> ORPOTrainer:
    """One run: loads, trains, evaluates, saves the model, its metrics, its state and its curves in ``output_dir``.

    A run that has ended is left as it is when the same settings start it again.

    Args:
        words: the command line, printed again where the run is interrupted.
    """
    args.model_init_kwargs = {**model_args.init_kwargs(), **(args.model_init_kwargs or {})}
    evaluates = check_settings(model_args, data_args, args)
    trainer = ORPOTrainer(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=data_args.train_pairs(),
        eval_dataset=data_args.held_out_pairs() if evaluates else None,
        peft_config=model_args.peft_config(),
        processing_class=model_args.tokenizer(args),
    )
    described, resume = _describe(trainer, model_args, data_args), _resume_from(args)
    done = None
    if resume in ("auto", True):
        done = from_rank_0(trainer.accelerator, lambda: finished_at(args.output_dir, described))
    if done is not None:
        if trainer.is_world_process_zero():
            print(
                f"{args.output_dir} is complete, nothing to do: the run ended at step {done}. To train further, raise "
                "--num_train_epochs or --max_steps; to train anew, --resume_from_checkpoint false"
            )
        return trainer
    _train(trainer, resume, model_args, words)
    if trainer.is_world_process_zero():
        # From here on files of an earlier run are overwritten one by one: its note would no longer be true.
        forget_finished(args.output_dir)
    trainer.save_model()
    curves = trainer.state.log_history
    if evaluates:
        if args.load_best_model_at_end:
            # A copy: the coming evaluation of the best weights is logged as the last step's, and would bend the curves.
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
    card = {
        "dataset": data_args.dataset_name,
        "dataset_args": data_args.dataset_config,
        "eval_dataset": data_args.eval_dataset_name,
    }
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
    if trainer.is_world_process_zero():
        names = (model_args.model_name_or_path, data_args.dataset_name, data_args.eval_dataset_name)
        page = write_page(
            trainer, args.output_dir, described=_in_a_sentence(*names), samples=Path(args.output_dir, SAMPLES)
        )
        write_finished(args.output_dir, described, trainer.state.global_step)
        print(_closing_words(args.output_dir, page))
    return trainer


def check_settings(model_args: ModelArguments, data_args: DataArguments, args: ORPOConfig) -> bool:
    """Refuses settings that do not go together, before anything is read. Returns whether something is evaluated."""
    if model_args.merge_adapter:
        goes_on = adapter_folder(model_args.model_name_or_path, **args.model_init_kwargs) is not None
        if not model_args.use_peft and not goes_on:
            raise ValueError("merge_adapter is given without use_peft: there is no adapter to merge")
        # Refused now, not after hours of training.
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
    # adamw_torch_8bit and its like need torchao, not bitsandbytes.
    if "torch" not in optim and any(part in optim for part in ("paged", "bit", "bnb")):
        require("bitsandbytes", f"optim {optim}")
    return evaluates


def _train(trainer: ORPOTrainer, resume: str | bool | None, model_args: ModelArguments, words: Sequence[str]) -> None:
    """Trains, and saves the metrics of training.

    Raises:
        InterruptedRun: SIGTERM has ended it before its last step.
        KeyboardInterrupt: Ctrl-C has.
    """
    args = trainer.args
    try:
        with ctrl_c_saves(trainer) as ctrl_c:
            result = trainer.train(resume_from_checkpoint=resume)
    except Exception as error:
        if out_of_memory(error):
            error.add_note(_memory_advice(args, model_args))
        raise
    state = trainer.state
    if trainer.interrupted and state.global_step < state.max_steps:
        newest = complete_checkpoints(args.output_dir)[-1]
        place = f"after step {state.global_step} of {state.max_steps}"
        if ctrl_c.asked:
            again = _again(words, args.resume_from_checkpoint)
            raise KeyboardInterrupt(f" {place}, which {newest} holds; to go on: {again}")
        raise InterruptedRun(
            f"SIGTERM ended training {place}, and no final model is written; {newest} is whole, and the next start "
            "resumes from it"
        )
    if "train_loss" in result.metrics:
        # A finished run that is started again has no train_loss, and keeps the metrics that it left.
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)


def _describe(trainer: ORPOTrainer, model_args: ModelArguments, data_args: DataArguments) -> dict[str, Any]:
    """Everything that was asked of a run. Of two runs with the same description the second has nothing to do."""
    # A folder may be moved, and where a run resumes does not change its result.
    left_out = ("output_dir", "resume_from_checkpoint", "local_rank")
    settings = {name: value for name, value in trainer.args.to_dict().items() if name not in left_out}
    held_out = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
    # Of a stream nothing is read yet: a file of it is known by its size and time.
    streamed = (data_args.dataset_name, data_args.eval_dataset_name) if data_args.dataset_streaming else ()
    files = [path for name in streamed if name and (path := Path(name).expanduser()).is_file()]
    return {
        "streamed": {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
        "settings": settings | asdict(model_args) | asdict(data_args),
        "run": describe_run(trainer),
        "held-out": {name: describe_data(data) for name, data in held_out.items() if data is not None},
    }


def _in_a_sentence(model: str, data: str, held_out: str | None) -> str:
    tested = f", tested on {held_out}" if held_out else ""
    return f"{model}, trained with ORPO on {data}{tested}, by fused-orpo."


def _closing_words(folder: str, page: Path) -> str:
    ask = f"orpo-generate {shlex.quote(folder)} --prompt 'How do I boil an egg?'"
    return f"the model is in {folder}; to ask it: {ask}\nthe report of the run: {page.absolute().as_uri()}"


def _again(words: Sequence[str], resume: str | bool | None = None) -> str:
    """The command line with its secrets left out, since logs are kept and shown.

    Args:
        resume: what the command said of ``resume_from_checkpoint``; the new one goes on from the newest checkpoint.
    """
    shown = list(words)
    if resume is not None:
        places = [i for i, word in enumerate(shown) if word.replace("-", "_").startswith("__resume_from_checkpoint")]
        for i in reversed(places):
            del shown[i : i + (1 if "=" in shown[i] else 2)]
        shown += ["--resume_from_checkpoint", "true"]
    for i, word in enumerate(shown):
        option, equals, value = word.partition("=")
        name = option.lstrip("-").replace("-", "_")
        if not option.startswith("--") or not is_secret(name, value):
            continue
        if equals:
            shown[i] = f"{option}=<{name.upper()}>"
        elif i + 1 < len(shown):
            shown[i + 1] = f"<{name.upper()}>"
    return shlex.join(["orpo-train", *shown])


def _memory_advice(args: ORPOConfig, model_args: ModelArguments) -> str:
    """The ways to use less memory that the run does not use yet."""
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
    # From a YAML file true and false come as booleans.
    wanted = "auto" if args.resume_from_checkpoint is None else str(args.resume_from_checkpoint)
    words = {"auto": "auto", "true": True, "yes": True, "false": None, "no": None}
    return words.get(wanted.lower(), wanted)
