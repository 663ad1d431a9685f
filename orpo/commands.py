"""The commands as the shell finds them. Where only the loss is installed, they say what else to install."""

from __future__ import annotations

from importlib import import_module

from orpo.packages import require_trainer


def train() -> None:
    """The command ``orpo-train``."""
    # matplotlib draws the curves after training: refused now, or a trained run would end in an error.
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
