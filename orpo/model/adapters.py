"""Adapters by name: which base model each belongs to, and the two loaded together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn
from transformers.utils import ADAPTER_CONFIG_NAME
from transformers.utils.peft_utils import find_adapter_config_file

from orpo.hub import check_hub_name, hub_options
from orpo.model.load import load_model, reading
from orpo.packages import require

WEIGHTS = "adapter_model.safetensors"


def adapter_folder(name: str, **options: Any) -> Path | None:
    """The folder of the adapter called `name`, which a name on the hub is brought to; None where it is no adapter.

    Args:
        name: a folder, or a name on the hub.
        options: of ``from_pretrained``; its ``revision``, ``cache_dir`` and ``token`` are used.

    Raises:
        ValueError: it is no folder, and the hub cannot be reached.
    """
    if Path(name).is_dir() or name.startswith((".", "/", "~")):
        return Path(name) if Path(name, ADAPTER_CONFIG_NAME).is_file() else None
    check_hub_name(name, cache_dir=options.get("cache_dir"))
    hub = hub_options(options)
    if find_adapter_config_file(name, **hub) is None:
        return None
    return Path(snapshot_download(name, ignore_patterns=["*/*", "*.bin", "*.pt"], **hub))


def read_config(folder: str | Path) -> Any:
    """The ``peft.PeftConfig`` of the adapter in `folder`.

    Raises:
        ImportError: peft is not installed.
        ValueError: it does not name its base model.
    """
    require("peft", f"the adapter in {folder}")
    import peft

    with reading(folder):
        config = peft.PeftConfig.from_pretrained(str(folder))
    if not config.base_model_name_or_path:
        raise ValueError(f"{ADAPTER_CONFIG_NAME} in {folder} does not name the adapter's base model")
    return config


@contextmanager
def naming_base_of(folder: str | Path) -> Iterator[None]:
    """Where the base model of the adapter in `folder` is looked for: errors say who names it."""
    try:
        yield
    except (ValueError, OSError) as error:
        error.add_note(f"{ADAPTER_CONFIG_NAME} in {folder} names this base model (base_model_name_or_path)")
        raise


def load_adapter(
    folder: str | Path, *, trainable: bool = False, prepare: Callable[[Any], Any] | None = None, **options: Any
) -> Any:
    """The adapter in `folder` around the base model that it names, as a ``peft.PeftModel``.

    Args:
        trainable: whether its weights are to be trained further.
        prepare: called with the base model before the adapter is put around it; gives the model to put it around.
        options: of :func:`orpo.model.load.load_model`, but ``revision``, which the adapter names too.

    Raises:
        ImportError: peft is not installed.
        ValueError: the base model is not where the adapter says, or cannot be loaded; a note names the adapter.
    """
    config = read_config(folder)
    import peft

    with naming_base_of(folder):
        model = load_model(config.base_model_name_or_path, **{**options, "revision": config.revision})
    _resize_as_saved(model, folder, config)
    if prepare is not None:
        model = prepare(model)
    with reading(folder):
        return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, config=config)


def trained_tokens(config: Any) -> list[int]:
    """Ids of the tokens whose embeddings the adapter trains one by one (``trainable_token_indices``)."""
    given = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    return sorted({i for ids in (given.values() if isinstance(given, dict) else [given]) for i in ids})


def _resize_as_saved(model: nn.Module, folder: str | Path, config: Any) -> None:
    """Gives `model` the embeddings that the adapter was trained with, where tokens had been added.

    The rows themselves come with the adapter, which holds the embeddings whole in that case, or those rows.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    needed = [max(trained_tokens(config), default=0) + 1]
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [path for path, module in model.named_modules() if any(module is part for part in parts)]
    if Path(folder, WEIGHTS).is_file():
        with reading(folder), safe_open(Path(folder, WEIGHTS), "pt") as file:
            whole = [key for path in names for key in file.keys() if key.endswith(f".{path}.weight")]
            needed += [file.get_slice(key).get_shape()[0] for key in whole]
    if max(needed) > rows:
        model.resize_token_embeddings(max(needed), mean_resizing=False)
