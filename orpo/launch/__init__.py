"""How to start a run on several devices: ``orpo-train --print-config fsdp2``.

Configurations of ``accelerate launch`` are YAML; scripts that start it, or torchrun, on several nodes are for bash.
"""

from __future__ import annotations

from pathlib import Path

FILES = {path.stem: path for path in Path(__file__).parent.iterdir() if path.suffix in (".yaml", ".sh")}


def launch_names() -> list[str]:
    """The configurations and scripts that ship."""
    return sorted(FILES)


def launch_config(name: str) -> str:
    """The text of a configuration, for ``accelerate launch --config_file``, or of a script.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in FILES:
        raise ValueError(f"print_config is {name!r}; the configurations are {', '.join(launch_names())}")
    return FILES[name].read_text(encoding="utf-8")
