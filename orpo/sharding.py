"""What FSDP needs of the trainer: outputs that are not rounded, and one verdict of all ranks on the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


def keep_outputs_exact(accelerator: Accelerator) -> None:
    """Under FSDP2 in mixed precision, leaves the loss and its metrics in float32, and sums gradients in it.

    accelerate's policy casts what the model returns to bfloat16: a loss of 6.1754 would be logged as 6.1719.
    """
    plugin = fsdp_plugin(accelerator)
    if plugin is None or plugin.fsdp_version < 2 or plugin.mixed_precision_policy is None:
        return
    plugin.mixed_precision_policy = dataclasses.replace(
        plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
    )


def agreed(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """What `function` returns: under FSDP on rank 0, which may be the only one that has weights yet, for all ranks."""
    return function() if fsdp_plugin(accelerator) is None else from_rank_0(accelerator, function)


def from_rank_0(accelerator: Accelerator, function: Callable[[], Any]) -> Any:
    """What `function` returns on rank 0, where alone it is called, for all ranks.

    Its error is raised on all of them too. The others would wait for an answer that never comes.
    """
    if accelerator.num_processes == 1:
        return function()
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = function()
        except Exception as error:
            answer[1] = error
    result, error = broadcast_object_list(answer)
    if error is not None:
        raise error
    return result


def fsdp_plugin(accelerator: Accelerator) -> Any:
    """accelerate's settings of FSDP, or None where it is not in use."""
    return getattr(accelerator.state, "fsdp_plugin", None)
