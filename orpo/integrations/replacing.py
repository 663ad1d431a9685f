"""Replaces methods of another project's trainer and gives them back; attaches the loss to the model that it trains."""

from __future__ import annotations

import functools
from typing import Any

from packaging.version import Version
from torch import nn

from orpo.model.attach import attach_orpo_loss, base_model
from orpo.model.encoder_decoder import is_encoder_decoder
from orpo.model.gathered import is_cut
from orpo.ranks import fsdp_plugin, prepare_ranks


class Replacements:
    """Replaces methods and remembers the originals. Replacing one twice is the same as once."""

    def __init__(self) -> None:
        self.originals: dict[tuple[type, str], Any] = {}

    def replace(self, trainer: type, name: str, method: Any) -> None:
        """Gives `trainer` and its subclasses `method` under `name`, which it may have inherited so far."""
        if (trainer, name) not in self.originals:
            self.originals[trainer, name] = vars(trainer).get(name)
            setattr(trainer, name, method)

    def attach_after_init(self, trainer: type) -> None:
        """Attaches the loss to the model of each new `trainer`, before accelerate wraps the model.

        Afterwards FSDP has split it, and its head cannot be tried.
        """
        # ms-swift removes TRL's __init__: its first step attaches the loss (`check_attached`).
        if "__init__" not in vars(trainer):
            return
        init = vars(trainer)["__init__"]

        @functools.wraps(init)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            init(self, *args, **kwargs)
            prepare_ranks(self.accelerator, self.model)
            _attach(self.model)

        self.replace(trainer, "__init__", __init__)

    def undo(self) -> None:
        """Gives every class its own methods back."""
        for (trainer, name), original in self.originals.items():
            if original is None:
                delattr(trainer, name)
            else:
                setattr(trainer, name, original)
        self.originals.clear()


def check_attached(trainer: Any, model: nn.Module) -> None:
    """Attaches the loss to `model`, wrapped by the trainer, where it is not attached yet.

    Raises:
        ValueError: the loss cannot be called through the wrapper, torch's DataParallel or FSDP.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "torch's DataParallel would cut the labels in pieces: start one process for each GPU (accelerate launch), "
            "or show one GPU to this one (CUDA_VISIBLE_DEVICES=0)"
        )
    plain = trainer.accelerator.unwrap_model(model)
    if hasattr(base_model(plain), "_orpo_head"):
        return
    if fsdp_plugin(trainer.accelerator) is not None:
        raise ValueError("FSDP has cut the model before the loss was attached: call patch() before a trainer is made")
    _attach(plain)


def _attach(model: nn.Module) -> None:
    if is_encoder_decoder(base_model(model)):
        raise ValueError(
            "the model is an encoder-decoder, whose labels stand elsewhere than those of a causal model: call "
            "unpatch(), or train it with orpo.ORPOTrainer"
        )
    if any(map(is_cut, model.parameters())):
        raise ValueError(
            "ZeRO-3 has cut the weights up while loading, which is not tried in other programs' trainers: use ZeRO-2, "
            "or orpo-train"
        )
    attach_orpo_loss(model)


def refuse_unknown(package: str, version: str, first: str, beyond: str) -> None:
    """Refuses a `version` of `package` older than `first`, or from `beyond` on: its methods may differ.

    Raises:
        ImportError: the message has the versions that are known.
    """
    if not Version(first) <= Version(Version(version).base_version) < Version(beyond):
        raise ImportError(
            f"{package} {version} is not known to orpo.integrations, which replaces methods of {package} "
            f">={first},<{beyond}: install one of these, or train with orpo.ORPOTrainer"
        )
