"""Settings of transformers' that it takes whatever their value: some fail much later, others do nothing, or harm."""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import fields
from typing import Any

from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType

# Least value, and the bound that it has to stay below.
RANGES = {
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "eval_accumulation_steps": (1, math.inf),
    # numpy takes no other.
    "seed": (0, 2**32),
    "data_seed": (0, 2**32),
    "learning_rate": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "weight_decay": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "neftune_noise_alpha": (0, math.inf),
    "logging_steps": (0, math.inf),
    "save_steps": (0, math.inf),
    "eval_steps": (0, math.inf),
    "eval_delay": (0, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "dataset_num_proc": (1, math.inf),
    "beta": (0, math.inf),
    "nll_weight": (0, math.inf),
    "logits_budget": (0, math.inf),
    "strip_bytes": (1, math.inf),
}

# What `no`, `off` and an empty value of a YAML file come as.
_NONE = (False, None, "off", "none", "None", "No")


def name_nothing(args: Any) -> None:
    """Gives what is switched off, strategies and trackers, or on, FSDP, the word that transformers has for it."""
    if args.fsdp in ("true", "True"):
        # On a command line it comes as text, and transformers looks for a strategy of that name.
        args.fsdp = True
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) in _NONE:
            setattr(args, name, "no")
    if args.report_to in (*_NONE, "no"):
        args.report_to = "none"


def check_ranges(args: Any) -> None:
    """Refuses numbers out of their range, and mappings that are none.

    Raises:
        ValueError: with the setting, its value, and what it has to be.
    """
    for name, (least, bound) in RANGES.items():
        value = getattr(args, name)
        # Written so that NaN is refused too.
        if value is not None and not least <= value < bound:
            rest = ", and finite" if bound == math.inf else f", and below {bound}"
            raise ValueError(f"{name} is {value}; it has to be {least} or more{rest}")
    if args.max_steps <= 0 and not 0 <= args.num_train_epochs < math.inf:
        raise ValueError(
            f"num_train_epochs is {args.num_train_epochs}; it has to be 0 or more, and finite, "
            "unless max_steps is given"
        )
    if args.save_steps == 0 and args.save_strategy == "steps":
        raise ValueError("save_steps is 0; to save no checkpoint, set save_strategy to no")
    given = {name: _mapping(name, getattr(args, name)) for name in args._VALID_DICT_FIELDS}
    _refuse_unknown("accelerator_config", given, [field.name for field in fields(AcceleratorConfig)])
    schedule = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(args.lr_scheduler_type)])
    own = ("optimizer", "num_warmup_steps", "num_training_steps")
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in schedule.parameters.values()):
        _refuse_unknown("lr_scheduler_kwargs", given, [name for name in schedule.parameters if name not in own])


# Those that may also name a file.
_FILES = ("accelerator_config", "deepspeed", "fsdp_config")


def _mapping(name: str, value: Any) -> dict[str, Any] | None:
    """The mapping that `value` is or that its JSON holds; None where it names a file, or is something else."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        return None
    if not value.startswith("{"):
        if name in _FILES:
            return None
        raise ValueError(f"{name} is {value!r}; it has to be a mapping, on the command line as JSON")
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is no JSON: {error}; it is {value!r}") from error


def _refuse_unknown(name: str, given: dict[str, dict[str, Any] | None], known: list[str]) -> None:
    if unknown := sorted(set(given[name] or ()) - set(known)):
        raise ValueError(f"{name} holds {', '.join(unknown)}; it may hold {', '.join(known) or 'nothing'}")
