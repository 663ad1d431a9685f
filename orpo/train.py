"""Train a causal language model on preference pairs, or run the demonstration.

    orpo-train                                                       the demonstration, on what this machine has
    orpo-train --model_name_or_path M --dataset_name pairs.jsonl     a run
    orpo-train --config run.yaml --learning_rate 8e-6                the same from a file, one setting changed
    orpo-train --config smollm2-lora                                 a shipped recipe; --list_recipes names them all
    orpo-train --print-config fsdp2 > fsdp2.yaml                     for accelerate launch --config_file fsdp2.yaml

Every field of ``ORPOConfig`` and of ``transformers.TrainingArguments`` is an option.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser

from orpo.command import run_command
from orpo.config import ORPOConfig
from orpo.disk import check_writable
from orpo.launch import launch_config
from orpo.merge import merge_adapter
from orpo.packages import require
from orpo.recipes import describe_recipes, find_config
from orpo.setup import load_tokenizer
from orpo.sources import load_pairs
from orpo.trainer import ORPOTrainer


@dataclass
class ModelArguments:
    """Which model, how it is loaded, and which adapter is trained in its place."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A folder, or a model of the hub."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    dtype: str | None = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16, float16, auto."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA instead of the whole model."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the LoRA: alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the LoRA; 0 with disable_dropout."})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "Modules that get a LoRA."})
    lora_modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained whole."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the base model in 4 bits (bitsandbytes, NF4)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the base model in 8 bits (bitsandbytes)."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantize the 4-bit constants as well."})
    merge_adapter: bool = field(
        default=False, metadata={"help": "Also save the whole model with the LoRA merged, in output_dir/merged."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "A Jinja chat template or a file that holds one, in place of the tokenizer's."}
    )

    def init_kwargs(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained``."""
        kwargs: dict[str, Any] = {"revision": self.model_revision, "dtype": self.dtype}
        if self.attn_implementation is not None:
            kwargs["attn_implementation"] = self.attn_implementation
        if self.load_in_4bit or self.load_in_8bit:
            require("bitsandbytes", "load_in_4bit" if self.load_in_4bit else "load_in_8bit")
            from transformers import BitsAndBytesConfig

            kwargs["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=self.load_in_4bit,
                load_in_8bit=self.load_in_8bit,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
                # Left to its default, every matmul of a quantized layer is computed in float32.
                bnb_4bit_compute_dtype=self.dtype if self.dtype in ("bfloat16", "float16") else None,
            )
        return kwargs

    def peft_config(self) -> Any:
        """The LoRA to train, or None."""
        if not self.use_peft:
            return None
        require("peft", "use_peft")
        from peft import LoraConfig

        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            # peft knows "all-linear" as a string only; in a list it would look for a module of that name.
            target_modules="all-linear" if self.lora_target_modules == ["all-linear"] else self.lora_target_modules,
            modules_to_save=self.lora_modules_to_save,
            task_type="CAUSAL_LM",
        )

    def tokenizer(self, args: ORPOConfig) -> Any:
        """The tokenizer with ``chat_template`` in place, or None for the model's own as it is."""
        if self.chat_template is None:
            return None
        tokenizer = load_tokenizer(
            self.model_name_or_path, trust_remote_code=args.trust_remote_code, revision=self.model_revision
        )
        is_text = "{" in self.chat_template
        tokenizer.chat_template = self.chat_template if is_text else Path(self.chat_template).read_text("utf-8")
        return tokenizer


@dataclass
class DataArguments:
    """Which pairs."""

    dataset_name: str | None = field(default=None, metadata={"help": "A file, a folder, or a data set of the hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": 'For example "train" or "train[200:]".'})
    dataset_test_split: str = field(default="test", metadata={"help": "Read only where something is evaluated."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Held-out pairs, if elsewhere."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read the pairs as they are trained on."})


def parse(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, ORPOConfig]:
    """The command line; ``--config``, a file or a recipe, gives defaults that options on the line override."""
    parser = _Parser((ModelArguments, DataArguments, ORPOConfig), prog="orpo-train", description=__doc__)
    parser.add_argument("--config", help="A YAML file of options, or the name of a recipe (--list_recipes).")
    parser.add_argument("--list_recipes", "--list-recipes", action=_ListRecipes, nargs=0, help="Name the recipes.")
    parser.add_argument(
        "--print_config", "--print-config", action=_PrintConfig, help="Print a configuration of accelerate launch."
    )
    config = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0].config
    if config is not None:
        parser.set_defaults(**_read_config(config, {action.dest for action in parser._actions}))
    *arguments, _, left = parser.parse_args_into_dataclasses(args=list(argv), return_remaining_strings=True)
    if left:
        raise ValueError(_unknown(left, parser._option_string_actions))
    return tuple(arguments)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> Any:
        """``ArgumentParser``'s without its usage, which would be pages long here."""
        self.exit(2, f"{self.prog}: {message}; all options: {self.prog} --help\n")


def _unknown(words: Sequence[str], known: Collection[str]) -> str:
    """What to say of `words` on the line that are no options, with the nearest of those that are."""
    texts = []
    for word in words:
        near = difflib.get_close_matches(word.partition("=")[0], known, n=1)
        if word.startswith("--") or near:
            texts.append(f"{word} is no option" + (f", did you mean {near[0]}?" if near else ""))
    return "; ".join(texts or [f"nothing takes {' '.join(words)}"])


class _ListRecipes(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(describe_recipes())
        parser.exit()


class _PrintConfig(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _: Any, name: Any, *__: Any) -> None:
        try:
            print(launch_config(name), end="")
        except ValueError as error:
            parser.error(str(error))
        parser.exit()


def _read_config(name: str, known: set[str]) -> dict[str, Any]:
    """The options in a YAML file, or in a shipped recipe of that name.

    Raises:
        ValueError: there is no such file or recipe, it is no mapping, or it holds options that do not exist.
    """
    path = find_config(name)
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} has to hold a mapping of options, not a {type(options).__name__}")
    unknown = sorted(set(options) - known)
    if unknown:
        near = [(name, difflib.get_close_matches(name, known, n=1)) for name in unknown]
        names = ", ".join(name + (f" (did you mean {found[0]}?)" if found else "") for name, found in near)
        raise ValueError(f"{path} holds options that do not exist: {names}")
    return options


def train(model_args: ModelArguments, data_args: DataArguments, args: ORPOConfig) -> ORPOTrainer:
    """One run: loads, trains, evaluates, saves the model, its metrics, its state and its curves in ``output_dir``."""
    if model_args.merge_adapter and not model_args.use_peft:
        raise ValueError("merge_adapter is given without use_peft: there is no adapter to merge")
    if args.should_save:
        check_writable(args.output_dir)
    optim = args.optim.value
    # adamw_torch_8bit and its like are torchao's.
    if "torch" not in optim and any(part in optim for part in ("paged", "bit", "bnb")):
        require("bitsandbytes", f"optim {optim}")
    args.model_init_kwargs = {**model_args.init_kwargs(), **(args.model_init_kwargs or {})}
    source = {"config": data_args.dataset_config, "streaming": data_args.dataset_streaming}
    evaluates = args.do_eval or args.eval_strategy != "no" or data_args.eval_dataset_name is not None
    held_out = data_args.eval_dataset_name or data_args.dataset_name
    trainer = ORPOTrainer(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=load_pairs(data_args.dataset_name, data_args.dataset_train_split, **source),
        eval_dataset=load_pairs(held_out, data_args.dataset_test_split, **source) if evaluates else None,
        peft_config=model_args.peft_config(),
        processing_class=model_args.tokenizer(args),
    )
    try:
        result = trainer.train(resume_from_checkpoint=_resume_from(args))
    except torch.OutOfMemoryError as error:
        error.add_note(_memory_advice(args, model_args))
        raise
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    if evaluates:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero() and any("nll_loss" in entry for entry in trainer.state.log_history):
        from orpo.plots import plot_curves, write_curves_csv

        history = {"ORPO": trainer.state.log_history}
        plot_curves(history, Path(args.output_dir) / "curves.png")
        write_curves_csv(history, Path(args.output_dir) / "curves.csv")
    card = {"dataset": data_args.dataset_name, "dataset_args": data_args.dataset_config}
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    if model_args.merge_adapter and trainer.is_world_process_zero():
        merge_adapter(args.output_dir, Path(args.output_dir) / "merged", dtype=model_args.dtype)
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
    model_args, data_args, args = parse(argv)
    model, data = model_args.model_name_or_path, data_args.dataset_name
    if model is None and data is None:
        from orpo.demo import run_demo

        # Its own defaults stand unless the line says otherwise: the figures in the README are those of its seed.
        given = {part.partition("=")[0] for part in argv}
        options = {name: getattr(args, name) for name in ("output_dir", "seed") if f"--{name}" in given}
        run_demo(device="cpu" if args.use_cpu else None, **options)
    elif model is None or data is None:
        missing, given = ("model_name_or_path", data) if model is None else ("dataset_name", model)
        raise SystemExit(f"orpo-train: {given} is given, but not --{missing}; with neither, the demonstration runs")
    else:
        train(model_args, data_args, args)
        end_process_group()


def command() -> None:
    """:func:`main` as the shell runs it."""
    run_command("orpo-train", main)


if __name__ == "__main__":
    command()
