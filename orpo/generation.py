"""A model's answers to prompts: strings, conversations or tokens, greedily or sampled."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from orpo_kernels.cpu import logits as cpu_logits
from tqdm import tqdm
from transformers import GenerationConfig

from orpo.model.adapters import adapter_folder, load_adapter
from orpo.model.attach import evaluating
from orpo.model.encoder_decoder import is_encoder_decoder
from orpo.model.load import find_device, load_model, load_tokenizer
from orpo.rendering import Messages, render_marked, text_tokens
from orpo.tokens.prompts import encoder_tokens, left_to_the_answer, trained_escaped
from orpo.tokens.special_tokens import spare_marks

# Divided by less, float32 logits of ordinary size become infinite, and no token has a probability.
LEAST_TEMPERATURE = 1e-6


class Answer(str):
    """A model's answer: a string that knows whether it ended.

    Attributes:
        cut: whether it reached the limit of tokens without an end token.
    """

    cut: bool

    def __new__(cls, text: str, cut: bool = False) -> Answer:
        answer = super().__new__(cls, text)
        answer.cut = cut
        return answer

    def strip(self, *args: Any) -> Answer:
        """:meth:`str.strip`, with :attr:`cut` kept."""
        return Answer(super().strip(*args), self.cut)

    def without(self, start: str) -> Answer:
        """:meth:`str.removeprefix`, with :attr:`cut` kept."""
        return Answer(super().removeprefix(start), self.cut)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 8,
    seed: int = 0,
    chat_template: bool | None = None,
    system: str | None = None,
    tools: Sequence[Any] | None = None,
    progress: bool = False,
) -> list[Answer]:
    """The model's answers, in the order of the prompts, without special tokens: strings with an attribute ``cut``.

    Prompts are tokenized as in training: a plain string with BOS in front, a chat template's text as it is. A space at
    a prompt's end is left to the model, since training gives it to the answer's first word, and is no part of the
    answer; an encoder reads it. Batches are padded on the left, for an encoder on the right. Greedy answers depend on
    the batch size by rounding only; sampled ones repeat with the same `seed`, prompts and `batch_size`. The global
    random state stays as it was.

    Args:
        model: a language model of transformers, causal or with an encoder, or an adapter around one.
        tokenizer: its tokenizer.
        prompts: strings or lists of messages.
        max_new_tokens: most tokens of an answer; fewer where prompt and answer would exceed the model's positions.
        temperature: 0 takes the most likely token each time. Of the model's own generation settings only the end
            tokens are used.
        top_p: sample from the most likely tokens that together have this probability.
        batch_size: prompts at a time.
        seed: for sampling.
        chat_template, system: as in :func:`render`.
        tools: for each prompt, as in :func:`render`.
        progress: whether to show a bar.

    Raises:
        ValueError: a setting is out of its range, or a prompt cannot be rendered or is too long for the model.
    """
    check_temperature(temperature, "temperature")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it has to be 0 or more, and below 2**63")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it has to be above 0 and at most 1")
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it has to be at least 1")
    encodes = is_encoder_decoder(model)
    tools = [None] * len(prompts) if tools is None else tools
    if len(tools) != len(prompts):
        raise ValueError(f"tools has {len(tools)} entries for {len(prompts)} prompts; it has to have one for each")
    marks = spare_marks([prompts, system, tools]) if trained_escaped(tokenizer) and not encodes else ""
    texts = [
        render_marked(prompt, tokenizer, chat_template, system, own, marks)
        for prompt, own in zip(prompts, tools, strict=True)
    ]
    ids = [
        encoder_tokens(text, tokenizer) if encodes else text_tokens(text, prompt, tokenizer, chat_template, marks)
        for text, prompt in zip(texts, prompts, strict=True)
    ]
    if any(not tokens for tokens in ids):
        raise ValueError(f"prompt {prompts[ids.index([])]!r} has no token, and the tokenizer none to begin with")
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    answers = answer_tokens(model, tokenizer, ids, batch_size=batch_size, seed=seed, progress=progress, **options)
    if encodes:
        return answers
    left = [left_to_the_answer(text, tokenizer, marks) for text in texts]
    return [answer.without(text) for answer, text in zip(answers, left, strict=True)]


def check_temperature(temperature: float, name: str) -> None:
    """Refuses a temperature that logits cannot be divided by.

    Raises:
        ValueError: it is neither 0 nor at least ``LEAST_TEMPERATURE``, or not finite; the message calls it `name`.
    """
    if not (temperature == 0 or LEAST_TEMPERATURE <= temperature < math.inf):
        raise ValueError(
            f"{name} is {temperature}; it has to be 0 (the most likely token), or at least {LEAST_TEMPERATURE} and "
            "finite"
        )


@torch.no_grad()
def answer_tokens(
    model: Any,
    tokenizer: Any,
    ids: Sequence[list[int]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> list[Answer]:
    """:func:`generate` for prompts that are tokens already, at least one each and fewer than :func:`positions`."""
    encodes, room = is_encoder_decoder(model), positions(model)
    # An encoder has all positions for the prompt, and the decoder as many for the answer.
    least = 0 if encodes else 1
    if longest := max((len(prompt) for prompt in ids if len(prompt) + least > room), default=0):
        why = "for so long a prompt" if encodes else "for an answer"
        raise ValueError(f"a prompt has {longest} tokens, and the model {room} positions: there is no room {why}")
    # Prompts of similar length share a batch: padding costs as much as any token.
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    ends = _end_ids(model, tokenizer)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, *ends) if i is not None), 0)
    # 0, since top_k is 50 by default.
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    settings = GenerationConfig(
        do_sample=temperature > 0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        **(_first_tokens(model) if encodes else {}),
        **sampling,
    )
    answers = [Answer("")] * len(ids)
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), _generation_settings(model, settings), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for first in tqdm(range(0, len(order), batch_size), disable=not progress):
            batch = order[first : first + batch_size]
            longest = max(len(ids[i]) for i in batch)
            # Past its positions OPT has no embedding to look up, and others answer noise.
            settings.max_new_tokens = min(max_new_tokens, room if encodes else room - longest)
            rows = torch.full((len(batch), longest), pad)
            mask = torch.zeros_like(rows)
            for row, i in enumerate(batch):
                # On the right for an encoder, which may count positions from the row's first token, as in training.
                place = slice(len(ids[i])) if encodes else slice(longest - len(ids[i]), None)
                rows[row, place], mask[row, place] = torch.tensor(ids[i]), 1
            out = model.generate(input_ids=rows.to(model.device), attention_mask=mask.to(model.device))
            # A decoder's output begins with its start token, which may also be an end token.
            out = out[:, 1:] if encodes else out[:, longest:]
            decoded = tokenizer.batch_decode(out, skip_special_tokens=True)
            ended = torch.isin(out, torch.tensor(ends, dtype=out.dtype, device=out.device)).any(1).tolist()
            for i, answer, has_end in zip(batch, decoded, ended, strict=True):
                answers[i] = Answer(answer, cut=not has_end)
    return answers


def positions(model: Any) -> float:
    """The longest sequence by the model's configuration, in tokens; infinity where it names none."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else math.inf


