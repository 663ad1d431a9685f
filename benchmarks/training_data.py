"""What trainers are measured on: a model with its tokenizer, and pairs that none of them cuts or drops."""

from __future__ import annotations

import random
from typing import Any

import torch

from .cases import draw

# Tokens of the longest sequence that is taken.
LONGEST = 512
# Tokens of a sequence where the share of the prompt is given.
SHARED_TOTAL = 256


def load(folder: str | None) -> tuple[Any, Any]:
    """(model in float32, tokenizer) of a local folder; without one the demonstration's model of 1M parameters."""
    if folder:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    from orpo.demo.model import build_model, train_tokenizer

    tokenizer = train_tokenizer([f" {chr(97 + i)}{chr(97 + j)}" for i in range(8) for j in range(8)] * 3)
    return build_model(tokenizer, seed=0), tokenizer


def synthetic_pairs(
    tokenizer: Any, count: int, longest: int, seed: int = 0, share: int | None = None
) -> list[dict[str, str]]:
    """Pairs of random words, each word one token, as long as those of the data set, or with `share` % of prompt."""
    g = random.Random(seed)
    single = [w for w in tokenizer.get_vocab() if w.startswith("Ġ") and w[1:].isascii() and w[1:].isalpha()]
    words = sorted(word[1:] for word in single)

    def text(tokens: int) -> str:
        return "".join(f" {g.choice(words)}" for _ in range(max(tokens, 1)))

    if share is None:
        drawn = draw(count, seed, longest)
    else:
        prompt = SHARED_TOTAL * share // 100
        drawn = [(prompt, SHARED_TOTAL - prompt, SHARED_TOTAL - prompt)] * count
    # Of the counted tokens one is BOS and one EOS.
    return [dict(prompt=text(p - 1), chosen=text(c - 1), rejected=text(r - 1)) for p, c, r in drawn]


def pairs_of(data: str | None, tokenizer: Any, count: int, longest: int) -> list[dict[str, str]]:
    """`count` pairs of strings that no trainer cuts or drops."""
    if data is None:
        return synthetic_pairs(tokenizer, count, longest)
    from orpo.data.files.sources import load_pairs
    from orpo.data.forms.formats import UnusableRow, pair_text

    out: list[dict[str, str]] = []
    for row in load_pairs(data, "train"):
        try:
            text = pair_text(row, tokenizer)
        except UnusableRow:
            continue
        sides = [len(tokenizer(text.chosen_prompt + answer)["input_ids"]) for answer in (text.chosen, text.rejected)]
        if text.chosen_prompt == text.rejected_prompt and max(sides) + 2 <= longest:
            out.append(dict(prompt=text.chosen_prompt, chosen=text.chosen, rejected=text.rejected))
        if len(out) == count:
            return out
    raise ValueError(f"data has {len(out)} pairs of at most {longest} tokens; {count} are needed")


def load_all(folder: str | None, data: str | None, count: int, longest: int, share: int | None) -> tuple:
    model, tokenizer = load(folder)
    if share is not None:
        return model, tokenizer, synthetic_pairs(tokenizer, count, longest, share=share)
    return model, tokenizer, pairs_of(data, tokenizer, count, longest)
