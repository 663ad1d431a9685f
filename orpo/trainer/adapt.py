"""What a run changes of its model before the first step: an adapter, 4-bit layers, dropout, the padding token."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
from orpo_kernels.cpu import logits as cpu_logits
from torch import nn

from orpo.model.attach import attach_orpo_loss, base_model, embeddings
from orpo.model.encoder_decoder import is_encoder_decoder
from orpo.model.packed import keep_trainable
from orpo.packages import require
from orpo.trainer.config import ORPOConfig
from orpo.trainer.tensor_parallel import check_cut
from orpo.trainer.zero3 import refuse_model

# peft's name for the task of an encoder-decoder.
SEQ_2_SEQ = "SEQ_2_SEQ_LM"


def pad_token_id(args: ORPOConfig, tokenizer: Any, model: nn.Module | None = None) -> int:
    """The id that fills up a batch: any that `model` embeds, since it is masked and has no row in the loss.

    Raises:
        ValueError: `model` has no embedding for ``padding_value``.
    """
    # A pad token that only the tokenizer knows has no embedding: on a GPU its lookup ends the process.
    known = math.inf if model is None else embeddings(model)
    if args.padding_value is not None and not 0 <= args.padding_value < known:
        raise ValueError(f"padding_value is {args.padding_value}, and the model has {known} embeddings")
    for value in (args.padding_value, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None and value < known:
            return value
    return 0


def adapt(model: nn.Module, args: ORPOConfig, peft_config: Any) -> nn.Module:
    """`model` as it is trained: with its adapter, without dropout, its head computing the loss.

    Raises:
        ValueError: as :func:`wrap_peft`, :func:`orpo.trainer.tensor_parallel.check_cut`,
            :func:`orpo.trainer.zero3.refuse_model` and :func:`orpo.model.attach.attach_orpo_loss`.
    """
    check_cut(model, args)
    refuse_model(args, model)
    model = wrap_peft(model, args, peft_config) if peft_config is not None else model
    if args.disable_dropout:
        disable_dropout(model)
    warn_of_emulation(model, args)
    # Before attaching, which runs the model without a gradient.
    keep_trainable(model)
    attach_orpo_loss(model)
    return model


def wrap_peft(model: nn.Module, args: ORPOConfig, peft_config: Any) -> nn.Module:
    """`model` with the adapter of `peft_config` around it.

    Raises:
        ImportError: peft is not installed.
        ValueError: `peft_config` is none, or the model has an adapter already.
    """
    require("peft", "peft_config")
    import peft

    if not isinstance(peft_config, peft.PeftConfig):
        raise ValueError(f"peft_config has to be a peft.PeftConfig, not {type(peft_config).__name__}")
    if isinstance(model, peft.PeftModel):
        raise ValueError("the model has an adapter already: merge it first, or leave out peft_config")
    if is_encoder_decoder(model) and peft_config.task_type is None:
        # What is saved is loaded by this task type. A copy: the user may need the configuration for another model.
        peft_config = copy.copy(peft_config)
        peft_config.task_type = SEQ_2_SEQ
    model = prepare_quantized(model, args)
    _warn_of_names(model, peft_config)
    # Nothing has set the seed yet, and the adapter's first weights are random.
    torch.manual_seed(args.seed)
    try:
        # Without a revision the adapter names the newest one as its base: merging would add it to another model.
        return peft.get_peft_model(model, peft_config, revision=(args.model_init_kwargs or {}).get("revision"))
    except ValueError as error:
        if "target" in str(error).lower():
            linear = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
            error.add_note(f"--lora_target_modules takes all-linear, or some of {', '.join(sorted(linear))}")
        raise


def _warn_of_names(model: nn.Module, peft_config: Any) -> None:
    """Warns of names in a list that no module has: peft ignores them, as long as it finds one of the list."""
    for option in ("target_modules", "modules_to_save"):
        names = getattr(peft_config, option, None) or ()
        modules = [f".{name}" for name, _ in model.named_modules()]
        absent = [name for name in names if not any(module.endswith(f".{name}") for module in modules)]
        if absent and not isinstance(names, str):
            warnings.warn(
                f"{option} names {', '.join(sorted(absent))}, and the model has no such module: it is left out",
                stacklevel=2,
            )


def prepare_quantized(model: nn.Module, args: ORPOConfig) -> nn.Module:
    """Prepares a model of 4 or 8 bits for an adapter, with float32 norms; any other model stays as it is."""
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return model
    import peft

    return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing)


def warn_of_emulation(model: nn.Module, args: ORPOConfig) -> None:
    """Warns if the model's layers compute in bfloat16, and the CPU would emulate it."""
    if args.device.type != "cpu" or cpu_logits.multiplies_bfloat16():
        return
    if args.bf16 or any(p.dtype == torch.bfloat16 for p in model.parameters()):
        warnings.warn(
            "this CPU has no instructions for bfloat16, which torch emulates: on an AVX2 CPU a model's layers took 6 "
            "to 100 times as long as in float32. Set dtype float32, and leave out bf16; the loss itself computes in "
            "float32 here",
            stacklevel=2,
        )


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0: of ``nn.Dropout``, and where modules hold one as a number.

    OPT, BioGPT and others call ``torch.nn.functional.dropout`` with ``self.dropout``, and skip layers by ``layerdrop``.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def router_coefficient(model: nn.Module) -> float:
    """The weight of the router's load-balancing loss in a mixture of experts; 0 where the config has none."""
    config = base_model(model).config.get_text_config()
    # JetMoE has its own name for it, and DBRX an inner configuration.
    names = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
    found = (getattr(place, name, None) for place in (config, getattr(config, "ffn_config", None)) for name in names)
    return next((value for value in found if value is not None), 0.0)
