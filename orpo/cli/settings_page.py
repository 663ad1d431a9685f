"""The table of settings, generated from the dataclasses.

python -m orpo.cli.settings_page > docs/settings.md
"""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any

from transformers import TrainingArguments

from orpo.cli.arguments import DataArguments, ModelArguments
from orpo.trainer.config import ORPOConfig

OLDER = "Older name, mapped with a warning to "


def settings_table() -> str:
    """Markdown of ``docs/settings.md``: every setting of our own, and those of transformers with another default."""
    own = [field for field in fields(ORPOConfig) if field.name in ORPOConfig.__annotations__]
    inherited = {field.name for field in fields(TrainingArguments)}
    alone = {cls: fields(cls) for cls in (ModelArguments, DataArguments)}
    older = [field for listed in (own, *alone.values()) for field in listed if _help(field).startswith(OLDER)]
    new = [field for field in own if field not in older]
    changed = [field for field in new if field.name in inherited]
    sections = (
        ("The run", "Fields of `orpo.ORPOConfig`.", [field for field in new if field not in changed]),
        ("The run: other defaults than transformers'", "Fields of `orpo.ORPOConfig` as well.", changed),
        ("The model", "Options of `orpo-train` alone.", [f for f in alone[ModelArguments] if f not in older]),
        ("The data", "Options of `orpo-train` alone.", [f for f in alone[DataArguments] if f not in older]),
    )
    text = [
        "# Settings",
        "Written by `python -m orpo.cli.settings_page > docs/settings.md`. Every setting is a field of "
        "`orpo.ORPOConfig` or an option of `orpo-train`. The rest, from `output_dir` to `report_to`, is in "
        "transformers' documentation of "
        "[TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments)"
        " and holds here as it stands there, but for `resume_from_checkpoint`: where it is not given, `orpo-train` "
        "resumes (Training, Checkpoints).",
    ]
    for title, note, listed in sections:
        text += [f"## {title}", note, _table(listed)]
    names = "\n".join(f"* `{field.name}`: {_help(field).removeprefix(OLDER)}" for field in older)
    text += ["## Older names", "Accepted, with a warning, and mapped to what stands beside them.", names]
    return "\n\n".join(text) + "\n"


def _help(field: Field[Any]) -> str:
    return field.metadata["help"]


def _table(listed: Any) -> str:
    rows = [["setting", "type", "default", "what it does"], ["---"] * 4]
    # Not field.type, which HfArgumentParser overwrites as soon as it has seen the class.
    types = {**DataArguments.__annotations__, **ModelArguments.__annotations__, **ORPOConfig.__annotations__}
    for field in listed:
        cells = (f"`{field.name}`", f"`{types[field.name]}`", f"`{field.default}`", _help(field))
        rows.append([cell.replace("|", "\\|") for cell in cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(settings_table(), end="")
