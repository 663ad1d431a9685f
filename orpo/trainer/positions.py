"""Refuses sequences longer than a model has positions before training: some step would fail on them."""

from __future__ import annotations

from typing import Any

import pyarrow.compute as pc
from torch import Tensor, nn

from orpo.data.streams import counters
from orpo.model.attach import base_model
from orpo.trainer.config import ORPOConfig


def check_positions(data: Any, model: nn.Module, args: ORPOConfig) -> None:
    """Refuses sequences in `data` that are longer than the table of positions that `model` has.

    A model that computes its positions goes on beyond those that it was trained on; a line says so.

    Args:
        data: prepared, or None. Of a stream only the limits are known.
        model: with or without adapters.
        args: with ``max_length``, or an encoder-decoder's limits of prompt and answer.

    Raises:
        ValueError: the message has the longest sequence, the model's limit, and the ``max_length`` to set.
    """
    if data is None:
        return
    base = base_model(model)
    table = position_table(base)
    most = table or getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return
    limits = _limits(args, in_two=base.config.is_encoder_decoder)
    if hasattr(data, "data"):
        longest = _longest(data, in_two=base.config.is_encoder_decoder)
        what = f"a sequence of {longest:,} tokens"
    else:
        longest = None if None in limits.values() else max(limits.values())
        what = f"{counters(data)[0].name if counters(data) else 'the data'}, a stream, may hold sequences of any length"
        what = what if longest is None else f"a stream with sequences of up to {longest:,} tokens"
    if longest is not None and longest <= most:
        return
    kind = type(base).__name__
    if table:
        beyond = [name for name, limit in limits.items() if limit is None or limit > most] or [*limits]
        raise ValueError(
            f"{' and '.join(f'{name} is {limits[name]}' for name in beyond)}, and there is {what}; {kind} has a table "
            f"of {most:,} positions, and none beyond: set {' and '.join(f'{name} to {most}' for name in beyond)} "
            f"({' '.join(f'--{name} {most}' for name in beyond)})"
        )
    if longest is not None and args.should_log:
        print(
            f"there is {what}, and {kind} was made for {most:,} positions (max_position_embeddings): it computes "
            "positions beyond, which it may never have seen"
        )


def position_table(model: nn.Module) -> int | None:
    """How many positions are in the table of `model`, learned or fixed; None where it computes them."""
    config = model.config.get_text_config()
    if config.model_type == "mpt":
        # ALiBi, with biases for so many tokens.
        return config.max_seq_len
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in leaf or leaf == "wpe") and module.num_embeddings >= most:
            # RoBERTa counts positions from padding_idx + 1.
            return most if module.padding_idx is None else module.num_embeddings - module.padding_idx - 1
        # GPT-J, CodeGen and CTRL make a fixed table of sines and cosines.
        for own in ("embed_positions", "pos_encoding"):
            table = getattr(module, own, None)
            if isinstance(table, Tensor) and len(table) == most:
                return most
    return None


def _limits(args: ORPOConfig, in_two: bool) -> dict[str, int | None]:
    """The settings that bound a sequence; with `in_two`, where an encoder reads the prompts, either part of one."""
    parts = ("max_prompt_length", "max_completion_length") if in_two else ()
    names = [name if getattr(args, name) is not None else "max_length" for name in parts] or ["max_length"]
    return {name: getattr(args, name) for name in names}


def _longest(data: Any, in_two: bool) -> int:
    """Tokens of the longest sequence; with `in_two`, for an encoder-decoder, of the longest prompt or answer."""
    most = 0
    for side in ("chosen", "rejected"):
        sizes = pc.list_value_length(data.data.column(f"{side}_input_ids"))
        prompts = data.data.column(f"{side}_prompt_length")
        parts = [prompts, pc.subtract(sizes, prompts)] if in_two else [sizes]
        most = max([most, *(pc.max(part).as_py() or 0 for part in parts)])
    return most
