"""Token pairs for an encoder-decoder: the prompt as its encoder reads it, and each answer as its decoder writes it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orpo.data.forms.formats import PairText
from orpo.data.forms.unusable import (
    EQUAL_ANSWERS,
    EQUAL_ONCE_CUT,
    NO_PROMPT,
    PROMPTS_DIFFER,
    SEVERAL_TURNS,
    UnusableRow,
)
from orpo.data.pair_tokens import PairTokenizer
from orpo.tokens.limits import Limits


class EncoderDecoderTokenizer(PairTokenizer):
    """Text pairs to token pairs; prompt and answers are tokenized each by itself, as in TRL.

    Each gets the special tokens that the tokenizer puts around a text; an answer always ends with an EOS. A prompt is
    cut to ``max_prompt_length`` and an answer to ``max_completion_length``, or to ``max_length`` where its own limit is
    None. The special tokens around it stay.

    Args:
        tokenizer, limits, options: as of :class:`orpo.data.pair_tokens.PairTokenizer`.
        escape: has to be False.

    Raises:
        ValueError: `escape` is True, or the tokenizer leaves no text between its special tokens.
    """

    joined = False

    def __init__(self, tokenizer: Any, limits: Limits, *, escape: bool = False, **options: Any) -> None:
        if escape:
            raise ValueError(
                "escape_special_tokens is true, and the model is an encoder-decoder, for which special tokens in the "
                "text cannot be kept text: leave the option out"
            )
        super().__init__(tokenizer, limits, **options)
        self.code += hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        self.around_prompt = _around(tokenizer("a"), tokenizer("a", add_special_tokens=False))
        self.around_answer = _around(tokenizer(text_target="a"), tokenizer(text_target="a", add_special_tokens=False))

    def _text(self, row: Mapping[str, Any]) -> PairText:
        text = super()._text(row)
        for prompt, spans in zip((text.chosen_prompt, text.rejected_prompt), text.turns, strict=True):
            # A decoder writes none of the prompt, whatever is left out there.
            if sum(end > len(prompt) for _, end, _ in spans or ()) > 1:
                raise UnusableRow(SEVERAL_TURNS)
        return text._replace(turns=(None, None))

    def _ids(self, sides: list[list[str]]) -> list[list[int]]:
        prompts, answers = ([*part] for part in zip(*sides, strict=True))
        prompts, answers = self.tokenizer(prompts)["input_ids"], self.tokenizer(text_target=answers)["input_ids"]
        return [ids for side in zip(prompts, answers, strict=True) for ids in side]

    @staticmethod
    def _parts(text: PairText) -> list[list[str]]:
        return [[text.chosen_prompt, text.chosen], [text.rejected_prompt, text.rejected]]

    def _side(self, prompt: list[int], whole: list[int], templated: bool, text: str) -> tuple[list[int], list[int]]:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            return prompt, whole
        if whole[-1:] != [eos]:
            return prompt, [*whole, eos]
        # The chat template wrote an EOS, and the tokenizer added its own.
        return prompt, whole[:-1] if whole[-2:] == [eos, eos] else whole

    def _fit(self, sides: list[tuple[list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
        limits = self.limits
        if sides[0][0] != sides[1][0]:
            raise UnusableRow(PROMPTS_DIFFER)
        if not sides[0][0]:
            raise UnusableRow(NO_PROMPT)
        if sides[0] == sides[1]:
            raise UnusableRow(EQUAL_ANSWERS)
        for reason in filter(None, (limits.longer_parts(len(p), len(a)) for p, a in sides)):
            raise UnusableRow(reason)
        most = limits.max_prompt_length or limits.max_length
        start, end = self.around_prompt
        prompt = _cut(sides[0][0], most, start, end, from_start=limits.truncation_mode == "keep_start")
        most = limits.max_completion_length or limits.max_length
        start, end = self.around_answer
        chosen, rejected = (_cut(answer, most, start, max(end, 1), from_start=True) for _, answer in sides)
        if chosen == rejected:
            raise UnusableRow(EQUAL_ONCE_CUT)
        return [(prompt, chosen), (prompt, rejected)]


def _around(whole: Any, text: Any) -> tuple[int, int]:
    """How many special tokens a tokenizer puts before and behind a text."""
    whole, text = whole["input_ids"], text["input_ids"]
    for start in range(len(whole) - len(text) + 1):
        if text and whole[start : start + len(text)] == text:
            return start, len(whole) - len(text) - start
    raise ValueError(f"the tokenizer makes {whole} of 'a', and {text} without special tokens, which are no part of it")


def _cut(ids: list[int], most: int | None, start: int, end: int, from_start: bool) -> list[int]:
    """`ids` cut to `most` tokens. The first `start` and the last `end`, the special tokens, stay.

    Args:
        from_start: keep the text's beginning; otherwise its end.
    """
    if most is None or len(ids) <= most:
        return ids
    middle, room = ids[start : len(ids) - end], max(most - start - end, 0)
    middle = middle[:room] if from_start else middle[len(middle) - room :]
    return [*ids[:start], *middle, *ids[len(ids) - end :]]
