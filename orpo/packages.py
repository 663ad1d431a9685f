"""Packages that some settings need and that are not installed with this one."""

from __future__ import annotations

import importlib.util


def require(package: str, setting: str) -> None:
    """Refuses `setting` where the `package` that it needs is not installed.

    Raises:
        ImportError: with what to install.
    """
    if not _is_installed(package):
        raise ImportError(f"{setting} needs {package}, which is not installed: pip install {package}")


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:
        # sys.modules holds None or a module without a spec under that name: it cannot be imported.
        return False
