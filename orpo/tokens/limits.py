"""How long a pair may be in tokens, and what is cut of one that is longer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """How long a sequence may be, in tokens; None is no limit.

    A pair is cut only where one of its sequences is longer than `max_length`: first its prompt to `max_prompt_length`,
    if that is set, then its answers to what is left. A row whose prompt leaves no room for an answer is dropped.

    Attributes:
        max_length: prompt and answer together.
        max_prompt_length: the prompt, of a pair that is too long.
        max_completion_length: every answer.
        truncation_mode: "keep_end" or "keep_start", the part of a cut prompt that stays. A leading BOS always stays.
    """

    max_length: int | None = 1024
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: str = "keep_end"

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

    @property
    def too_long(self) -> str:
        """Why a row is dropped whose prompt leaves no room for an answer."""
        return f"prompt of {self.max_length:,} tokens or more"

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
