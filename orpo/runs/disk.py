"""Whether a run can save what it will have trained, and over what, told before it trains."""

from __future__ import annotations

import math
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

# Numbers that an optimizer keeps for each parameter; two, as Adam does, for all that are not here.
STATES = {"sgd": 0, "adafactor": 0, "adagrad": 1, "rmsprop": 1, "lion": 1, "lomo": 0, "adalomo": 0}

# Of what a run writes beside its weights, what could be a file of pairs by its name.
WRITTEN = frozenset(
    f"{name}.json"
    for name in (
        *("config", "generation_config", "adapter_config", "tokenizer", "tokenizer_config", "special_tokens_map"),
        *("added_tokens", "vocab", "trainer_state", "all_results", "train_results", "eval_results"),
    )
) | {"samples.jsonl", "curves.csv"}


def refuse_own_sources(written: Sequence[Path], model: str, data: Sequence[str | None]) -> None:
    """Refuses a run that would write over the model or the data that it is made from.

    Args:
        written: the folders that the run writes a model to, its ``output_dir`` first.
        model: a folder, or a name on the hub.
        data: files, folders, names on the hub, or None.

    Raises:
        ValueError: one of them lies where the run writes.
    """
    folders = [folder.resolve() for folder in written]
    source = Path(model).expanduser().resolve()
    # Older checkpoints are removed under save_total_limit.
    removable = source.parent == folders[0] and source.name.startswith("checkpoint-")
    if source.is_dir() and (source in folders or removable):
        raise ValueError(
            f"output_dir {written[0]} is where the model {model} lies, which the run would write over or remove: "
            "give another output_dir"
        )
    for name in filter(None, data):
        path = Path(name).expanduser().resolve()
        # A folder of data is read with what lies below it.
        inside = path.is_dir() and any(folder.is_relative_to(path) for folder in folders)
        if inside or (path.is_file() and path.parent in folders and path.name in WRITTEN):
            raise ValueError(
                f"output_dir {written[0]} is where the pairs {name} lie, which the run would write over or add files "
                "to: give another output_dir"
            )


def check_writable(output_dir: str | Path) -> None:
    """Makes `output_dir` and writes in it.

    Raises:
        ValueError: that is not possible.
    """
    if Path(output_dir).is_file():
        raise ValueError(f"output_dir {output_dir} is a file; it has to be a folder")
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b"\0")
    except OSError as error:
        raise ValueError(f"output_dir {output_dir} cannot be written: {error.strerror}") from error


@contextmanager
def leaves_no_empty_folder(output_dir: str | Path) -> Iterator[None]:
    """After the block, removes `output_dir` and its parents again, as far as they are new and empty."""
    path = Path(output_dir).absolute()
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    finally:
        with suppress(OSError):
            for folder in new:
                folder.rmdir()


def checkpoint_bytes(model: nn.Module, args: Any) -> int:
    """About how large a checkpoint of `model` is: its weights, or those of its adapter, and the optimizer's state."""
    # Under ZeRO-3 a parameter is empty, and under FSDP2 it counts whole on every rank.
    trained = [(getattr(p, "ds_numel", p.numel()), p) for p in model.parameters() if p.requires_grad]
    saved = (
        trained
        if hasattr(model, "peft_config")
        else [(getattr(p, "ds_numel", p.numel()), p) for p in model.parameters()]
    )
    weights = sum(count * p.element_size() for count, p in saved)
    if args.save_only_model:
        return weights
    # FSDP and DeepSpeed save the weights once for from_pretrained and once for themselves.
    copies = 2 if args.fsdp or args.deepspeed else 1
    return copies * weights + sum(count * _state_bytes(p, args) for count, p in trained)


def _state_bytes(parameter: nn.Parameter, args: Any) -> float:
    if args.deepspeed:
        # Two states and the weight, all in float32.
        return 12
    name = args.optim.value
    states = next((count for kind, count in STATES.items() if kind in name), 2)
    if name == "sgd" and "momentum" in (args.optim_args or ""):
        states = 1
    size = {"8bit": 1, "4bit": 0.5}
    return states * next((bytes_ for kind, bytes_ in size.items() if kind in name), parameter.element_size())


class DiskSpace(TrainerCallback):
    """Before the first step, compares what will be saved with what is free."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Raises ValueError where not even one checkpoint fits, and warns where one does, but not all."""
        if args.save_strategy == "no" or not args.should_save or state.global_step >= state.max_steps:
            return
        one, free = checkpoint_bytes(model, args), shutil.disk_usage(args.output_dir).free
        if free < one:
            raise ValueError(
                f"output_dir {args.output_dir} has {readable(free)} free, and a checkpoint takes about "
                f"{readable(one)}: free some, or set save_only_model or save_strategy no"
            )
        count = _checkpoints_to_come(args, state)
        if free < count * one:
            warnings.warn(
                f"output_dir {args.output_dir} has {readable(free)} free, and {count} checkpoints take about "
                f"{readable(count * one)}: set save_total_limit, or save less often",
                stacklevel=2,
            )


def _checkpoints_to_come(args: Any, state: Any) -> int:
    """How many more there will be at once: with a limit, one above it for a moment."""
    left = state.max_steps - state.global_step
    if args.save_strategy == "steps":
        saves = math.ceil(left / max(state.save_steps, 1))
    else:
        saves = math.ceil(left / state.max_steps * state.num_train_epochs)
    if args.save_total_limit and args.save_total_limit > 0:
        there = sum(1 for _ in Path(args.output_dir).glob("checkpoint-*"))
        saves = min(saves, args.save_total_limit + 1 - there)
    return max(saves, 1)


def readable(size: float) -> str:
    """For example "1.5 GB": in powers of 1,000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
