"""The weight behind a head: the module that PEFT trains in its place, and a LoRA on it added in.

Letters: D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def trained_copy(head: nn.Module) -> nn.Module:
    """The module that computes, where PEFT's ``modules_to_save`` has wrapped the head."""
    copies = getattr(head, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return head
    active = head.active_adapters if hasattr(head, "active_adapters") else [head.active_adapter]
    return copies[active[0]]


def effective_weight(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight (V, D), bias (V,) or None) of a head, with a LoRA on it added in.

    Raises:
        ValueError: there is no such weight: a quantized head, a head of another kind, or an adapter that is not a plain
            low-rank product.
    """
    if hasattr(head, "base_layer"):
        return _lora_weight(head)
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        found = f"{weight.dtype}, {tuple(weight.shape)}" if isinstance(weight, Tensor) else "none"
        raise ValueError(
            f"the output embeddings are a {type(head).__name__} without a floating-point (V, D) weight ({found}); "
            "load the model with its head unquantized"
        )
    return weight, bias


def _lora_weight(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = effective_weight(head.base_layer)
    if not hasattr(head, "lora_A") or not hasattr(head, "get_delta_weight"):
        raise ValueError(
            f"the adapter on the output embeddings is a {type(head).__name__}, which the fused loss cannot follow; "
            'train the head whole with modules_to_save=["lm_head"], or leave it out of the adapter'
        )
    if head.disable_adapters or head.merged:
        return weight, bias
    for adapter in head.active_adapters:
        if adapter not in head.lora_A:
            continue
        if getattr(head, "lora_variant", {}).get(adapter) is not None or getattr(head, "use_dora", {}).get(adapter):
            raise ValueError(
                "DoRA and other variants of LoRA on the output embeddings are not supported; use plain LoRA"
            )
        dropout = getattr(head.lora_dropout[adapter], "p", 0.0)
        if head.training and dropout > 0:
            raise ValueError(
                f"lora_dropout is {dropout} on the output embeddings, where the fused loss cannot apply it: "
                "set it to 0, or keep disable_dropout=True"
            )
        # Under no_grad the sum would look like a frozen head, and evaluation would not take training's way.
        with torch.enable_grad():
            weight = weight + head.get_delta_weight(adapter).to(weight.dtype)
    return weight, bias
