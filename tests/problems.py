"""Seeded inputs for the loss tests, and their float64 truth.

Targets are planted: a share of the hidden states points at its own target's weight row, so that not every target is
equally unlikely and the gradient has large entries where a mistake would show.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from orpo_kernels import reference
from orpo_kernels.rows import Rows, rows_from_labels
from torch import Tensor


@dataclass
class Problem:
    """Inputs of `orpo_loss` for 2P sequences of T positions."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    nll_labels: Tensor | None
    scale: float
    softcap: float | None
    beta: float

    @property
    def keywords(self) -> dict:
        """Keyword arguments of `orpo_loss` for this problem's head and objective."""
        return dict(
            nll_labels=self.nll_labels,
            lm_head_bias=self.bias,
            logit_scale=self.scale,
            logit_softcap=self.softcap,
            beta=self.beta,
        )

    @property
    def rows(self) -> Rows:
        """The rows that count."""
        return rows_from_labels(self.labels, self.nll_labels, -100, shift=True)

    def requiring_grad(self, hidden: bool = True, weight: bool = True, bias: bool = True) -> Problem:
        """Sets requires_grad in place."""
        for tensor, wanted in ((self.hidden, hidden), (self.weight, weight), (self.bias, bias)):
            if tensor is not None:
                tensor.requires_grad_(wanted)
                tensor.grad = None
        return self

    def truth(self) -> tuple[reference.Objective, Tensor, Tensor, Tensor]:
        """(objective, d hidden, d weight, d bias) in float64, by the closed forms."""
        rows = self.rows
        hidden = self.hidden.detach().double()
        d = hidden.shape[-1]
        bias = None if self.bias is None else self.bias.detach().double()
        result, dx, dw, db = reference.orpo(
            hidden.reshape(-1, d)[rows.rows_N],
            self.weight.detach().double(),
            rows,
            bias_V=bias,
            scale=self.scale,
            softcap=self.softcap,
            beta=self.beta,
        )
        dh = torch.zeros(hidden.shape, dtype=dx.dtype, device=dx.device).view(-1, d).index_add_(0, rows.rows_N, dx)
        return result, dh.view(hidden.shape), dw, db


def make_problem(
    P: int = 3,
    T: int = 17,
    D: int = 24,
    V: int = 203,
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    beta: float = 0.3,
    prompt_in_nll: bool = True,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Problem:
    """2P sequences of unequal prompts and lengths, labels aligned with the input ids."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (2 * P, T), generator=g)
    weight = torch.randn(V, D, generator=g) * D**-0.5
    hidden = torch.randn(2 * P, T, D, generator=g)
    planted = torch.rand(2 * P, T - 1, generator=g) < 0.4
    hidden[:, :-1][planted] += 3 * weight[tokens[:, 1:][planted]]
    labels, nll_labels = tokens.clone(), tokens.clone()
    for s in range(2 * P):
        # Unequal prompts and lengths, but never an answer without a token.
        prompt = min(1 + s % 5, T - 2)
        labels[s, :prompt] = -100
        padding = min(s % 4, T - prompt - 2)
        labels[s, T - padding :] = -100
        nll_labels[s, T - padding :] = -100
    bias_V = torch.randn(V, generator=g) * 0.3 if bias else None
    return Problem(
        hidden=hidden.to(dtype).to(device),
        weight=weight.to(dtype).to(device),
        bias=None if bias_V is None else bias_V.to(dtype).to(device),
        labels=labels.to(device),
        nll_labels=nll_labels.to(device) if prompt_in_nll else None,
        scale=scale,
        softcap=softcap,
        beta=beta,
    )


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| in the Euclidean norm; the plain norm where the truth is zero."""
    difference = (value.detach().double() - truth.double()).norm().item()
    size = truth.double().norm().item()
    return difference / size if size > 0 else difference


def log_odds(mean_logps: Tensor) -> Tensor:
    """The log odds of mean log-probabilities, in their own precision."""
    return mean_logps - torch.log(-torch.expm1(mean_logps))
