"""A checkpoint's record of its run, by which a run that resumes from it is known to be the same."""

from __future__ import annotations

import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from orpo.files import write_whole
from orpo.ranks import fsdp_plugin
from orpo.runs.manifest import describe_files, describes_files
from orpo.tokens.pretokenized import MASKS

RECORD = "orpo_run.json"

# How the pairs of an optimizer step are divided.
SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
# Settings that decide the losses of a run. Others, such as logging, evaluation, saving and memory, may change.
FIXED = (
    *(*SPLIT, "auto_find_batch_size"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "neftune_noise_alpha", "bf16", "fp16", "seed", "data_seed"),
    *("dataloader_drop_last", "train_sampling_strategy", "length_column_name", "ignore_data_skip"),
    *("beta", "nll_weight", "nll_span", "nll_scores_eos", "normalization", "disable_dropout"),
    *("max_length", "max_prompt_length", "max_completion_length", "truncation_mode", "escape_special_tokens"),
    *("truncation", "pair_by_prompt", "score_turns"),
)
STREAM = "a stream"
LENGTH = ("num_train_epochs", "max_steps")
ADAPTER = " of the adapter"
# The base model's place may change, and so may the version of peft.
NOT_FIXED_IN_ADAPTER = (
    *("base_model_name_or_path", "revision"),
    *("inference_mode", "peft_version", "auto_mapping", "runtime_config"),
)


