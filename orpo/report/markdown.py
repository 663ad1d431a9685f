"""Text of others in a Markdown page: shown as it is, neither markup nor HTML, on one line."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any


def text(value: Any) -> str:
    """`value` as plain words: what Markdown or HTML would make something of is escaped."""
    return re.sub(r"([\\`*\[\]#|~])", r"\\\1", html.escape(_line(value), quote=False))


def code(value: Any) -> str:
    """`value` as code in a line, whatever backticks it holds."""
    line = _line(value)
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{line}{space}{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table whose first column is code; values that are no text or number are shown as JSON."""
    cells = [[c if isinstance(c, (str, int, float)) else json.dumps(c) for c in row] for row in rows]
    lines = [head, ["---"] * len(head), *([_code_cell(row[0]), *map(text, row[1:])] for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code_cell(value: Any) -> str:
    # A table is cut at every bar, also at those in code.
    return code(value).replace("|", "\\|")


def _line(value: Any) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())