@contextmanager
def _generation_settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """`settings` in place of the model's own, with which ``generate`` would complete those that it is given."""
    # An adapter copies its settings to the model inside, where they would stay.
    holders = [model, *([model.get_base_model()] if hasattr(model, "get_base_model") else [])]
    own = [holder.generation_config for holder in holders]
    try:
        for holder in holders:
            holder.generation_config = settings
        yield
    finally:
        for holder, before in zip(holders, own, strict=True):
            holder.generation_config = before


def _first_tokens(model: Any) -> dict[str, Any]:
    """The first tokens of an encoder-decoder's answer: the start token, and for some models the language's."""
    names, found = ("decoder_start_token_id", "forced_bos_token_id"), {}
    for place in (model.config, model.generation_config):
        found |= {name: value for name in names if (value := getattr(place, name, None)) is not None}
    return found


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model's own generation settings."""
    own = getattr(model.generation_config, "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return sorted({i for i in (*own, tokenizer.eos_token_id) if i is not None})


def load(name: str, *, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False) -> tuple:
    """(model, tokenizer) of a folder, an adapter's folder or a name on the hub, ready to generate.

    ``dtype="auto"`` keeps the saved dtype, but gives float32 for bfloat16 on a CPU that would emulate it.

    Raises:
        ImportError: the folder holds an adapter, and peft is not installed.
        ValueError: there is no such folder, it lacks a language model with head and tokenizer, or torch has no such
            `dtype`, or no such `device` here.
    """
    place = find_device(device)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    folder = adapter_folder(name)
    model = load_model(name, **options) if folder is None else load_adapter(folder, **options)
    tokenizer = load_tokenizer(name if folder is None else str(folder), trust_remote_code=trust_remote_code)
    if dtype == "auto" and model.dtype == torch.bfloat16 and place.type == "cpu":
        # Emulated on an AVX2 CPU, bfloat16 takes six times as long to multiply as float32.
        model = model if cpu_logits.multiplies_bfloat16() else model.float()
    return model.to(place), tokenizer
