"""The reasons for which a row cannot train, under which rows are counted."""

from __future__ import annotations

# The answer follows this in HH-RLHF's dialogues.
ASSISTANT = "\n\nAssistant:"

EMPTY_ANSWER = "empty answer"
EQUAL_ANSWERS = "pair of equal answers"
EQUAL_ONCE_CUT = "pair whose answers are equal once cut"
NO_PROMPT = "pair without a prompt"
PROMPTS_DIFFER = "pair whose prompts differ"
UNMARKED = f"dialogue without {ASSISTANT!r}"
ENDS_OTHERWISE = "answer whose last turn is not the assistant's"
NO_CONTENT = "conversation with a message that holds nothing"
REFUSED = "row that the chat template refuses"
LEFT_OUT = "answer that the chat template leaves out"
OTHER_ROLE = "answer in another role than the generation prompt opens"
MISSING = "row with null where a text belongs"
MALFORMED = "malformed row"
TURNS_CHANGE = "answer whose turns the chat template alters once others follow"
NOTHING_SCORED = "answer of which no token is scored"
SEVERAL_TURNS = "answer of several turns, for an encoder-decoder"

# Faults of a file: `max_bad_rows` says how many of these a run accepts. Rows with any other reason are left out,
# however many they are.
BAD = frozenset({MISSING, MALFORMED, UNMARKED, NO_CONTENT, REFUSED, LEFT_OUT, OTHER_ROLE})

# Every reason, except those of rows that are too long, which name the limit.
REASONS = (
    MALFORMED,
    MISSING,
    EMPTY_ANSWER,
    EQUAL_ANSWERS,
    EQUAL_ONCE_CUT,
    NO_PROMPT,
    PROMPTS_DIFFER,
    UNMARKED,
    ENDS_OTHERWISE,
    NO_CONTENT,
    REFUSED,
    LEFT_OUT,
    OTHER_ROLE,
    TURNS_CHANGE,
    NOTHING_SCORED,
    SEVERAL_TURNS,
)


class FileFault(ValueError):
    """A fault of a whole data set, not of one row: it ends the run, whatever `max_bad_rows` is."""


class UnusableRow(Exception):
    """A row that cannot train.

    Args:
        reason: under which the row is counted, in the singular.
        detail: what else is known of this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason
