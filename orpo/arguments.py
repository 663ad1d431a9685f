"""What ``orpo-train`` is told: its options, read from the command line, a YAML file or a recipe."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from orpo.command import OneLineErrors
from orpo.config import ORPOConfig
from orpo.launch import launch_config
from orpo.packages import require
from orpo.recipes import describe_recipes, find_config
from orpo.setup import load_tokenizer
from orpo.sources import NoSuchSplit, load_pairs

HELD_OUT = (
    "--eval_dataset_name FILE, or parts of the one data set: "
    "--dataset_train_split 'train[5%:]' --dataset_test_split 'train[:5%]'"
)


@dataclass
class ModelArguments:
    """Which model, how it is loaded, and which adapter is trained in its place."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A folder or a name on the hub, of a model or an adapter."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    dtype: str | None = field(default="float32", metadata={"help": "Of the weights: float32, bfloat16, float16, auto."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA instead of the whole model."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the LoRA: alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of the LoRA; 0 with disable_dropout."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules with a LoRA, by name, or all-linear."},
    )
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
        template = self.chat_template
        if "{" not in template:
            if not Path(template).is_file():
                raise ValueError(f"--chat_template is {template!r}: no such file, and no Jinja template either")
            template = Path(template).read_text("utf-8")
        tokenizer = load_tokenizer(
            self.model_name_or_path, trust_remote_code=args.trust_remote_code, revision=self.model_revision
        )
        tokenizer.chat_template = template
        return tokenizer


@dataclass
class DataArguments:
    """Which pairs."""

    dataset_name: str | None = field(default=None, metadata={"help": "A file, a folder, or a data set of the hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": 'For example "train" or "train[200:]".'})
    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Read where something is evaluated. Default: test; of a file as eval_dataset_name, all."},
    )
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Held-out pairs, if elsewhere."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read the pairs as they are trained on."})

    def train_pairs(self) -> Any:
        """The pairs to train on."""
        return self._load(self.dataset_name, self.dataset_train_split)

    def held_out_pairs(self) -> Any:
        """The pairs to evaluate on.

        Raises:
            NoSuchSplit: there are none; a note says how they are given.
        """
        split = self.dataset_test_split
        if split is None:
            # A file has the one split "train".
            is_file = self.eval_dataset_name is not None and Path(self.eval_dataset_name).expanduser().is_file()
            split = "train" if is_file else "test"
        try:
            return self._load(self.eval_dataset_name or self.dataset_name, split)
        except NoSuchSplit as error:
            error.add_note(f"to evaluate on: {HELD_OUT}; or leave out --eval_strategy and --do_eval")
            raise

    def _load(self, name: str, split: str) -> Any:
        return load_pairs(name, split, config=self.dataset_config, streaming=self.dataset_streaming)


def parse(argv: Sequence[str], description: str | None = None) -> tuple[ModelArguments, DataArguments, ORPOConfig]:
    """The command line; ``--config``, a file or a recipe, gives defaults that options on the line override.

    Args:
        argv: the words after the command.
        description: what ``--help`` begins with.

    Raises:
        ValueError: an option that does not exist, or a value that is refused.
        SystemExit: after ``--help`` and its like, and for a value that is no number where it has to be one.
    """
    parser = _Parser((ModelArguments, DataArguments, ORPOConfig), prog="orpo-train", description=description)
    parser.add_argument("--config", help="A YAML file of options, or the name of a recipe (--list_recipes).")
    parser.add_argument("--list_recipes", "--list-recipes", action=_ListRecipes, nargs=0, help="Name the recipes.")
    parser.add_argument(
        "--print_config", "--print-config", action=_PrintConfig, help="Print a configuration of accelerate launch."
    )
    config = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0].config
    options = {} if config is None else _read_config(config, {action.dest for action in parser._actions})
    parser.set_defaults(**options)
    try:
        *arguments, _, left = parser.parse_args_into_dataclasses(args=list(argv), return_remaining_strings=True)
    except ValueError as error:
        given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
        for name in sorted(options.keys() - given):
            if re.search(rf"\b{name}\b", str(error)):
                error.add_note(f"--config {config} sets {name} to {options[name]}")
        raise
    if left:
        raise ValueError(_unknown(left, parser._option_string_actions))
    return tuple(arguments)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after each option, and the description with its lines as they are."""


class _Parser(OneLineErrors, HfArgumentParser):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, usage="%(prog)s [--config FILE] [--option value ...]", formatter_class=_Help, **kwargs)
        for action in self._actions:
            if action.type is string_to_bool and action.nargs is None:
                # Those without a default of their own: HfArgumentParser wants a value for them alone.
                action.nargs, action.const = "?", True
            if action.dest == "resume_from_checkpoint":
                action.help = (
                    "A checkpoint or a folder of them; true: the newest in output_dir, which has to be there; false: "
                    "start anew. Left out: go on from the newest complete one in output_dir, if there is one."
                )


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
