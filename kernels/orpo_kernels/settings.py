"""The settings of the loss: their defaults, their ranges, and the one tensor in which numbers reach an operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orpo_kernels.head import Head
from orpo_kernels.shard import Shard


@dataclass(frozen=True)
class LossSettings:
    """Everything of a call but its tensors; letters and equations as in kernels/README.md.

    Attributes:
        beta: weight of the odds-ratio term (Eq. 5), at least 0 and finite.
        nll_weight: weight of the NLL term, at least 0 and finite.
        num_nll_tokens, num_pairs: denominators of the two means, above 0; None: what the rows hold.
        logit_scale: factor on the logits (Eq. 1), finite.
        logit_softcap: c of Eq. 1, above 0 and finite; None: no cap.
        logits_budget: most bytes kept between the logits and their gradient; None: the device's default.
        strip_bytes: bytes of one strip of recomputed logits, at least 1; None: the device's default.
        backend: one of `plan.BACKENDS`; None: what the device has.

    Raises:
        ValueError: a value outside its range, or a tensor that needs a gradient, which no setting gets.
    """

    beta: float = 0.1
    nll_weight: float = 1.0
    num_nll_tokens: float | None = None
    num_pairs: float | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    logits_budget: int | None = None
    strip_bytes: int | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("beta", "nll_weight"):
            if not 0 <= self._number(name) < math.inf:
                raise ValueError(f"{name} has to be at least 0 and finite, got {getattr(self, name)}")
        if not -math.inf < self._number("logit_scale") < math.inf:
            raise ValueError(f"logit_scale has to be finite, got {self.logit_scale}")
        for name in ("num_nll_tokens", "num_pairs", "logit_softcap"):
            if getattr(self, name) is not None and not 0 < self._number(name) < math.inf:
                raise ValueError(f"{name} has to be above 0 and finite, got {getattr(self, name)}")
        for name, least in (("logits_budget", 0), ("strip_bytes", 1)):
            value = getattr(self, name)
            if value is None:
                continue
            if not least <= value < math.inf or value != int(value):
                raise ValueError(f"{name} has to be a whole number of bytes, at least {least}, got {value}")
            object.__setattr__(self, name, int(value))

    def _number(self, name: str) -> float:
        value: Any = getattr(self, name)
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(f"{name} needs a gradient, which this loss does not give: pass a number, or detach it")
        object.__setattr__(self, name, float(value))
        return getattr(self, name)

    def numbers(self) -> Tensor:
        """The six numbers that kernels compute with, float64 (6,) on the CPU; 0 for None.

        As Python numbers in an operator's schema torch.compile would take them for constants, and compile a graph for
        every beta and every count of tokens.
        """
        values = (
            self.beta,
            self.nll_weight,
            self.num_nll_tokens or 0.0,
            self.num_pairs or 0.0,
            self.logit_scale,
            self.logit_softcap or 0.0,
        )
        if not torch.compiler.is_compiling():
            return torch.tensor(values, dtype=torch.float64, device="cpu")
        # A number that is a factor stays a symbol in the graph; torch.tensor would fix it.
        one = torch.ones((), dtype=torch.float64, device="cpu")
        return torch.stack([one * value for value in values])


@dataclass(frozen=True)
class Numbers:
    """`LossSettings.numbers` read back inside an operator."""

    beta: float
    nll_weight: float
    num_nll_tokens: float | None
    num_pairs: float | None
    logit_scale: float
    logit_softcap: float | None

    @classmethod
    def read(cls, numbers: Tensor) -> Numbers:
        beta, nll_weight, tokens, pairs, scale, softcap = numbers.tolist()
        return cls(beta, nll_weight, tokens or None, pairs or None, scale, softcap or None)

    def of_objective(self) -> dict[str, float | None]:
        """The keyword arguments of stage 2."""
        names = ("beta", "nll_weight", "num_nll_tokens", "num_pairs")
        return {name: getattr(self, name) for name in names}

    def head(self, weight_VD: Tensor, bias_V: Tensor | None, group: str = "") -> Head:
        """The head with this scale and softcap, this rank's shard of it where there is a group of that name."""
        return Head(weight_VD, bias_V, self.logit_scale, self.logit_softcap, Shard(group))
