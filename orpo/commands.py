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
    _run("orpo-generate", "orpo.generate", speaks_first=False)


def _run(name: str, module: str, *more: str, speaks_first: bool = True) -> None:
    """Calls the ``command`` of `module`, which needs the packages `more` beside the trainer's.

    Args:
        speaks_first: whether it says itself that loading takes a while.
    """
    try:
        require_trainer(name, *more)
    except ImportError as error:
        raise SystemExit(str(error)) from None
    if not speaks_first:
        import_module("orpo.cli.before_imports").announce()
    import_module(module).command()
