"""The newest names of transformers for its older versions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

_NEWER = "activation_checkpointing" in TrainingArguments.__dataclass_fields__


@dataclass
class _WithNewerNames(TrainingArguments):
    """TrainingArguments from before `gradient_checkpointing` was renamed."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "activation_checkpointing_kwargs",
    ]

    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in backward, in less memory and more time."}
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of activation_checkpointing."}
    )

    def __post_init__(self) -> None:
        if self.activation_checkpointing is not None:
            self.gradient_checkpointing = self.activation_checkpointing
        if self.activation_checkpointing_kwargs is not None:
            self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs
        super().__post_init__()
        self.activation_checkpointing = self.gradient_checkpointing
        self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs


Arguments: type[TrainingArguments] = TrainingArguments if _NEWER else _WithNewerNames
