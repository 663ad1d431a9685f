"""The weight behind a head: also PEFT's trained copy of it, or a LoRA on it as more columns.

Letters: D hidden size, V vocabulary, r the rank of the LoRAs on the head, all of them together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orpo.loss.own_part import is_dtensor


def trained_copy(head: nn.Module) -> nn.Module:
    """`head`, or the copy that PEFT's ``modules_to_save`` trains in its place."""
    copies = getattr(head, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return head
    active = head.active_adapters if hasattr(head, "active_adapters") else [head.active_adapter]
    return copies[active[0]]


def head_weight(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight (V, D), bias (V,) or None) of a head, without a LoRA on it.

    Raises:
        ValueError: there is no such weight: a quantized head, a head of another kind, or an adapter that is not a plain
            low-rank product.
    """
    if hasattr(head, "base_layer"):
        _check_lora(head)
        return head_weight(head.base_layer)
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    # Where ZeRO-3 has cut the weight up, it looks empty until the head is called.
    shape = getattr(weight, "ds_shape", getattr(weight, "shape", ()))
    if not isinstance(weight, Tensor) or len(shape) != 2 or not weight.is_floating_point():
        found = f"{weight.dtype}, {tuple(weight.shape)}" if isinstance(weight, Tensor) else "none"
        raise ValueError(
            f"the output embeddings are a {type(head).__name__} without a floating-point (V, D) weight ({found}); "
            "load the model with its head unquantized"
        )
    return weight, bias


def head_operands(head: nn.Module, hidden: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(hidden states (..., D + r), weight (V, D + r), bias) whose product is the head's logits, a LoRA on it included.

    `added` (V,), what the model adds to the logits, becomes part of the bias.

    x W^T + s (x A^T) B^T = [x, s x A^T] [W, B]^T. A sum W + s B A in bfloat16 would round a small B A away: the loss
    would not see the adapter that its gradient trains.

    Raises:
        ValueError: as :func:`head_weight`, or a LoRA on a head that is cut over ranks.
    """
    weight, bias = head_weight(head)
    if added is not None:
        bias = added if bias is None else bias + added
    lows, highs = [hidden], [weight]
    for adapter in _active_loras(head):
        down = head.lora_A[adapter]
        low = down(head.lora_dropout[adapter](hidden.to(down.weight.dtype))) * head.scaling[adapter]
        lows.append(low.to(hidden.dtype))
        highs.append(head.lora_B[adapter].weight.to(weight.dtype))
    if len(highs) == 1:
        return hidden, weight, bias
    if is_dtensor(weight):
        raise ValueError(
            "the output embeddings have a LoRA and are cut over ranks: each would train its own part of lora_B alone. "
            "Leave the head out of target_modules, or cut lora_B's rows like the weight's and pass both to "
            "orpo_loss(tp_group=)"
        )
    # Under no_grad the weight would look frozen, and evaluation would compute otherwise than training.
    with torch.enable_grad():
        weight = torch.cat(highs, 1)
    return torch.cat(lows, -1), weight, bias


def _active_loras(head: nn.Module) -> list[str]:
    if not hasattr(head, "base_layer") or head.disable_adapters or head.merged:
        return []
    return [adapter for adapter in head.active_adapters if adapter in head.lora_A]


def _check_lora(head: nn.Module) -> None:
    if not hasattr(head, "lora_A") or not hasattr(head, "get_delta_weight"):
        raise ValueError(
            f"the adapter on the output embeddings is a {type(head).__name__}, which the fused loss cannot follow; "
            'train the head whole with modules_to_save=["lm_head"], or leave it out of the adapter'
        )
    for adapter in _active_loras(head):
        if getattr(head, "lora_variant", {}).get(adapter) is not None or getattr(head, "use_dora", {}).get(adapter):
            raise ValueError(
                "DoRA and other variants of LoRA on the output embeddings are not supported; use plain LoRA"
            )
        if head.lora_B[adapter].bias is not None:
            raise ValueError("lora_bias on the output embeddings is not supported; set it to False")