def describe_run(trainer: Any) -> dict[str, Any]:
    """The settings of `trainer` that decide its losses, as JSON knows them, by the names a user gives them."""
    args = trainer.args
    values = {**args.to_dict(), "world_size": args.world_size}
    run = {name: values[name] for name in (*FIXED, *LENGTH)}
    run["fsdp or deepspeed"] = _sharding(trainer)
    run["model"] = _describe_model(trainer.model)
    run["dtype of the model"] = ", ".join(
        sorted({str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters()})
    )
    run["train_dataset"] = describe_data(trainer.train_dataset)
    for config in getattr(trainer.model, "peft_config", {}).values():
        adapter = {k: v for k, v in config.to_dict().items() if k not in NOT_FIXED_IN_ADAPTER}
        run |= {f"{name}{ADAPTER}": value for name, value in adapter.items()}
        # Checkpoints hold only the adapter: another base model would go unnoticed.
        run[f"base model's weights{ADAPTER}"] = _digest_frozen(trainer.model)
    # Sets have no order, and enums no JSON.
    return json.loads(json.dumps(run, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


def write_record(checkpoint: Path, run: dict[str, Any], number: int) -> None:
    """Writes `run`, the time, and sizes and checksums of all other files into the folder `checkpoint`.

    It is the last file of a checkpoint, and appears whole. `number` counts the saves in a folder, since a clock may be
    set back.
    """
    record = {"number": number, "saved_at": time.time(), "run": run, "files": describe_files(checkpoint, RECORD)}
    write_whole(checkpoint / RECORD, json.dumps(record, indent=1) + "\n")


def read_record(checkpoint: Path) -> dict[str, Any] | None:
    """What :func:`write_record` wrote, or None for a checkpoint of another program.

    Raises:
        ValueError: there is a record, and it cannot be read.
    """
    try:
        record = json.loads((checkpoint / RECORD).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{checkpoint / RECORD} cannot be read: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("run"), dict):
        raise ValueError(f"{checkpoint / RECORD} cannot be read: it holds no settings of a run")
    for name in ("number", "saved_at"):
        if not isinstance(record.get(name, 0), int | float):
            raise ValueError(
                f"{checkpoint / RECORD} cannot be read: its {name} is {record[name]!r}, which is no number"
            )
    if not describes_files(record.get("files", {})):
        raise ValueError(f"{checkpoint / RECORD} cannot be read: it has no sizes and checksums under files")
    return record


def compare_runs(checkpoint: Path, run: dict[str, Any]) -> str:
    """A remark on `run` resuming from `checkpoint`, or "".

    Raises:
        ValueError: `run` has other settings than the interrupted run, which would change its losses.
    """
    record = read_record(checkpoint)
    if record is None:
        return f" (without {RECORD}: its settings are not known, and were not compared)"
    before = record["run"]
    changed = [name for name in _comparable(before, run) if before.get(name) != run.get(name)]
    may_change = (*LENGTH, *(SPLIT if _has_the_same_steps(before, run) else ()))
    broken = [name for name in changed if name not in may_change]
    if broken:
        differences = "; ".join(f"{name} was {before.get(name)} and is {run.get(name)}" for name in broken)
        raise ValueError(
            f"{checkpoint} is of another run: {differences}. Give what it was{_same_steps(before, run)}, "
            "another output_dir, or resume_from_checkpoint false to start anew"
        )
    if not changed:
        return ""
    differences = "; ".join(f"{name} was {before[name]} and is {run[name]}" for name in changed)
    if not any(name in LENGTH for name in changed):
        return f" ({differences}: a step has the same {_pairs_a_step(run)} pairs)"
    # Below 1, warmup_steps is a fraction of the run, and changes with its length.
    constant = run["lr_scheduler_type"] == "constant" or (
        run["lr_scheduler_type"] == "constant_with_warmup" and not 0 < run["warmup_steps"] < 1
    )
    return f" ({differences}" + (")" if constant else ": from here on the learning rate is that of the new length)")


def _pairs_a_step(run: dict[str, Any]) -> int:
    """Pairs of an optimizer step, over micro-batches and ranks; 0 for an old record without them."""
    return math.prod(run.get(name) or 0 for name in SPLIT)


def _deals_freely(run: dict[str, Any]) -> bool:
    """Whether each step has the same pairs, with the same weights, however they are divided."""
    return (
        run.get("normalization") == "global"
        and run.get("train_sampling_strategy") in ("random", "sequential")
        and not run.get("auto_find_batch_size")
        and not run.get("dataloader_drop_last")
        and run.get("train_dataset") != STREAM
        # DeepSpeed's optimizer state is split for one number of ranks.
        and not str(run.get("fsdp or deepspeed")).startswith("ZeRO")
    )


def _has_the_same_steps(before: dict[str, Any], run: dict[str, Any]) -> bool:
    return _deals_freely(run) and _pairs_a_step(before) == _pairs_a_step(run)


def _same_steps(before: dict[str, Any], run: dict[str, Any]) -> str:
    """Advice: the gradient_accumulation_steps with which `run` has the same steps as `before`, if any."""
    dealt = run["per_device_train_batch_size"] * run["world_size"]
    pairs = _pairs_a_step(before)
    if not _deals_freely(run) or pairs == _pairs_a_step(run) or pairs % dealt or not pairs:
        return ""
    return f" (gradient_accumulation_steps {pairs // dealt} makes it the {pairs} pairs a step that it had)"


def _comparable(before: dict[str, Any], run: dict[str, Any]) -> list[str]:
    """The settings that both runs know, since other versions of this package or peft have more or fewer.

    If only one run has an adapter, all settings of the adapter are compared too, and differ.
    """
    one_adapter = any(ADAPTER in name for name in before) != any(ADAPTER in name for name in run)
    return [n for n in {**before, **run} if (n in before and n in run) or (one_adapter and ADAPTER in n)]


def _sharding(trainer: Any) -> str:
    plugin = fsdp_plugin(trainer.accelerator)
    if plugin is not None:
        return f"FSDP{plugin.fsdp_version}, {plugin.state_dict_type.name}"
    if trainer.is_deepspeed_enabled:
        return f"ZeRO-{trainer.accelerator.state.deepspeed_plugin.zero_stage}"
    return "neither"


def _describe_model(model: nn.Module) -> str:
    # A parameter that ZeRO-3 has split is empty; ds_shape is its size.
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
    names = sorted((name, shapes[name], p.requires_grad) for name, p in model.named_parameters())
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    return f"{kind} of {count:,} parameters ({_digest(repr(names).encode())})"


def _digest_frozen(model: nn.Module) -> str:
    """A digest of the first 64 numbers of each frozen parameter, except those that an adapter may change (PiSSA)."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and not parameter.is_meta and ".base_layer." not in name:
            digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def describe_data(data: Any) -> str:
    """The size of `data`, and a digest of all lengths and of tokens and masks of up to 64 pairs; or "a stream"."""
    if data is None or not hasattr(data, "__len__"):
        return STREAM
    digest = [repr(np.asarray(data["length"]).tolist())]
    for i in range(0, len(data), max(len(data) // 64, 1)):
        row = data[i]
        names = ("chosen_input_ids", "rejected_input_ids", *(mask for mask in MASKS if mask in row))
        digest.append(repr(tuple(list(row[name] or ()) for name in names)))
    return f"{len(data):,} pairs ({_digest(''.join(digest).encode())})"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
