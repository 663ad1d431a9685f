"""How long real preference pairs are: the numbers of a data set, and pairs drawn to match. The data does not ship.

Counted on 1,794 pairs of HH-RLHF (harmless-base, test; github.com/anthropics/hh-rlhf) with SmolLM2's tokenizer, BOS and
EOS included. The prompt counts once here; a batch of sequences holds it twice. Batches of 1, 2, 4, 8 and 16 of these
pairs, every sequence padded to the longest, are padding to 9, 31, 46, 57 and 64 %.
"""

from __future__ import annotations

import math
import random

# Tokens at the quantiles 0, 5 %, ..., 100 %.
QUANTILES = {
    "prompt": (13, 18, 20, 23, 26, 33, 48, 63, 74, 85, 98, 110, 121, 136, 151, 170, 190, 226, 272, 345, 836),
    "chosen": (2, 7, 9, 11, 13, 15, 18, 20, 23, 25, 28, 31, 35, 41, 46, 54, 62, 74, 89, 118, 270),
    "rejected": (2, 7, 10, 13, 15, 18, 21, 24, 28, 32, 36, 41, 47, 52, 58, 65, 75, 87, 109, 145, 557),
}
# Correlation of the logarithms, about equal for each two of the three.
CORRELATION = 0.25

Lengths = tuple[int, int, int]


def quantile(name: str, share: float) -> int:
    """Tokens at `share` in [0, 1], straight between the counted quantiles."""
    table = QUANTILES[name]
    at = min(max(share, 0.0), 1.0) * (len(table) - 1)
    below = min(int(at), len(table) - 2)
    return round(table[below] + (at - below) * (table[below + 1] - table[below]))


def draw(pairs: int, seed: int = 0, longest: int | None = None) -> list[Lengths]:
    """(prompt, chosen, rejected) tokens of `pairs` pairs; those over `longest` tokens are drawn anew.

    Raises:
        ValueError: no pair of the distribution is as short as `longest`.
    """
    shortest = QUANTILES["prompt"][0] + 2
    if longest is not None and longest < shortest:
        raise ValueError(f"longest is {longest}; the shortest pair has {shortest} tokens")
    g, out = random.Random(seed), []
    while len(out) < pairs:
        # One part that the three share gives them their correlation.
        common = math.sqrt(CORRELATION) * g.gauss(0, 1)
        normals = (common + math.sqrt(1 - CORRELATION) * g.gauss(0, 1) for _ in QUANTILES)
        lengths = tuple(
            quantile(name, 0.5 * math.erfc(-x / math.sqrt(2))) for name, x in zip(QUANTILES, normals, strict=True)
        )
        if longest is None or lengths[0] + max(lengths[1:]) <= longest:
            out.append(lengths)
    return out


def padding_share(lengths: list[Lengths]) -> float:
    """The part of a padded batch of these pairs that is padding."""
    sequences = [p + answer for p, *answers in lengths for answer in answers]
    return 1 - sum(sequences) / (max(sequences) * len(sequences))


def prompt_share(lengths: list[Lengths]) -> float:
    """The part of the tokens, without padding, that belongs to prompts."""
    return sum(2 * p for p, _, _ in lengths) / sum(2 * p + c + r for p, c, r in lengths)
