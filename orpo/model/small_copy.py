"""The first layers of a model, read from its own files: small enough to try a step of it within seconds."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from orpo.hub import hub_options
from orpo.model.few_layers import few_layers
from orpo.model.load import check_model, load_model


def load_small_copy(name: str, *, trust_remote_code: bool = False, **options: Any) -> tuple[PreTrainedModel, str]:
    """The model `name` with its first layers alone, as many as have one of each kind; whole where they are not found.

    The weights of the other layers are not read.

    Args:
        name: a folder or a name on the hub.
        trust_remote_code: run Python code that comes with it.
        options: of ``from_pretrained``.

    Returns:
        (the model, how much of it that is in words)

    Raises:
        ImportError, ValueError: as :func:`orpo.model.load.load_model`.
    """
    auto, kwargs = check_model(name, trust_remote_code=trust_remote_code, **options)
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **hub_options(kwargs))
    with torch.device("meta"):
        empty = auto.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    with few_layers(empty) as kept:
        pass
    if not kept:
        return load_model(name, trust_remote_code=trust_remote_code, **options), "the whole model"
    text = config.get_text_config()
    count = text.num_hidden_layers
    for setting, value in vars(text).items():
        # Lists with an entry for each layer, such as layer_types.
        if isinstance(value, list) and len(value) == count:
            setattr(text, setting, value[:kept])
    text.num_hidden_layers = kept
    # Each weight that is left out would be reported.
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model = load_model(name, trust_remote_code=trust_remote_code, config=config, **options)
    finally:
        logging.set_verbosity(before)
    return model, f"{kept} of {count} layers"
