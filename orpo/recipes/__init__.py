"""Settings of whole runs, shipped as YAML: ``orpo-train --config smollm2-lora``.

Each file says at its top how it is launched and what has been run, and of every setting where it comes from.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """What ``--config`` knows by name."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_config(name: str) -> Path:
    """The YAML file that `name` stands for: a file, or else a shipped recipe.

    Raises:
        ValueError: it is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if name in recipe_names():
        return FOLDER / f"{name}.yaml"
    raise ValueError(f"--config is {name!r}: no such file, and no recipe; the recipes are {', '.join(recipe_names())}")


def describe_recipes() -> str:
    """One line a recipe: its name, and the first line of its file."""
    texts = {name: (FOLDER / f"{name}.yaml").read_text(encoding="utf-8") for name in recipe_names()}
    width = max(map(len, texts))
    return "\n".join(f"{name:<{width}}  {text.splitlines()[0].lstrip('# ')}" for name, text in texts.items())
