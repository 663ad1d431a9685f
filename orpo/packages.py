"""Packages that some settings, or the trainer, need: refused in words where they are missing."""

from __future__ import annotations

import importlib.util

# What the extra `train` installs, by the names that are imported, but for matplotlib, without which a trainer trains.
TRAINER = ("accelerate", "datasets", "numpy", "tokenizers", "tqdm", "transformers", "yaml")


def require(package: str, setting: str) -> None:
    """Refuses `setting` where the `package` that it needs is not installed.

    Raises:
        ImportError: with what to install.
    """
    if not _is_installed(package):
        raise ImportError(f"{setting} needs {package}, which is not installed: pip install {package}")


def require_trainer(what: str, *more: str) -> None:
    """Refuses `what` where the loss was installed without the trainer, or without `more` packages of its extra.

    Raises:
        ImportError: with what is missing and what to install.
    """
    missing = [package for package in (*TRAINER, *more) if not _is_installed(package)]
    if missing:
        raise ImportError(
            f"{what} belongs to the trainer, which needs {', '.join(missing)}, not installed here: "
            "pip install '.[train]' in the folder of fused-orpo (without [train] it installs the loss alone)"
        )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:
        # sys.modules holds None or a module without a spec under that name: it cannot be imported.
        return False
