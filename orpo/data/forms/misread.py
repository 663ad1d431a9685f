"""Refuses rows that a reader changed: messages that became text, text that became dates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date, time
from typing import Any

from orpo.data.forms.unusable import FileFault

# Messages as json.dumps and Python's str() write them; "from" is ShareGPT's name for the role.
_WRITTEN = re.compile(r"""\s*\[?\s*\{.*(['"])(role|from)\1\s*:.*\}\s*\]?\s*""", re.DOTALL)
_CONTENT = re.compile(r"""(['"])(content|value)\1\s*:""")


def are_messages(text: Any) -> bool:
    """Whether all of `text` is messages written out."""
    # Fast, before the slow pattern: few answers begin so.
    begins = isinstance(text, str) and text.lstrip()[:1] in ("[", "{")
    return begins and bool(_CONTENT.search(text)) and bool(_WRITTEN.fullmatch(text))


def refuse_messages_as_text(prompt: Any, *answers: Any) -> None:
    """Refuses messages written out as text, as CSV holds them.

    A single answer may be JSON; a row whose texts are all messages is a conversation.

    Raises:
        FileFault: the message has the text, and how to read it.
    """
    if are_messages(prompt) or (answers and all(map(are_messages, answers))):
        text = prompt if are_messages(prompt) else answers[0]
        raise FileFault(
            f"a text is messages written out, {text!r:.60}, and would be taken as it stands: make lists of these "
            "columns, with json.loads (ast.literal_eval where Python wrote them), and save the rows as JSON lines"
        )


def refuse_dates(value: Any) -> None:
    """Refuses dates and times in `value`, or in the lists and mappings that it is made of.

    Raises:
        FileFault: the message has the first of them, and how to keep text as it is.
    """
    if isinstance(value, date | time):
        raise FileFault(
            f"a row holds {value!r} where text belongs. Where the file is JSON, all texts of a column look like dates, "
            "and its reader has made dates of them, whose spelling is lost: save the rows as parquet or CSV, whose "
            "text stays text"
        )
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            refuse_dates(part)
