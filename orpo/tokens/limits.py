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
        truncation: "cut", or "drop": pairs of which something would be cut are left out instead.
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
        """Why a row is dropped whose prompt leaves no room for an answer."""
        return f"prompt of {self.max_length:,} tokens or more"

    @property
    def reasons(self) -> list[str]:
        """Every reason for which a row can be too long."""
        if self.truncation == "drop":
            return [reason for reason, most in self._longest if most is not None]
        return [] if self.max_length is None else [self.too_long]

    @property
    def _longest(self) -> tuple[tuple[str, int | None], ...]:
        return (
            (f"pair of more than {self.max_length or 0:,} tokens", self.max_length),
            (
                f"pair with an answer of more than {self.max_completion_length or 0:,} tokens",
                self.max_completion_length,
            ),
        )

    def dropped_for(self, prompt: int, answer: int) -> str | None:
        """Why a sequence of so many tokens leaves out its pair, where nothing is cut; or None."""
        if self.truncation == "cut":
            return None
        lengths = (prompt + answer, answer)
        found = zip(self._longest, lengths, strict=True)
        return next((reason for (reason, most), length in found if most is not None and length > most), None)

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
