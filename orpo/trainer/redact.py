"""Tokens among the settings: used in memory, written nowhere."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def is_secret(name: str, value: Any) -> bool:
    """Whether a setting called `name` is an access token. ``True``, for the one that is logged in, is none."""
    return isinstance(value, str) and (name in ("token", "use_auth_token") or name.endswith("_token"))


class RedactedArguments:
    """Settings whose access tokens stay out of every file: pickles have None in their place, ``to_dict`` a mark.

    ``Trainer`` saves its arguments beside each model, in ``training_args.bin``, which it uploads too, and hands
    ``to_dict`` to trackers. Copies in memory are whole.
    """

    def __getstate__(self) -> dict[str, Any]:
        state = {name: None if is_secret(name, value) else value for name, value in self.__dict__.items()}
        kwargs = state.get("model_init_kwargs")
        if isinstance(kwargs, Mapping):
            state["model_init_kwargs"] = {name: v for name, v in kwargs.items() if not is_secret(name, v)}
        return state

    def __copy__(self) -> Any:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def to_dict(self) -> dict[str, Any]:
        """``TrainingArguments.to_dict``, without the tokens in ``model_init_kwargs`` too."""
        values = super().to_dict()
        kwargs = values.get("model_init_kwargs")
        if isinstance(kwargs, Mapping):
            hidden = {name: f"<{name.upper()}>" if is_secret(name, v) else v for name, v in kwargs.items()}
            values["model_init_kwargs"] = hidden
        return values
