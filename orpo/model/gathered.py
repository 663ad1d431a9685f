"""Weights that ZeRO-3 has cut up while the model was loaded, gathered where they are read before training.

DeepSpeed's engine gathers the weights of each module that is called, the head's under the fused loss among them, from
the moment that it is made, which is when training begins. What is tried before that has to gather them itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


def is_cut(parameter: nn.Parameter) -> bool:
    """Whether this process has a part of `parameter` alone, beside which it looks empty."""
    return hasattr(parameter, "ds_id") and parameter.numel() == 0


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of `parameter`, also where ZeRO-3 has cut it up."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """In the block, a module of `model` whose weights are cut up has them whole while it is called, and its own alone.

    A model of which one layer at a time fits beside its parts can be tried so. All ranks have to call the same modules
    in the same order. A model that is not cut up is left alone.
    """
    if not any(is_cut(parameter) for parameter in model.parameters()):
        yield
        return
    import deepspeed

    open_blocks: list[tuple[nn.Module, ExitStack]] = []

    def before(module: nn.Module, *_: Any) -> None:
        # A weight that an outer module has gathered stays whole until that one has ended.
        own = [parameter for parameter in module.parameters(recurse=False) if is_cut(parameter)]
        stack = ExitStack()
        if own:
            stack.enter_context(deepspeed.zero.GatheredParameters(own))
        open_blocks.append((module, stack))

    def after(module: nn.Module, *_: Any) -> None:
        entered, stack = open_blocks.pop()
        if entered is not module:
            raise RuntimeError(f"{type(module).__name__} has ended, and {type(entered).__name__} began last")
        stack.close()

    with ExitStack() as hooks:
        for module in model.modules():
            if next(module.parameters(recurse=False), None) is not None:
                hooks.callback(module.register_forward_pre_hook(before, prepend=True).remove)
                # Also after an error, which the probe takes for an answer: weights left whole would stay in memory.
                hooks.callback(module.register_forward_hook(after, always_call=True).remove)
        yield
