"""The start of a run: a model by its name, or an adapter, which is trained further or merged first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForSeq2SeqLM

from orpo.hub import hub_options
from orpo.model.adapters import adapter_folder, load_adapter, naming_base_of, read_config
from orpo.model.encoder_decoder import is_encoder_decoder
from orpo.model.load import check_model, find_dtype, load_model, load_tokenizer
from orpo.model.merging import is_merged, merge_adapter
from orpo.model.probe import refuse_layout
from orpo.ranks import data_ranks
from orpo.trainer.adapt import SEQ_2_SEQ, adapt, prepare_quantized
from orpo.trainer.config import ORPOConfig
from orpo.trainer.tensor_parallel import load_options, refuse_part
from orpo.trainer.zero3 import is_zero_3, refuse_settings

# Folder in output_dir for a merged model, which a new adapter names as its base.
MERGED = "base"

# Usual learning rates of Adam and its like, for a whole model (False) and an adapter (True): below the first number
# weights hardly change in any run, above the second the model loses what it knows.
RATES = {False: (1e-7, 1e-3), True: (1e-5, 1e-2)}


def check_model_argument(model: Any, args: ORPOConfig, peft_config: Any) -> tuple[str, bool]:
    """(the name under which to look for the tokenizer of `model`, whether it is an encoder-decoder).

    The name is "" if a loaded model has none. If `model` is None, ``args`` say what ``model_init`` will make.

    Raises:
        ImportError, ValueError: as :func:`check_start`; ``model_init_kwargs`` is given beside a loaded model; the
            layout, or the task of `peft_config`, does not fit an encoder-decoder.
    """
    if peft_config is not None:
        refuse_part(args, "and peft_config is given")
    refuse_settings(args, peft_config, makes_model=model is None)
    if isinstance(model, str):
        name, encoder_decoder = check_start(model, args)
    elif args.model_init_kwargs:
        raise ValueError("model_init_kwargs is given, but the model is loaded already")
    else:
        name = getattr(getattr(model, "config", None), "_name_or_path", "")
        encoder_decoder = bool(args.is_encoder_decoder) if model is None else is_encoder_decoder(model)
    if encoder_decoder:
        shown = model if isinstance(model, str) else "model_init's model" if model is None else type(model).__name__
        refuse_layout(args.layout, shown)
        if getattr(peft_config, "task_type", None) not in (None, SEQ_2_SEQ):
            raise ValueError(
                f"the adapter's task_type is {peft_config.task_type}, and {shown} is an encoder-decoder: it has to be "
                f"{SEQ_2_SEQ} (--lora_task_type {SEQ_2_SEQ})"
            )
    return name, encoder_decoder


def find_tokenizer(given: Any, name: str, args: ORPOConfig) -> Any:
    """The tokenizer or processor `given`, or that of the model `name`.

    Raises:
        ValueError: as :func:`orpo.model.load.load_tokenizer`.
    """
    if given is not None:
        return given
    return load_tokenizer(name, trust_remote_code=args.trust_remote_code, **hub_options(args.model_init_kwargs or {}))


def start_model(model: Any, args: ORPOConfig, peft_config: Any) -> nn.Module | None:
    """`model` ready to train, loaded if it is a name; None if ``model_init`` will make it.

    Raises:
        ImportError, ValueError: as :func:`load_start` and :func:`orpo.trainer.adapt.adapt`.
    """
    if isinstance(model, str):
        model = load_start(model, args, peft_config)
    return None if model is None else adapt(model, args, peft_config)


def check_start(name: str, args: ORPOConfig) -> tuple[str, bool]:
    """Refuses `name` before weights are read, if possible. Returns (where its tokenizer is, whether it has an encoder).

    Raises:
        ImportError, ValueError: as :func:`load_start`.
    """
    options = _options(args)
    # Before the hub is asked, which may take long.
    find_dtype(options.get("dtype"))
    folder = adapter_folder(name, **options)
    if folder is None:
        return name, check_model(name, **options)[0] is AutoModelForSeq2SeqLM
    if is_zero_3(args):
        raise ValueError(
            f"{name} is an adapter, and ZeRO-3 with an adapter is not supported: merge it first, or use FSDP2"
        )
    config = read_config(folder)
    with naming_base_of(folder):
        auto, _ = check_model(config.base_model_name_or_path, **{**options, "revision": config.revision})
    return str(folder), auto is AutoModelForSeq2SeqLM


def load_start(name: str, args: ORPOConfig, peft_config: Any) -> nn.Module:
    """Loads the model `name` from which a run with `args` starts.

    An adapter is loaded around its base model and trained further. If `peft_config` asks for a new one, it is merged
    into its base first, and the merged model is saved in ``output_dir/base``, which the new adapter names as its base.

    Args:
        name: a model's or an adapter's folder, or the name of one on the hub.
        args: ``model_init_kwargs`` and ``trust_remote_code`` are used, and ``output_dir`` where something is merged.
        peft_config: of the adapter that will be trained, or None.

    Raises:
        ImportError: it is an adapter, and peft is not installed.
        ValueError: as :func:`orpo.model.load.load_model`, and :func:`orpo.model.merging.merge_adapter`.
    """
    options = _options(args)
    folder = adapter_folder(name, **options)
    if folder is None:
        return load_model(name, **options, **load_options(args))
    refuse_part(args, f"and {name} is an adapter")
    base = read_config(folder).base_model_name_or_path
    report = print if args.should_log else lambda _: None
    if peft_config is None:
        report(f"{name} is an adapter on {base}: it is trained further")
        return load_adapter(folder, trainable=True, prepare=lambda model: prepare_quantized(model, args), **options)
    merged, dtype = Path(args.output_dir, MERGED).absolute(), options.get("dtype", "auto")
    report(f"{name} is an adapter on {base}: it is merged, in {merged}, and the new adapter is trained on that")
    # First rank 0, for a disk that nodes share; then one process of each node, for nodes with their own disks.
    for alone in (False, True):
        with args.main_process_first(local=alone, desc="merging the adapter"):
            turn = args.local_process_index if alone else args.process_index
            if turn == 0 and not is_merged(merged, folder, dtype):
                merge_adapter(folder, merged, dtype=dtype, trust_remote_code=args.trust_remote_code)
    return load_model(str(merged), **{**options, "revision": None})


def _options(args: ORPOConfig) -> dict[str, Any]:
    return {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}


def describe_training(model: nn.Module, args: ORPOConfig, steps: int) -> str:
    """One line: how many parameters are trained, how fast, and on how many pairs a step, over `steps` steps."""
    counts = [(_numbers(p), p.requires_grad) for p in model.parameters()]
    trained, whole = sum(n for n, trains in counts if trains), sum(n for n, _ in counts)
    ranks = data_ranks(args.parallelism_config, args.world_size)
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    return (
        f"trains {trained:,} of {whole:,} parameters ({100 * trained / max(whole, 1):.3g} %): {steps:,} steps of "
        f"{pairs:,} pairs, learning rate {args.learning_rate:g} ({args.lr_scheduler_type.value})"
    )


def odd_rate(args: ORPOConfig, adapter: bool) -> str | None:
    """A warning of a learning rate that is far too low or too high; or None.

    Args:
        adapter: whether a LoRA or the like is trained, which needs about ten times the rate of a whole model.
    """
    rate, (low, high) = args.learning_rate, RATES[adapter]
    if "adam" not in args.optim.value or low <= rate <= high:
        return None
    what, usual = ("an adapter", "1e-4 to 2e-4") if adapter else ("a whole model", "1e-6 to 2e-5")
    effect = "hardly anything will change" if rate < low else "what the model knows may be lost"
    return f"learning_rate is {rate:g}, with which {effect}: {usual} is usual for {what}"


def _numbers(parameter: nn.Parameter) -> int:
    # A parameter under ZeRO-3 is empty, and one of 4 bits has two numbers in a byte.
    count = getattr(parameter, "ds_numel", parameter.numel())
    return 2 * parameter.element_size() * count if type(parameter).__name__ == "Params4bit" else count
