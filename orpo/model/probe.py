"""Tries a model on a few tokens before training: whether its head is understood, and which layouts it computes right.

A model that looks at the order of tokens in memory (ALiBi, state-space and convolution layers, windows counted in
tokens) would train wrongly, without an error, on answers that share a prompt. No list of names can be complete, so
every answer token of a few pairs is scored in the padded layout, from the model's own logits, and in the layout in
question.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from orpo_kernels.matmul import tf32_allowed
from orpo_kernels.rows import Rows
from orpo_kernels.settings import LossSettings
from torch import Tensor, nn

from orpo.layouts.encoder_decoder import EncoderDecoderLayout
from orpo.layouts.layout import make_layout
from orpo.layouts.prefix_mask import (
    eager_where_flash_cannot_run,
    flash_cannot_run,
    flash_precision,
    layer_windows,
    uses_flash,
)
from orpo.model.attach import LossCall, base_model, embeddings, evaluating, tiny_inputs
from orpo.model.encoder_decoder import is_encoder_decoder
from orpo.model.few_layers import few_layers
from orpo.model.gathered import gathering
from orpo.model.head import head_weight, trained_copy

Layout = Callable[[list[Any]], dict[str, Any]]

_PROMPT, _ANSWER = 12, 8


def choose_layout(name: str, model: nn.Module, *, max_length: int | None = None, **options: Any) -> tuple[Layout, str]:
    """The layout to train `model` with, and one sentence that says why.

    Args:
        name: a layout, or "auto": shared if the model computes it right, else packed with FlashAttention, else padded.
            It is padded too where nothing can be tried: FlashAttention with weights on a CPU.
        model: after :func:`orpo.model.attach.attach_orpo_loss`; its weights are read, none is changed.
        max_length: most tokens of a sequence in training. Windows and chunks longer than any row do not matter.
        options: of the layout (pad_token_id, nll).

    Raises:
        ValueError: `model` computes something else with the layout `name`, or it cannot be tried.
    """
    base = base_model(model)
    if is_encoder_decoder(base):
        refuse_layout(name, type(base).__name__)
        return EncoderDecoderLayout(**options), "layout padded: the encoder reads each prompt once, for both answers"
    padded = make_layout("padded", **options)
    if name == "padded":
        return padded, "layout padded, as asked for"
    flash = uses_flash(base.config)
    wanted = [name] if name != "auto" else ["shared", "packed"] if flash else ["shared"]
    refused: list[str] = []
    obstacle = _obstacle(base)
    for each in wanted:
        layout = make_layout(each, **options, single_row=flash)
        reason = obstacle or _mismatch(model, layout, padded, max_length)
        if reason is None:
            why = f"layout {each}: a few pairs score as in the padded layout" + (
                "" if name == "auto" else ", as asked for"
            )
            return layout, "; ".join([why, *refused])
        refused.append(f"not {each}: {reason}")
        if obstacle:
            break
    if name != "auto":
        raise ValueError(f"layout is {name!r}, which {type(base).__name__} cannot be trained with: {reason}")
    return padded, f"layout padded, {'; '.join(refused)}"


def refuse_layout(name: str, model: str) -> None:
    """Refuses a layout that puts prompt and answers in one row, for the encoder-decoder `model`.

    Raises:
        ValueError: `name` is such a layout.
    """
    if name not in ("auto", "padded"):
        raise ValueError(
            f"layout is {name!r}, and {model} is an encoder-decoder, whose encoder reads each prompt once as it is: "
            "leave layout out"
        )


def _obstacle(base: Any) -> str | None:
    if getattr(base.config, "output_router_logits", False):
        # The router sees each prompt once in shared batches, and no padding in packed ones.
        return "the router's loss is over all tokens, and would change with the layout"
    if flash_cannot_run(base):
        # A trial with other attention would prove nothing: it finds the start of a sequence in another way.
        return "FlashAttention does not run on a CPU, where the weights are now, so that it cannot be tried"
    return None


def _mismatch(model: nn.Module, layout: Layout, padded: Layout, max_length: int | None) -> str | None:
    """What keeps `model` from `layout`, or None."""
    base = base_model(model)
    config = base.config.get_text_config()
    span = _longest_span(config, max_length)
    most = getattr(config, "max_position_embeddings", None)
    if span and most is not None and span + _PROMPT + _ANSWER + 1 > most:
        return f"a window of {span} tokens cannot be tried with a model of {most} positions"
    examples = _examples(embeddings(base), span)
    # Few tokens go through all layers, many through one of each kind.
    cut = few_layers(base) if span else nullcontext()
    with evaluating(base), torch.no_grad(), flash_precision(base), cut, gathering(base):
        expected, tolerance = _answer_logps(model, padded, examples, own_logits=span == 0)
        try:
            found, _ = _answer_logps(model, layout, examples)
        except Exception as error:  # A model may raise anything on inputs it was not made for; it is reported.
            return f"the model refuses it ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    difference = (found - expected).abs().max().item()
    if difference <= tolerance:
        return None
    return f"log-probabilities differ by {difference:.2g} nats from those of the padded layout"


def _longest_span(config: Any, max_length: int | None) -> int:
    """The longest window or chunk, in tokens, that is shorter than a row of training; 0 where there is none.

    Rows count as twice `max_length`: a window counted in tokens of the row, not in positions, spans both answers.
    """
    spans = [layer_windows(config)[0]]
    spans += [getattr(config, name, None) for name in ("attention_chunk_size", "window_size", "local_attention")]
    reached = [s for s in spans if isinstance(s, int) and s > 0 and (max_length is None or s < 2 * max_length)]
    return max(reached, default=0)


def _examples(vocabulary: int, span: int) -> list[dict[str, Any]]:
    """Pairs of the same random tokens on every rank: one longer than `span`, and two that share a row."""
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    def pair(prompt_length: int, answer_length: int, merged: int) -> dict[str, Any]:
        prompt = tokens(prompt_length)
        return {
            "chosen_input_ids": prompt + tokens(answer_length),
            "rejected_input_ids": prompt + tokens(merged + answer_length),
            "chosen_prompt_length": prompt_length,
            "rejected_prompt_length": prompt_length + merged,
        }

    return [pair(_PROMPT + span, _ANSWER, 1), pair(3, 2, 0), pair(3, 2, 0)]


def _answer_logps(
    model: nn.Module, layout: Layout, examples: list[dict[str, Any]], own_logits: bool = False
) -> tuple[Tensor, float]:
    """(log-probability of every answer token in `layout`, how much of it may be rounding)."""
    base = base_model(model)
    batch = layout(examples)
    rows = batch.pop("orpo").to(base.device).rows
    inputs = {name: value.to(base.device) for name, value in batch.items()}
    hidden, target = rows.rows_N[rows.in_response_N], rows.targets_N[rows.in_response_N]
    # Answers of one token each, so that a mean log-probability is that of one token.
    tokens = torch.arange(len(target), device=base.device)
    pairs, every = len(target) // 2, torch.ones_like(tokens, dtype=torch.bool)
    out = model(**inputs, orpo=LossCall(Rows(hidden, target, tokens, every, tokens < pairs, pairs)))
    logps = torch.cat([out.chosen_logps, out.rejected_logps])
    eps = matmul_eps(base, base.device.type)
    tolerance = 2e-4 + 16 * eps
    if own_logits:
        logits = model(**inputs).logits.flatten(0, 1)[hidden].float()
        own = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
        tolerance += eps * logits.abs().max().item()
        if not (difference := (own - logps).abs().max().item()) <= tolerance:
            raise ValueError(
                f"{type(base).__name__}: fused log-probabilities of the padded layout differ by {difference:.3g} nats "
                "from those of the model's own logits"
            )
    return logps, tolerance


def matmul_eps(base: nn.Module, device: str) -> float:
    """Spacing at 1 of the numbers that the model's matmuls round to, under the autocast that is active."""
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.dtype
    # Layers of 4 bits compute in a dtype of their own, whatever that of the other weights.
    quantized = getattr(getattr(base.config, "quantization_config", None), "bnb_4bit_compute_dtype", None)
    eps = max(torch.finfo(d).eps for d in (dtype, quantized) if isinstance(d, torch.dtype))
    tf32 = device == "cuda" and tf32_allowed()
    return max(eps, 2.0**-10) if tf32 and dtype == torch.float32 else eps


