"""Tells misspelled options and missing files within a second, before torch and transformers load, which takes ten.

The parser needs transformers: its options are the fields of TrainingArguments. Their names are read here from the
source files as text. Values, and the names in a run file, are left to the parser.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from orpo.cli.other_names import say_unknown
from orpo.data.files.kinds import refuse_missing
from orpo.launch import launch_config, launch_names
from orpo.recipes import describe_recipes, find_config

# Options that are fields of no class.
OWN = ("help", "help_all", "config", "list_recipes", "print_config", "check_ranks")


def announce() -> None:
    """Says on stderr of rank 0 that loading takes a while; nothing where transformers is loaded already."""
    if "transformers" not in sys.modules and os.environ.get("RANK", "0") == "0":
        print("loading torch and transformers ...", file=sys.stderr, flush=True)


def look(words: Sequence[str]) -> None:
    """Checks the `words` after ``orpo-train`` as far as that needs nothing loaded.

    Raises:
        ValueError: an option that does not exist, a recipe or a file that is not there.
        SystemExit: after ``--list_recipes`` and ``--print_config``, which are answered.
    """
    words = list(words)
    if "--" in words:
        words = words[: words.index("--")]
    given = [(word.partition("=")[0].lstrip("-").replace("-", "_"), i) for i, word in enumerate(words) if _names(word)]
    values = {name: _value(words, i) for name, i in given}
    if "help" in values or "help_all" in values or "-h" in words:
        return
    if "list_recipes" in values:
        print(describe_recipes())
        raise SystemExit(0)
    if values.get("print_config") in launch_names():
        print(launch_config(values["print_config"]), end="")
        raise SystemExit(0)
    known = option_strings()
    if known and (unknown := [words[i] for _, i in given if words[i].partition("=")[0] not in known]):
        raise ValueError(say_unknown(unknown, known))
    if (config := values.get("config")) is not None:
        find_config(config)
    for name in ("dataset_name", "eval_dataset_name"):
        # A check of the ranks says which of them lack it.
        if values.get(name) and "check_ranks" not in values:
            refuse_missing(values[name])


def option_strings() -> set[str]:
    """Every option of ``orpo-train`` as it is written on the line; for booleans also the form with ``no_``.

    Empty with a transformers that keeps the fields of TrainingArguments elsewhere; the parser checks names then.
    """
    here = Path(__file__).parent
    transformers = Path(importlib.util.find_spec("transformers").origin).parent
    fields = {
        **_fields(here / "arguments.py", "ModelArguments", "DataArguments"),
        **_fields(here.parent / "trainer/config.py", "ORPOConfig"),
        **(theirs := _fields(transformers / "training_args.py", "TrainingArguments")),
    }
    if "output_dir" not in theirs:
        return set()
    names = [*OWN, *fields, *(f"no_{name}" for name, is_switch in fields.items() if is_switch)]
    return {f"--{form}" for name in names for form in (name, name.replace("_", "-"))}


def _fields(path: Path, *classes: str) -> dict[str, bool]:
    """name -> whether it is a boolean, for each field of the dataclasses `classes` in the file `path`."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for part in node.body if isinstance(node, ast.ClassDef) and node.name in classes else ():
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                kind, value = ast.unparse(part.annotation), ast.unparse(part.value) if part.value else ""
                if not kind.startswith("ClassVar") and "init=False" not in value:
                    found[part.target.id] = kind == "Optional[bool]" or "bool" in kind.split(" | ")
    return found


def _names(word: str) -> bool:
    """Whether a parser takes `word` for an option. A text with a space in it may also begin with dashes."""
    return word.startswith("--") and len(word) > 2 and " " not in word.partition("=")[0]


def _value(words: list[str], place: int) -> str | None:
    _, equals, value = words[place].partition("=")
    if equals:
        return value
    after = words[place + 1 : place + 2]
    return after[0] if after and not after[0].startswith("--") else None
