"""A model cut to its first layers, as many as have one of each kind: enough to show a mistake that any layer makes.

A window of 4,096 tokens takes a whole model of 7B minutes on a CPU, where FSDP has the weights until training begins,
while the other ranks wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def few_layers(base: Any) -> Iterator[int]:
    """Cuts `base`, a model of transformers, in the block; gives how many layers stay, 0 where they are not found."""
    config = base.config.get_text_config()
    count = getattr(config, "num_hidden_layers", 0)
    places = [
        (module, name)
        for module in base.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(places) != 1:
        yield 0
        return
    module, name = places[0]
    layers = getattr(module, name)
    types = getattr(config, "layer_types", None) or [None] * count
    kinds = [(kind, _settings(layer)) for kind, layer in zip(types, layers, strict=True)]
    setattr(module, name, layers[: 1 + max(kinds.index(kind) for kind in kinds)])
    try:
        yield len(getattr(module, name))
    finally:
        setattr(module, name, layers)


def _settings(layer: nn.Module) -> list[Any]:
    """What tells a layer from others: the types in it, and the numbers and words that they hold, but for its place."""
    plain = (bool, int, float, str, type(None))
    return [
        (type(part), {n: v for n, v in vars(part).items() if isinstance(v, plain) and not n.startswith("layer_i")})
        for part in layer.modules()
    ]
