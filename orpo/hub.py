"""Whether a name that is no folder can come from the hub, told at once: its client tries for most of a minute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session, is_offline_mode


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments of ``from_pretrained``, those that say which files are read and as whom the hub is asked."""
    return {name: options[name] for name in ("revision", "token", "cache_dir") if options.get(name) is not None}


def check_hub_name(name: str, kind: str = "model", *, cache_dir: str | Path | None = None) -> None:
    """Refuses a name that is no folder, where the hub cannot be reached and its cache has nothing of that name.

    One request without retries, by the hub's own client, so that its proxies and ``HF_ENDPOINT`` hold. Any answer will
    do, and so does every failure but that of the connection: what is wrong then is the hub's to say.

    Args:
        name: a folder, or a name on the hub.
        kind: "model" or "dataset".
        cache_dir: where the hub's files are kept. Default: its own.

    Raises:
        ValueError: there is neither.
    """
    if Path(name).expanduser().exists() or _is_cached(name, kind, Path(cache_dir or constants.HF_HUB_CACHE)):
        return
    if name.count("/") > 1:
        raise ValueError(f"there is no folder {name}, and no name on the hub has two slashes")
    if is_offline_mode():
        raise ValueError(f"there is no folder {name}, and HF_HUB_OFFLINE keeps from asking the hub for a {kind}")
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:
        # By name: the client's library is httpx or httpx2.
        if type(error).__name__ not in ("ConnectError", "ConnectTimeout"):
            return
        raise ValueError(f"there is no folder {name}, and the hub cannot be reached ({error})") from error


def _is_cached(name: str, kind: str, cache: Path) -> bool:
    if (cache / "--".join((f"{kind}s", *name.split("/")))).is_dir():
        return True
    if kind != "dataset":
        return False
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    *owner, title = name.split("/")
    return Path(config.HF_DATASETS_CACHE, "___".join((*owner, camelcase_to_snakecase(title)))).is_dir()
