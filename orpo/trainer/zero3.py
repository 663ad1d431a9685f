"""What a run under DeepSpeed's ZeRO-3 cannot do, or what nobody has tried: refused before anything is loaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from orpo.model.encoder_decoder import is_encoder_decoder

_REMEDY = "use ZeRO-2 (orpo-train --print-config zero2) or FSDP2 (orpo-train --print-config fsdp2)"
# By these names configurations of transformers tell of several experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# ZeRO++, by its settings.
_PLUS = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")


def is_zero_3(args: Any) -> bool:
    """Whether the run of the settings `args` cuts weights up by DeepSpeed."""
    return getattr(args.deepspeed_plugin, "zero_stage", 0) == 3


def refuse_settings(args: Any, peft_config: Any, makes_model: bool) -> None:
    """Refuses settings that ZeRO-3 does not go with; other runs pass.

    Args:
        args: the settings.
        peft_config: of an adapter, or None.
        makes_model: whether ``model_init`` will make the model.

    Raises:
        ValueError: with what to set.
    """
    if not is_zero_3(args):
        return
    if peft_config is not None:
        raise ValueError(f"ZeRO-3 with an adapter (use_peft, peft_config) is not supported: {_REMEDY}")
    if (args.model_init_kwargs or {}).get("quantization_config") is not None:
        raise ValueError(f"ZeRO-3 with a quantized model (load_in_4bit, load_in_8bit) is not supported: {_REMEDY}")
    if makes_model:
        raise ValueError("ZeRO-3 with model_init is not supported: give the model's name as model")
    if args.diagnose:
        raise ValueError("ZeRO-3 cuts up the gradients, whose norms diagnose logs: use it on one GPU or DDP")
    for name in ("generate_during_eval", "load_best_model_at_end", "auto_find_batch_size"):
        if getattr(args, name):
            raise ValueError(f"ZeRO-3 with {name} is not supported: leave it out, or {_REMEDY}")
    config = args.deepspeed_plugin.hf_ds_config
    for name in ("offload_param", "offload_optimizer"):
        device = config.get_value(f"zero_optimization.{name}.device")
        if device not in (None, "none"):
            raise ValueError(
                f"ZeRO-3 with {name} (device {device}) is not supported: set device none, or use FSDP2 with "
                "fsdp_offload_params"
            )
    asked = [name for name in _PLUS if config.get_value(f"zero_optimization.{name}")]
    if asked or (config.get_value("zero_optimization.zero_hpz_partition_size") or 1) > 1:
        raise ValueError(
            f"ZeRO++ ({', '.join(asked) or 'zero_hpz_partition_size'}) is not supported: leave it out of the settings "
            "of DeepSpeed"
        )
    if not config.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            "ZeRO-3 would save parts of the weights alone, which no from_pretrained reads: set "
            "stage3_gather_16bit_weights_on_model_save true beside stage 3 in zero_optimization "
            "(zero3_save_16bit_model in a file of accelerate, as orpo-train --print-config zero3 has it)"
        )


def refuse_model(args: Any, model: nn.Module) -> None:
    """Refuses a model that a run under ZeRO-3 does not take; models of other runs pass.

    Raises:
        ValueError: with what to use instead.
    """
    if not is_zero_3(args):
        return
    name = type(model).__name__
    if hasattr(model, "peft_config"):
        raise ValueError(f"ZeRO-3 with an adapter ({name}) is not supported: {_REMEDY}")
    if getattr(model, "is_quantized", False):
        raise ValueError(f"ZeRO-3 with a quantized model ({name}) is not supported: {_REMEDY}")
    if is_encoder_decoder(model):
        raise ValueError(f"ZeRO-3 with an encoder-decoder ({name}) is not supported: {_REMEDY}")
    config = model.config.get_text_config() if hasattr(model, "config") else None
    if any((getattr(config, key, None) or 0) > 1 for key in _EXPERTS):
        raise ValueError(f"ZeRO-3 with a mixture of experts ({name}) is not supported: {_REMEDY}")
    if not all(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"ZeRO-3 with a model of which a part is frozen ({name}) is not supported: {_REMEDY}")
