"""Adapters by name: which base model each belongs to, and the two loaded together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

from orpo.hub import check_hub_name
from orpo.packages import require
from orpo.setup import load_model

WEIGHTS = "adapter_model.safetensors"
_OF_THE_HUB = ("revision", "cache_dir", "token")


def adapter_config(name: str, **options: Any) -> Any:
    """The configuration of the adapter called `name`, a folder or a name on the hub; None where it is no adapter.

    Args:
        name: as ``from_pretrained`` takes it.
        options: of ``from_pretrained``; its ``revision``, ``cache_dir`` and ``token`` are used.

    Raises:
        ImportError: it is an adapter, and peft is not installed.
        ValueError: it is no folder, and the hub cannot be reached.
    """
    hub = {key: options[key] for key in _OF_THE_HUB if options.get(key) is not None}
    if not Path(name).is_dir():
        if name.startswith((".", "/", "~")):
            return None
        check_hub_name(name, cache_dir=options.get("cache_dir"))
    if find_adapter_config_file(name, **hub) is None:
        return None
    require("peft", f"the adapter in {name}")
    import peft

    return peft.PeftConfig.from_pretrained(name, **hub)


def load_adapter(name: str, config: Any, *, trainable: bool = False, prepare: Any = None, **options: Any) -> Any:
    """The adapter called `name` around its base model, as a ``peft.PeftModel``.

    Args:
        name: a folder, or a name on the hub.
        config: what :func:`adapter_config` gives for it. Name and revision of the base model stand there.
        trainable: whether its weights are to be trained further.
        prepare: called with the base model before the adapter is put around it.
        options: of :func:`orpo.setup.load_model`, for the base model; ``revision`` is that of the adapter.

    Raises:
        ValueError: the base model is not where the adapter says, or cannot be loaded; a note names the adapter.
    """
    import peft

    hub = {key: options[key] for key in _OF_THE_HUB if options.get(key) is not None}
    try:
        if not config.base_model_name_or_path:
            raise ValueError(f"{name} is an adapter that does not name its base model")
        model = load_model(config.base_model_name_or_path, **{**options, "revision": config.revision})
    except (ValueError, OSError) as error:
        error.add_note(f"adapter_config.json of {name} names this base model (base_model_name_or_path)")
        raise
    _resize_as_saved(model, name, config)
    if prepare is not None:
        model = prepare(model)
    return peft.PeftModel.from_pretrained(model, name, is_trainable=trainable, config=config, **hub)


def trained_tokens(config: Any) -> list[int]:
    """Ids of the tokens whose embeddings the adapter trains one by one (``trainable_token_indices``)."""
    given = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    return sorted({i for ids in (given.values() if isinstance(given, dict) else [given]) for i in ids})


def _resize_as_saved(model: nn.Module, name: str, config: Any) -> None:
    """Gives `model` the embeddings that the adapter was trained with, where tokens had been added.

    The rows themselves come with the adapter, which holds the embeddings whole in that case, or those rows.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    needed = [max(trained_tokens(config), default=0) + 1]
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [path for path, module in model.named_modules() if any(module is part for part in parts)]
    if Path(name, WEIGHTS).is_file():
        with safe_open(Path(name, WEIGHTS), "pt") as file:
            whole = [key for path in names for key in file.keys() if key.endswith(f".{path}.weight")]  # noqa: SIM118
            needed += [file.get_slice(key).get_shape()[0] for key in whole]
    if max(needed) > rows:
        model.resize_token_embeddings(max(needed), mean_resizing=False)
