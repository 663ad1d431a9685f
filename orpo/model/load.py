"""What happens to a model before it is trained: loading, adapters, dropout."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from orpo.hub import check_hub_name, hub_options


@contextmanager
def reading(name: str | Path, *, runs_code: bool = False) -> Iterator[None]:
    """Names the files of the model `name` in errors of the libraries that read them.

    Args:
        name: a folder, or a name on the hub.
        runs_code: whether code that comes with the model runs too; its errors are left as they are.

    Raises:
        ValueError: a file is broken; a JSON file is named.
    """
    try:
        yield
    except Exception as error:
        # These errors name what they read. A broken file gives KeyError, TypeError, Exception itself and others.
        if isinstance(error, OSError | ImportError | torch.OutOfMemoryError) or type(error) is ValueError:
            raise
        reason = _broken_json(Path(name))
        if reason is None and runs_code:
            raise
        reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"{name} cannot be loaded: {reason}") from error


def _broken_json(folder: Path) -> str | None:
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_bytes())
        except ValueError as error:
            return f"{file.name} is no JSON: {error}"
    return None


def load_model(name: str, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """The language model `name`, a folder or a name on the hub; it may also read images, or have an encoder.

    Weights are read from safetensors unless `options`, the arguments of ``from_pretrained``, say otherwise, since a
    pickle can run code when it is loaded.

    Raises:
        ImportError: FlashAttention is asked for and not installed.
        ValueError: there is no such folder, the hub cannot be reached, the model has no language-modeling head, or
            ``dtype`` names no torch dtype.
    """
    auto, kwargs = check_model(name, trust_remote_code=trust_remote_code, **options)
    try:
        with reading(name, runs_code=trust_remote_code):
            model, loaded = auto.from_pretrained(name, **kwargs, output_loading_info=True)
    except ImportError as error:
        if "flash" in str(error).lower():
            error.add_note("without FlashAttention: attn_implementation sdpa")
        raise
    _refuse_random_head(name, model, loaded["missing_keys"], auto.__name__)
    return model


def check_model(name: str, *, trust_remote_code: bool = False, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Refuses the model `name` before its weights are read, if possible. Returns (Auto class, its arguments).

    Raises:
        ValueError: as :func:`load_model`, except for what only the weights show.
    """
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise ValueError(f"there is no folder {name} to load a model from")
    shards = Path(name) / f"{FSDP_MODEL_NAME}_0"
    if shards.is_dir() and not Path(name, CONFIG_NAME).exists():
        raise ValueError(
            f"{name} is a checkpoint in shards, for a run to go on from: accelerate merge-weights {shards} FOLDER puts "
            "the weights together; copy config.json and the tokenizer there from the model that the run began with"
        )
    kwargs = {"trust_remote_code": trust_remote_code, "use_safetensors": True, **options}
    if "dtype" in kwargs:
        kwargs["dtype"] = find_dtype(kwargs["dtype"])
    check_hub_name(name, cache_dir=options.get("cache_dir"))
    with reading(name, runs_code=trust_remote_code):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **hub_options(kwargs))
    if config.is_encoder_decoder:
        # The decoder of some models, such as BART, is a causal language model by itself too.
        if type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
            raise ValueError(f"{name} is a {config.model_type} model, an encoder-decoder that does not read text")
        return AutoModelForSeq2SeqLM, kwargs
    auto = AutoModelForCausalLM
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        auto = AutoModelForImageTextToText
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        raise ValueError(f"{name} is a {config.model_type} model, which has no language-modeling head to train with")
    return auto, kwargs


def find_dtype(dtype: Any) -> Any:
    """The torch dtype called `dtype`; "auto", None and torch dtypes are returned as they are.

    Raises:
        ValueError: torch has no dtype of that name, or weights cannot have it.
    """
    if not isinstance(dtype, str) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; it has to be 'auto' or a torch dtype of floating-point numbers")
    return found


def find_device(name: str | None) -> torch.device:
    """The device called `name`; for None an accelerator if there is one, or else the CPU.

    Raises:
        ValueError: torch knows no such device, or finds none here.
    """
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return here or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}, which torch does not know: cpu, cuda, cuda:1, ...") from error
    if device.type == "cpu":
        return device
    if here is None or device.type != here.type or (device.index or 0) >= torch.accelerator.device_count():
        there = "the CPU" if here is None else f"the CPU and {torch.accelerator.device_count()} {here.type}"
        raise ValueError(f"device is {name!r}, and torch finds {there} here: leave it out, or name one of them")
    return device


def _refuse_random_head(name: str, model: PreTrainedModel, missing: Collection[str], auto: str) -> None:
    """Refuses a checkpoint without a head: transformers only warns, and makes a random one."""
    heads = [path for path, module in model.named_modules() if module is model.get_output_embeddings()]
    if any(f"{head}.weight" in missing for head in heads):
        raise ValueError(
            f"{name} holds a model without its head ({heads[0]}), which would be trained from random weights: "
            f"give a checkpoint saved from {auto}"
        )


def load_tokenizer(name: str, *, trust_remote_code: bool = False, **hub: Any) -> Any:
    """The tokenizer of the model `name`; for an adapter without one, its base model's.

    Args:
        name: a folder, or a name on the hub.
        trust_remote_code: run Python code that comes with it.
        hub: as :func:`orpo.hub.hub_options` gives them.

    Raises:
        ValueError: `name` is empty, a folder without a tokenizer, or neither a folder nor found on the hub.
    """
    if not name:
        raise ValueError("processing_class is not given, and the model has no name to find its tokenizer by")
    if Path(name).is_dir() and not list(Path(name).glob("*token*")):
        adapter = Path(name, ADAPTER_CONFIG_NAME)
        if adapter.is_file():
            base = json.loads(adapter.read_text(encoding="utf-8"))
            options = {"trust_remote_code": trust_remote_code, **hub, "revision": base.get("revision")}
            return load_tokenizer(base.get("base_model_name_or_path") or "", **options)
        raise ValueError(f"{name} holds a model without its tokenizer: save it there with tokenizer.save_pretrained")
    check_hub_name(name, cache_dir=hub.get("cache_dir"))
    with reading(name, runs_code=trust_remote_code):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **hub_options(hub))
