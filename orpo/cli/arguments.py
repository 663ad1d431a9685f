"""What ``orpo-train`` is told: its options, read from the command line, a YAML file or a recipe."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from orpo.cli.errors import OneLineErrors
from orpo.cli.other_names import say_unknown
from orpo.cli.run_file import read_run_file
from orpo.cli.short_help import short_help
from orpo.data.files.sources import NoSuchSplit, load_pairs
from orpo.files import read_text
from orpo.launch import launch_config
from orpo.model.load import load_tokenizer
from orpo.packages import require
from orpo.recipes import describe_recipes
from orpo.trainer.config import ORPOConfig, older_name

HELD_OUT = (
    "--eval_dataset_name FILE, or parts of the one data set: "
    "--dataset_train_split 'train[5%:]' --dataset_test_split 'train[:5%]'"
)


HELP = ("-h", "--help", "--help_all", "--help-all")


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
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Parameters with a LoRA, by name: of experts, which are no modules."}
    )
    lora_modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained whole."})
    lora_task_type: str = field(
        default="CAUSAL_LM", metadata={"help": "CAUSAL_LM, or SEQ_2_SEQ_LM of an encoder-decoder (T5, BART)."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale the LoRA by alpha / sqrt(r) (RS-LoRA)."})
    use_dora: bool = field(default=False, metadata={"help": "Train the weights' magnitudes beside the LoRA (DoRA)."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the base model in 4 bits (bitsandbytes)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the base model in 8 bits (bitsandbytes)."})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "With load_in_4bit: nf4 or fp4."})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "Quantize the 4-bit constants as well."})
    bnb_4bit_quant_storage: str | None = field(
        default=None, metadata={"help": "With load_in_4bit: dtype of the packed weights; FSDP wants that of the rest."}
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "Also save the whole model with the LoRA merged, in output_dir/merged."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "A Jinja chat template or a file that holds one, in place of the tokenizer's."}
    )

    torch_dtype: str | None = older_name("dtype")

    def __post_init__(self) -> None:
        if self.torch_dtype is not None:
            self.dtype = self.torch_dtype
            warnings.warn(f"torch_dtype is an older name: use dtype={self.dtype!r}", FutureWarning, stacklevel=3)
        if self.lora_task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            raise ValueError(f"lora_task_type is {self.lora_task_type!r}; it has to be CAUSAL_LM or SEQ_2_SEQ_LM")
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ValueError(f"bnb_4bit_quant_type is {self.bnb_4bit_quant_type!r}; it has to be nf4 or fp4")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both given; a model is loaded in one of them")
        if self.lora_r < 1:
            raise ValueError(f"lora_r is {self.lora_r}; it has to be at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; it has to be at least 0 and below 1")

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
                bnb_4bit_quant_type=self.bnb_4bit_quant_type,
                bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
                bnb_4bit_quant_storage=self.bnb_4bit_quant_storage,
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
            target_modules=_names_or_pattern(self.lora_target_modules),
            target_parameters=_names(self.lora_target_parameters),
            modules_to_save=_names(self.lora_modules_to_save),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            task_type=self.lora_task_type,
        )

    def tokenizer(self, args: ORPOConfig) -> Any:
        """The tokenizer with ``chat_template`` in place, or None for the model's own as it is."""
        if self.chat_template is None:
            return None
        template = self.chat_template
        if "{" not in template:
            if not Path(template).is_file():
                raise ValueError(f"--chat_template is {template!r}: no such file, and no Jinja template either")
            template = read_text(template)
        tokenizer = load_tokenizer(
            self.model_name_or_path, trust_remote_code=args.trust_remote_code, revision=self.model_revision
        )
        tokenizer.chat_template = template
        return tokenizer


def _names(words: list[str] | None) -> list[str] | None:
    """`words`, those that hold several names, with commas or spaces between them, taken apart."""
    if words is None:
        return None
    parts = [re.split(r"[\s,]+", word) if re.fullmatch(r"[\w.\s,-]*", word) else [word] for word in words]
    return [name for part in parts for name in part if name]


