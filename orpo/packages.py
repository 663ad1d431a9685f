"""Refuses settings, or the trainer, where packages that they need are missing."""

from __future__ import annotations

import importlib.util

# What the extra `train` installs, by import names, without matplotlib, which training itself does not need.
TRAINER = ("accelerate", "datasets", "numpy", "tokenizers", "tqdm", "transformers", "yaml")


def require(package: str, setting: str) -> None:
    """Refuses `setting` where the `package` that it needs is not installed.

    Raises:
        ImportError: the message says what to install.
    """
    if not _is_installed(package):
        raise ImportError(f"{setting} needs {package}, which is not installed: pip install {package}")


def require_trainer(what: str, *more: str) -> None:
    """Refuses `what` where the loss was installed without the trainer, or without `more` packages of its extra.

    Raises:
        ImportError: the message says what is missing and what to install.
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
        # find_spec raises where sys.modules holds None, or a module without a spec: neither can be imported.
        return False