@torch.no_grad()
def check_fused_logps(model: nn.Module, settings: LossSettings | None = None) -> float:
    """Compares fused log-probabilities of a few tokens with those from the model's own logits.

    Args:
        model: a model after :func:`attach_orpo_loss`.
        settings: of the loss; None: the defaults.

    Returns:
        The largest absolute difference, in nats.

    Raises:
        ValueError: they differ by more than the rounding of the model's logits explains.
    """
    base = base_model(model)
    fused = base._orpo_head
    pairs, length = 4, 6
    inputs = tiny_inputs(base, 2 * pairs, length)
    ids = inputs["input_ids"]
    sequence = torch.arange(2 * pairs, device=ids.device)
    yes = torch.ones_like(sequence, dtype=torch.bool)
    # One-token answers: each mean log-probability is that of one token.
    rows = Rows(sequence * length + length - 2, ids[:, -1], sequence, yes, sequence < pairs, pairs)
    # flash_precision first: it refuses float32 weights, on which FlashAttention would fail in training.
    with evaluating(base), flash_precision(base), eager_where_flash_cannot_run(base), gathering(base):
        logits = model(**inputs).logits[:, -2].float()
        out = model(**inputs, orpo=LossCall(rows, settings or LossSettings()))
        mixed = matmul_eps(base, ids.device.type)
    own = logits.log_softmax(-1).gather(-1, ids[:, -1:])[:, 0]
    difference = (torch.cat([out.chosen_logps, out.rejected_logps]) - own).abs().max().item()
    weight, _ = head_weight(trained_copy(base.get_output_embeddings()))
    eps = max(torch.finfo(weight.dtype).eps, mixed)
    tolerance = 1e-3 + 0.5 * eps * logits.abs().max().item()
    if not difference <= tolerance:
        raise ValueError(
            f"the fused log-probabilities of {type(base).__name__} differ from those of its own logits by up to "
            f"{difference:.3g} nats (at most {tolerance:.3g} is rounding): its head ({fused.name}) computes something "
            "that the fused loss does not know, and training would be silently wrong"
        )
    return difference
