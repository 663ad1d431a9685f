"""Encoder-decoders: the encoder reads a prompt once, and the decoder scores both answers with its output.

Letters: P pairs, T tokens of a prompt, U of an answer, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# The buffer (1, V) that BART and its kin add to the output of their head.
_BIAS = "final_logits_bias"


def is_encoder_decoder(model: Any) -> bool:
    """Whether `model`, of transformers or PEFT, has an encoder for the prompt; False for None."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def check_encoder_decoder(model: nn.Module) -> None:
    """Refuses an encoder-decoder that :func:`encode_once` cannot run. Other models pass.

    Raises:
        ValueError: its encoder does not read tokens, it cannot shift labels itself, or it has a router's loss.
    """
    if not is_encoder_decoder(model):
        return
    name, inputs = type(model).__name__, inspect.signature(type(model).forward).parameters
    if "input_ids" not in inputs or not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        raise ValueError(
            f"{name} is an encoder-decoder that does not make its decoder's tokens of labels, or reads something else "
            "than tokens: T5, BART, Pegasus, Marian and their kin can be trained"
        )
    try:
        # Labels of a token that is no padding: mBART moves an answer's last such token to its start.
        last = model.get_input_embeddings().weight.shape[0] - 1
        model.prepare_decoder_input_ids_from_labels(labels=torch.full((1, 2), last, device=model.device))
    except Exception as error:  # Each model raises another error where its config lacks something.
        raise ValueError(
            f"{name} cannot make its decoder's tokens of labels ({error}): set decoder_start_token_id and pad_token_id "
            "in the model's config"
        ) from error
    if getattr(model.config, "output_router_logits", False):
        raise ValueError(
            f"{name} is an encoder-decoder with output_router_logits, whose router's loss is over both answers' "
            "prompts: set it to False in the model's config"
        )


def encode_once(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `model`'s forward after its encoder has run: once for each prompt, for both answers.

    Args:
        model: an encoder-decoder of transformers.
        inputs: ``input_ids`` and ``attention_mask`` (P, T), ``labels`` (2P, U), chosen answers first, -100 behind them.
            Without labels they are returned as they are.

    Returns:
        the same with ``encoder_outputs`` and ``attention_mask`` of 2P rows, and ``decoder_input_ids`` (2P, U).
    """
    labels = inputs.get("labels")
    if labels is None:
        return inputs
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    answers = labels.shape[0] // ids.shape[0]
    encoded = model.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)
    # Repeated here, so that the gradients of both answers add up in the one encoding.
    encoded.last_hidden_state = encoded.last_hidden_state.repeat(answers, 1, 1)
    return inputs | {
        "input_ids": None,
        "labels": None,
        "attention_mask": mask.repeat(answers, 1),
        "encoder_outputs": encoded,
        "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels),
    }


def added_bias(model: nn.Module) -> Tensor | None:
    """(V,), the buffer that `model` adds to the output of its head, or None."""
    bias = getattr(model, "_buffers", {}).get(_BIAS)
    return None if bias is None else bias.flatten()


@contextmanager
def without_bias(model: nn.Module) -> Iterator[None]:
    """Takes :func:`added_bias` out of the model for the block."""
    kept = model._buffers.get(_BIAS)
    if kept is None:
        yield
        return
    model._buffers[_BIAS] = kept.new_zeros(1, 1)
    try:
        yield
    finally:
        model._buffers[_BIAS] = kept
