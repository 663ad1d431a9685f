"""Configurations of ``accelerate launch`` for several devices, shipped as YAML: ``orpo-train --print-config fsdp2``."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def launch_names() -> list[str]:
    """The configurations that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def launch_config(name: str) -> str:
    """The text of a configuration, for ``accelerate launch --config_file``.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in launch_names():
        raise ValueError(f"print_config is {name!r}; the configurations are {', '.join(launch_names())}")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
