"""Weights of 4 bits on a CPU, kept as they train.

Where the CPU multiplies bfloat16 (AVX512), bitsandbytes packs the weight of a 4-bit layer anew at its first forward
without a gradient, as an evaluation has it, for a kernel that has no backward and is used ever after: gradients of what
lies before the layer would be lost without a word.
"""

from __future__ import annotations

from torch import nn

# Where a layer of bitsandbytes notes that it may pack its weight anew.
_MAY_PACK = "support_avx512bf16_for_cpu"


def keep_trainable(model: nn.Module) -> None:
    """Keeps the 4-bit layers of `model` from packing their weights for a kernel without a backward.

    Raises:
        ValueError: a layer's weight is packed so already, by a forward before this call.
    """
    for name, module in model.named_modules():
        if not hasattr(module, _MAY_PACK):
            continue
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{name} has its 4-bit weight packed for a kernel without a backward, since the model has run without "
                "a gradient before: load it anew for training"
            )
        setattr(module, _MAY_PACK, False)
