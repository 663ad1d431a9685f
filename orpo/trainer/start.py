"""What a run starts from: a model by its name, or an adapter, which is trained further or merged first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from orpo.model.adapters import adapter_folder, load_adapter, naming_base_of, read_config
from orpo.model.load import check_model, find_dtype, load_model
from orpo.model.merging import is_merged, merge_adapter
from orpo.trainer.adapt import prepare_quantized
from orpo.trainer.config import ORPOConfig

# In output_dir: what a new adapter names as its base has to be somewhere.
MERGED = "base"

# Learning rates of Adam and its like, for a whole model and for an adapter: below the first number weights hardly
# change in any run, above the second they are no longer those of the model that was loaded.
RATES = {False: (1e-7, 1e-3), True: (1e-5, 1e-2)}


def check_start(name: str, args: ORPOConfig) -> str:
    """Refuses what can be known of `name` before weights are read; returns where its tokenizer is looked for.

    Raises:
        ImportError, ValueError: as :func:`load_start`.
    """
    options = _options(args)
    # Before the hub is asked, which may take its time.
    find_dtype(options.get("dtype"))
    folder = adapter_folder(name, **options)
    if folder is None:
        check_model(name, **options)
        return name
    config = read_config(folder)
    with naming_base_of(folder):
        check_model(config.base_model_name_or_path, **{**options, "revision": config.revision})
    return str(folder)


def load_start(name: str, args: ORPOConfig, peft_config: Any) -> nn.Module:
    """The model called `name` as a run with `args` starts from it.

    An adapter is loaded around its base model and trained further. Where `peft_config` asks for a new one, it is merged
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
        return load_model(name, **options)
    base = read_config(folder).base_model_name_or_path
    report = print if args.should_log else lambda _: None
    if peft_config is None:
        report(f"{name} is an adapter on {base}: it is trained further")
        return load_adapter(folder, trainable=True, prepare=lambda model: prepare_quantized(model, args), **options)
    merged, dtype = Path(args.output_dir, MERGED).absolute(), options.get("dtype", "auto")
    report(f"{name} is an adapter on {base}: it is merged, in {merged}, and the new adapter is trained on that")
    # Rank 0 alone on a disk that the nodes share, and then one process of each node that has a disk of its own.
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
    pairs = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return (
        f"trains {trained:,} of {whole:,} parameters ({100 * trained / max(whole, 1):.3g} %): {steps:,} steps of "
        f"{pairs:,} pairs, learning rate {args.learning_rate:g} ({args.lr_scheduler_type.value})"
    )


def odd_rate(args: ORPOConfig, adapter: bool) -> str | None:
    """What to say of a learning rate that moves nothing, or too much; None where there is nothing to say.

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
    # Under ZeRO-3 a parameter is empty, and one of 4 bits has two numbers in a byte.
    count = getattr(parameter, "ds_numel", parameter.numel())
    return 2 * parameter.element_size() * count if type(parameter).__name__ == "Params4bit" else count
