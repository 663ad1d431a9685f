"""Which layout a model can be trained with: found by trying it, never by a list of names.

A model that looks at the order of tokens in memory (ALiBi, state-space and convolution layers, windows counted in
tokens) would train silently wrong on answers that share a prompt. So every answer token of a few pairs is scored in the
padded layout, from the model's own logits, and in the layout in question, before training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from orpo_kernels.rows import Rows
from torch import Tensor, nn

from orpo.attention import layer_windows
from orpo.layout import make_layout
from orpo.model import LossCall, base_model

Layout = Callable[[list[Any]], dict[str, Any]]

_PROMPT, _ANSWER = 12, 8


def choose_layout(
    name: str, model: nn.Module, *, max_length: int | None = None, router_loss: bool = False, **options: Any
) -> tuple[Layout, str]:
    """The layout to train `model` with, and one sentence that says why.

    Args:
        name: a layout, or "auto": the first that the model computes right of shared (packed with FlashAttention) and
            padded.
        model: after :func:`orpo.model.attach_orpo_loss`; its weights are read, none is changed.
        max_length: most tokens of a sequence in training. Windows and chunks at least as long play no role.
        router_loss: the model adds a load-balancing loss over the tokens it sees. Shared and unpadded batches show it
            each prompt once and no padding, which changes that loss.
        options: of the layout (pad_token_id, nll).

    Raises:
        ValueError: `name` is a layout that `model` computes something else with.
    """
    if name == "padded":
        return make_layout("padded", **options), "layout padded, as asked for"
    flash = "flash" in (getattr(base_model(model).config, "_attn_implementation", None) or "")
    wanted = name if name != "auto" else ("packed" if flash else "shared")
    if wanted == "packed":
        options = {**options, "single_row": flash}
    padded = {key: value for key, value in options.items() if key != "single_row"}
    reason = _obstacle(wanted, flash, router_loss)
    if reason is None:
        layout = make_layout(wanted, **options)
        reason = _mismatch(model, layout, make_layout("padded", **padded), max_length)
        if reason is None:
            return layout, f"layout {wanted}: a few pairs score as in the padded layout" + (
                "" if name == "auto" else ", as asked for"
            )
    if name != "auto":
        raise ValueError(
            f"layout is {name!r}, which {type(base_model(model)).__name__} cannot be trained with: {reason}"
        )
    return make_layout("padded", **padded), f"layout padded, not {wanted}: {reason}"


def _obstacle(wanted: str, flash: bool, router_loss: bool) -> str | None:
    if router_loss:
        return "the router's loss is over all tokens, and would change with the layout"
    if wanted == "shared" and flash:
        return "FlashAttention takes no mask"
    return None


def _mismatch(model: nn.Module, layout: Layout, padded: Layout, max_length: int | None) -> str | None:
    """What keeps `model` from `layout`, or None."""
    base = base_model(model)
    span = _longest_span(base.config.get_text_config(), max_length)
    examples = _examples(base.get_input_embeddings().weight.shape[0], span)
    was_training = base.training
    base.eval()
    try:
        with torch.no_grad():
            expected, tolerance = _answer_logps(model, padded, examples, own_logits=span == 0)
            try:
                found, _ = _answer_logps(model, layout, examples)
            except Exception as error:  # Whatever a model raises on inputs that it was not made for: it is reported.
                return (
                    f"the model refuses it ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
                )
    finally:
        base.train(was_training)
    difference = (found - expected).abs().max().item()
    if difference <= tolerance:
        return None
    return f"log-probabilities differ by {difference:.2g} nats from those of the padded layout"


def _longest_span(config: Any, max_length: int | None) -> int:
    """Tokens of the longest window or chunk that training will reach beyond; 0 where there is none."""
    spans = [layer_windows(config)[0]]
    spans += [getattr(config, name, None) for name in ("attention_chunk_size", "window_size", "local_attention")]
    reached = [s for s in spans if isinstance(s, int) and s > 0 and (max_length is None or s < max_length)]
    return max(reached, default=0)


def _examples(vocabulary: int, span: int) -> list[dict[str, Any]]:
    """Pairs of random tokens, the same everywhere: one that reaches beyond `span`, and two that share a row."""
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
    """(log-probability of every answer token, how far rounding may carry it), by way of `layout`."""
    base = base_model(model)
    batch = layout(examples)
    rows = batch.pop("orpo").to(base.device).rows
    inputs = {name: value.to(base.device) for name, value in batch.items()}
    hidden, target = rows.rows_N[rows.in_response_N], rows.targets_N[rows.in_response_N]
    # Answers of one token each, so that a mean log-probability is that of one token.
    tokens = torch.arange(len(target), device=base.device)
    pairs, every = len(target) // 2, torch.ones_like(tokens, dtype=torch.bool)
    out = model(**inputs, orpo=LossCall(Rows(hidden, target, tokens, every, tokens < pairs, pairs), settings={}))
    logps = torch.cat([out.chosen_logps, out.rejected_logps])
    eps = torch.finfo(base.dtype).eps
    if base.dtype == torch.float32 and base.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        eps = 2.0**-10
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
