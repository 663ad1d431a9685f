"""A reward model on preference pairs, Eq. 11 of the paper: -E log sigmoid(r(x, y_w) - r(x, y_l)).

    python -m benchmarks.paper.reward MODEL --data pairs.jsonl --train "train[5%:]" --heldout "train[:5%]" --output rm

The model is transformers' own AutoModelForSequenceClassification with one output, read at the last token; the pairs
come in any form that orpo-train reads. One epoch, as on the slides.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from orpo.data.files.sources import load_pairs
from orpo.data.forms.formats import UnusableRow, pair_text
from orpo.model.load import load_tokenizer

from . import loop


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Eq. 11 over rewards of shape (pairs,): their mean."""
    return -logsigmoid(chosen - rejected).mean()


def ended(text: str, tokenizer: Any) -> str:
    """`text` with one end-of-sequence token and nothing else behind it.

    Generated answers come without the tokens that end them, those of a data set may have them: a reward model that
    could tell the two apart by their ends would.
    """
    ends = [token for token in tokenizer.all_special_tokens if token]
    text = text.rstrip()
    while any(text.endswith(token) for token in ends):
        text = text[: -max(len(token) for token in ends if text.endswith(token))].rstrip()
    return text + tokenizer.eos_token


def pair_texts(rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> list[tuple[str, str]]:
    """(chosen, rejected) texts, prompts included; rows that cannot train are left out."""
    texts = []
    for row in rows:
        try:
            pair = pair_text(row, tokenizer)
        except UnusableRow:
            continue
        whole = (pair.chosen_prompt + pair.chosen, pair.rejected_prompt + pair.rejected)
        texts.append(tuple(ended(text, tokenizer) for text in whole))
    return texts


def load_reward(name: str, tokenizer: Any, seed: int = 0) -> Any:
    """A language model's body under a new head of one output, or a reward model as it was saved."""
    torch.manual_seed(seed)
    # transformers finds a text's end by the padding token, and refuses batches without one. Where it is the end token
    # too, the reward is read one token before, in all texts alike.
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # Left to itself, transformers keeps a checkpoint's half precision, in which AdamW's steps vanish or overflow.
    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, pad_token_id=pad, dtype=torch.float32)


def token_ids(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a whole text as they are judged: BOS in front where the tokenizer writes one, and once only."""
    bos = tokenizer.bos_token
    return tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]


def longer(texts: Sequence[str], tokenizer: Any, max_length: int) -> int:
    """How many of `texts` have more than `max_length` tokens, and lose their beginnings in :func:`score`."""
    return sum(len(token_ids(text, tokenizer)) > max_length for text in texts)


def rewards(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int = 1024) -> Tensor:
    """(N,) rewards of whole texts, in one batch. Texts beyond `max_length` tokens keep their ends."""
    pad = model.config.pad_token_id
    ids = [torch.tensor(token_ids(text, tokenizer)[-max_length:]) for text in texts]
    batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad).to(model.device)
    lengths = torch.tensor([len(x) for x in ids], device=model.device)
    mask = (torch.arange(batch.shape[1], device=model.device)[None] < lengths[:, None]).long()
    return model(input_ids=batch, attention_mask=mask).logits[:, 0].float()


@torch.no_grad()
def score(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 64, max_length: int = 1024) -> Tensor:
    """(N,) rewards on the CPU, in the order of `texts`."""
    model.eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    scores = torch.zeros(len(texts))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        scores[batch] = rewards(model, tokenizer, [texts[i] for i in batch], max_length).cpu()
    return scores


def accuracy(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], max_length: int = 1024) -> float:
    """Share of the (chosen, rejected) texts whose chosen one has the higher reward."""
    both = score(model, tokenizer, [text for pair in pairs for text in pair], max_length=max_length).view(-1, 2)
    return (both[:, 0] > both[:, 1]).float().mean().item()


def fit(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    learning_rate: float,
    epochs: int = 1,
    batch_size: int = 16,
    max_length: int = 1024,
    seed: int = 0,
) -> list[float]:
    """Trains `model` in place on (chosen, rejected) texts: AdamW, warm-up, cosine. Returns the loss of each step."""
    shuffled = random.Random(seed)
    order = [i for _ in range(epochs) for i in shuffled.sample(range(len(pairs)), len(pairs))]
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def loss_of(batch: list[int]) -> Tensor:
        texts = [pairs[i][side] for side in (0, 1) for i in batch]
        return preference_loss(*rewards(model, tokenizer, texts, max_length).split(len(batch)))

    return loop.fit(model, batches, loss_of, learning_rate=learning_rate, title="reward model")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a model of the hub")
    parser.add_argument("--data", required=True, help="pairs, as orpo-train reads them")
    parser.add_argument("--train", default="train", help="the split to train on")
    parser.add_argument("--heldout", default="test", help="the split to measure on")
    parser.add_argument("--output", required=True, help="folder for the reward model")
    parser.add_argument("--tokenizer", help="folder of a tokenizer with a chat template, where the model has none")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    tokenizer = load_tokenizer(options.tokenizer or options.model)
    train, heldout = (
        pair_texts(load_pairs(options.data, part), tokenizer) for part in (options.train, options.heldout)
    )
    model = load_reward(options.model, tokenizer, options.seed)
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    names = ("learning_rate", "batch_size", "max_length", "seed")
    fit(model, tokenizer, train, **{name: getattr(options, name) for name in names})
    share = accuracy(model, tokenizer, heldout, options.max_length)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"{len(train):,} pairs trained on; accuracy on {len(heldout):,} held-out pairs: {share:.3f}")


if __name__ == "__main__":
    main()