def _names_or_pattern(words: list[str] | None) -> list[str] | str | None:
    """`words` as peft takes them: names as a list, "all-linear" or a regular expression as a string.

    In a list, peft would look for a module of that name.

    Raises:
        ValueError: "all-linear" or a regular expression stands beside other words.
    """
    names = _names(words) or []
    patterns = [name for name in names if name == "all-linear" or not re.fullmatch(r"[\w.-]+", name)]
    if patterns and len(names) > 1:
        raise ValueError(
            f"lora_target_modules is {' '.join(names)}; {patterns[0]} is no name, and has to stand alone: give names, "
            "or one regular expression, or all-linear"
        )
    return patterns[0] if patterns else words and names


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
    ignore_bias_buffers: bool | None = older_name("nothing: buffers are left as the model has them")

    def __post_init__(self) -> None:
        if self.ignore_bias_buffers is not None:
            warnings.warn("ignore_bias_buffers does nothing here: leave it out", FutureWarning, stacklevel=3)

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
    """Reads the command line; options on it override those of ``--config``, a file or a recipe.

    Args:
        argv: the words after the command.
        description: what ``--help`` begins with.

    Raises:
        ValueError: an option that does not exist, or a value that is refused.
        SystemExit: after ``--help`` and its like, and for a text where a number has to be.
    """
    parser = _Parser((ModelArguments, DataArguments, ORPOConfig), prog="orpo-train", description=description)
    parser.add_argument("-h", "--help", action=_ShortHelp, nargs=0, help="Print the options that most runs need.")
    parser.add_argument("--help_all", "--help-all", action="help", help="Print every option.")
    parser.add_argument("--config", help="A YAML file of options, or the name of a recipe (--list_recipes).")
    parser.add_argument("--list_recipes", "--list-recipes", action=_ListRecipes, nargs=0, help="Name the recipes.")
    parser.add_argument(
        "--print_config",
        "--print-config",
        action=_PrintConfig,
        help="Print a file that starts several ranks.",
    )
    parser.add_argument(
        "--check_ranks",
        "--check-ranks",
        action="store_true",
        help="Train nothing: check that all ranks see the same model, data and output_dir, and that a step of a few "
        "layers on all ranks is that of one process. Ends with status 0, or 1 and the rank and what it lacks.",
    )
    config = parser.parse_known_args([a for a in argv if a not in HELP])[0].config
    options = {} if config is None else read_run_file(config, parser.settings)
    parser.set_defaults(**options)
    try:
        *arguments, _, left = parser.parse_args_into_dataclasses(args=list(argv), return_remaining_strings=True)
    except ValueError as error:
        given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
        given |= {name.removeprefix("no_") for name in given}
        for name in sorted(options.keys() - given):
            if re.search(rf"\b{name}\b", str(error)):
                error.add_note(f"--config {config} sets {name} to {options[name]}")
        raise
    if left:
        raise ValueError(say_unknown(left, parser._option_string_actions))
    return tuple(arguments)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after each option, and the description with its lines as they are."""


class _Parser(OneLineErrors, HfArgumentParser):
    """Every field of the three classes as an option, and every boolean also as ``--no_NAME``."""

    def __init__(self, classes: Sequence[type], *args: Any, **kwargs: Any) -> None:
        usage = "%(prog)s [--config FILE] [--option value ...]"
        super().__init__(
            classes, *args, usage=usage, formatter_class=_Help, add_help=False, allow_abbrev=False, **kwargs
        )
        self.settings = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
        fields = {action.dest for action in self._actions}
        self.settings = {name: hint for name, hint in self.settings.items() if name in fields}
        for action in list(self._actions):
            if action.type is not string_to_bool:
                continue
            if action.nargs is None:
                # HfArgumentParser wants a value for booleans without a default: `--bf16` alone would be refused.
                action.nargs, action.const = "?", True
            # TRL's command lines turn off, by --no_NAME, settings that are off or unset here.
            names = [f"--{word}" for word in (f"no_{action.dest}", f"no-{action.dest.replace('_', '-')}")]
            if names[0] not in self._option_string_actions:
                self.add_argument(
                    *names, action="store_false", dest=action.dest, default=action.default, help=argparse.SUPPRESS
                )
        (resume,) = (action for action in self._actions if action.dest == "resume_from_checkpoint")
        resume.help = (
            "A checkpoint or a folder of them; true: the newest in output_dir, which has to be there; false: start "
            "anew. Left out: go on from the newest complete one in output_dir, if there is one."
        )


class _ShortHelp(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(short_help(parser))
        parser.exit()


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
