"""How long a pair may be in tokens, and what is cut of one that is longer."""

from __future__ import annotations

from dataclasses import dataclass

_PROMPT, _ANSWER = "pair with a prompt of", "pair with an answer of"


def _longer(what: str, most: int) -> str:
    return f"{what} more than {most:,} tokens"


@dataclass(frozen=True)
class Limits:
    """How long a sequence may be, in tokens; None is no limit.

    A pair is cut only where one of its sequences is longer than `max_length`: first its prompt to `max_prompt_length`,
    if that is set, then its answers to what is left. A row whose prompt leaves no room for an answer is dropped.

    Attributes:
        max_length: prompt and answer together.
        max_prompt_length: the prompt of a pair that is too long.
        max_completion_length: every answer.
        truncation_mode: "keep_end" or "keep_start", the part of a cut prompt that stays. A leading BOS always stays.
        truncation: "cut", or "drop", which leaves out pairs that would be cut.
    """

    max_length: int | None = 1024
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: str = "keep_end"
    truncation: str = "cut"

    def __post_init__(self) -> None:
        for name in ("max_length", "max_prompt_length", "max_completion_length"):
            value, least = getattr(self, name), 2 if name == "max_length" else 1
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it has to be at least {least}")
        if self.max_length and self.max_prompt_length and self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length is {self.max_prompt_length} and max_length {self.max_length}: "
                "the prompt may not fill the sequence; lower --max_prompt_length too, or leave it out"
            )
        if self.truncation_mode not in ("keep_end", "keep_start"):
            raise ValueError(f"truncation_mode is {self.truncation_mode!r}; it has to be 'keep_end' or 'keep_start'")
        if self.truncation not in ("cut", "drop"):
            raise ValueError(f"truncation is {self.truncation!r}; it has to be 'cut' or 'drop'")

    @property
    def too_long(self) -> str:
        """The reason for which a row is dropped whose prompt leaves no room for an answer."""
        return f"prompt of {self.max_length:,} tokens or more"

    @property
    def reasons(self) -> list[str]:
        """Every reason for which a row can be too long."""
        if self.truncation == "cut":
            return [] if self.max_length is None else [self.too_long]
        whole = (("pair of", self.max_length), (_ANSWER, self.max_completion_length))
        parts = ((_PROMPT, self.max_prompt_length or self.max_length), (_ANSWER, self.max_length))
        return list(dict.fromkeys(_longer(what, most) for what, most in (*whole, *parts) if most is not None))

    def longer_than_cut(self, prompt: int, answer: int) -> str | None:
        """With "drop", the reason for which a sequence of so many tokens leaves out its pair; or None."""
        if self.truncation == "cut":
            return None
        if self.max_length is not None and prompt + answer > self.max_length:
            return _longer("pair of", self.max_length)
        most = self.max_completion_length
        return _longer(_ANSWER, most) if most is not None and answer > most else None

    def longer_parts(self, prompt: int, answer: int) -> str | None:
        """:meth:`longer_than_cut` for an encoder-decoder, where prompt and answer have their own limits."""
        if self.truncation == "cut":
            return None
        parts = (
            (_PROMPT, prompt, self.max_prompt_length or self.max_length),
            (_ANSWER, answer, self.max_completion_length or self.max_length),
        )
        return next((_longer(what, most) for what, size, most in parts if most is not None and size > most), None)

    def cut_prompt(self, ids: list[int], bos_token_id: int | None) -> list[int]:
        """`ids` cut to `max_prompt_length`."""
        most = self.max_prompt_length
        if most is None or len(ids) <= most:
            return ids
        if self.truncation_mode == "keep_start":
            return ids[:most]
        if ids[0] == bos_token_id:
            return ids[:1] + ids[len(ids) - most + 1 :]
        return ids[-most:]
