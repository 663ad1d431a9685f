"""The commands, as the shell finds them: with the loss alone installed they say what to install, in one line."""

from __future__ import annotations

from importlib import import_module

from orpo.packages import require_trainer


def train() -> None:
    """The command ``orpo-train``."""
    # It draws the curves when all is trained, which is too late to miss what draws.
    _run("orpo-train", "orpo.train", "matplotlib")


def generate() -> None:
    """The command ``orpo-generate``."""
    _run("orpo-generate", "orpo.generate")


def _run(name: str, module: str, *more: str) -> None:
    try:
        require_trainer(name, *more)
    except ImportError as error:
        raise SystemExit(str(error)) from None
    import_module(module).command()
