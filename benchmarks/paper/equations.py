"""The paper's equations as an executable page: what implements each, checked in float64.

    python -m benchmarks.paper.equations            prints the table; exits with 1 where a check fails

Equations 1, 2, 6-11 and 16 stand on the slides; 3-5 are the paper's definitions that those are built on. P is the
exponential of a mean log-probability per token, as in Eq. 3.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from orpo_kernels import reference
from orpo_kernels.rows import Rows, rows_from_labels
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

import orpo
from benchmarks import tables

from .methods import probability_ratio_loss
from .reward import preference_loss

DTYPE = torch.float64


class Equation(NamedTuple):
    """One line of the table; `check` returns the largest error, 0 where all is exact."""

    name: str
    equation: str
    function: str
    check: Callable[[], float]
    says: str


LIMIT = 1e-9


def _pair() -> tuple[Tensor, Tensor]:
    """Mean log-probabilities of chosen and rejected from hardly likely to nearly certain, (P,) each."""
    p = torch.tensor([1e-6, 0.01, 0.2, 0.5, 0.9, 0.999], dtype=DTYPE)
    grid = torch.cartesian_prod(p, p)
    return grid[:, 0].log(), grid[:, 1].log()


def _batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden (2P, T, D), weight (V, D), labels (2P, T), logits (2P, T, V))."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 7, 5, generator=g, dtype=DTYPE), torch.randn(11, 5, generator=g, dtype=DTYPE)
    labels = torch.randint(11, (6, 7), generator=g)
    labels[:, :2] = -100
    return hidden, weight, labels, hidden @ weight.T


def _error(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item()


def _require(*claims: bool) -> float:
    """0 where all claims hold."""
    return 0.0 if all(claims) else float("inf")


def odds(a: Tensor) -> Tensor:
    """Eq. 4: odds of an answer with mean log-probability `a`."""
    return torch.exp(a) / reference.one_minus_exp(a)


def delta(a_w: Tensor, a_l: Tensor) -> Tensor:
    """Eq. 9: 1 / (1 + odds ratio)."""
    return 1 / (1 + torch.exp(reference.log_odds_ratio(a_w, a_l)))


def _eq1() -> float:
    hidden, weight, labels, logits = _batch()
    kept = labels[:, 1:] >= 0
    logp = orpo.token_logprobs(hidden[:, :-1][kept], weight, labels[:, 1:][kept])
    expected = logits.softmax(-1)[:, :-1][kept].gather(1, labels[:, 1:][kept][:, None]).log().mean()
    return _error(-logp.mean(), -expected)


def _eq2() -> float:
    *_, labels, logits = _batch()
    z, y = logits.reshape(-1, 11), labels.reshape(-1).clamp(min=0)
    expected = -(one_hot(y, 11) * z.log_softmax(-1)).sum(1)
    return _error(-reference.token_stats(z, y)[0], expected)


def _eq3() -> float:
    hidden, weight, labels, logits = _batch()
    out = orpo.orpo_loss(hidden, weight, labels)
    logp = logits.log_softmax(-1)[:, :-1].gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
    kept = labels[:, 1:] >= 0
    expected = (logp * kept).sum(1) / kept.sum(1)
    return _error(torch.cat([out.chosen_logps, out.rejected_logps]), expected)


def _eq4() -> float:
    a, _ = _pair()
    k, p = odds(a), torch.exp(a)
    four = odds(torch.tensor(0.8, dtype=DTYPE).log())
    return max(_error(k * (1 - p), p), abs(four.item() - 4))


def _eq5() -> float:
    a_w, a_l = _pair()
    return _error(reference.log_odds_ratio(a_w, a_l), odds(a_w).log() - odds(a_l).log())


def _eq6() -> float:
    hidden, weight, labels, _ = _batch()
    errors = []
    for beta in (0.0, 0.1, 1.0):
        out = orpo.orpo_loss(hidden, weight, labels, beta=beta)
        rows = rows_from_labels(labels, None, -100, True)
        kept = rows.in_response_N
        arrays = (rows.rows_N, rows.targets_N, rows.sequence_N, rows.in_response_N, rows.in_nll_N)
        rows = Rows(*(a[kept] for a in arrays), pairs=rows.pairs)
        exact, *_ = reference.orpo(hidden.reshape(-1, 5)[rows.rows_N], weight, rows, beta=beta)
        errors += [_error(out.loss, out.nll_loss + beta * out.odds_ratio_loss), _error(out.loss, exact.loss)]
    return max(errors)


def _eq7() -> float:
    a_w, a_l = _pair()
    losses, *_ = orpo.odds_ratio_loss(a_w, a_l, beta=1.0)
    return max(_error(-losses, -logsigmoid(odds(a_w).log() - odds(a_l).log())), _require(bool((-losses > 0).all())))


def _eq8() -> float:
    a_w, a_l = (a.requires_grad_() for a in _pair())
    (-logsigmoid(reference.log_odds_ratio(a_w, a_l))).sum().backward()
    d = delta(a_w, a_l).detach()
    ascent = d / reference.one_minus_exp(a_w).detach(), -d / reference.one_minus_exp(a_l).detach()
    ours = reference.odds_ratio_grad(a_w.detach(), a_l.detach())
    scale = [a.abs() for a in ascent]
    return max(
        *(_error(a.grad / s, -up / s) for a, up, s in zip((a_w, a_l), ascent, scale, strict=True)),
        *(_error(g / s, -up / s) for g, up, s in zip(ours, ascent, scale, strict=True)),
    )


def _eq9() -> float:
    a_w, a_l = _pair()
    share = _error(delta(a_w, a_l), odds(a_l) / (odds(a_w) + odds(a_l)))
    rare, likely = torch.tensor([1e-9, 1 - 1e-9], dtype=DTYPE).log()
    limits = delta(likely, rare) < 1e-15, delta(rare, likely) > 1 - 1e-15, delta(rare, rare) == 0.5
    return max(share, _require(*map(bool, limits)))


def _eq10() -> float:
    p_w = torch.linspace(0.05, 0.95, 10, dtype=DTYPE)
    a_w, a_l = p_w.log(), torch.full_like(p_w, 0.3).log()
    g_w, g_l = reference.odds_ratio_grad(a_w, a_l)
    h_w, h_l = -g_w / delta(a_w, a_l), -g_l / delta(a_w, a_l)
    grows = bool((h_w.diff() > 0).all())
    return max(_error(h_w, 1 / (1 - p_w)), _error(h_l, torch.full_like(p_w, -1 / 0.7)), _require(grows))


def _eq11() -> float:
    a_w, a_l = _pair()
    odds_as_rewards = preference_loss(odds(a_w).log(), odds(a_l).log())
    return _error(odds_as_rewards, -orpo.odds_ratio_loss(a_w, a_l, beta=1.0)[0].mean())


def _eq16() -> float:
    a_w, a_l = _pair()
    log_pr, log_or = a_w - a_l, reference.log_odds_ratio(a_w, a_l)
    wider = bool((log_or.abs() >= log_pr.abs() - LIMIT).all())
    identity = log_pr + reference.one_minus_exp(a_l).log() - reference.one_minus_exp(a_w).log()
    p_w, p_l = a_w.exp(), a_l.exp()
    loss = _error(probability_ratio_loss(a_w, a_l), -(p_w / (p_w + p_l)).log().mean())
    return max(loss, _error(log_or, identity), _require(wider, bool((log_or.sign() == log_pr.sign()).all())))


EQUATIONS = (
    Equation("1", "L = -mean log P(x, y)", "orpo.token_logprobs", _eq1, "equals -log softmax of the label, averaged"),
    Equation("2", "= -mean sum_i y_i log p_i", "reference.token_stats", _eq2, "equals the sum over a one-hot label"),
    Equation("3", "log P(y given x) = mean_t log P(y_t)", "orpo.orpo_loss", _eq3, "chosen_logps, rejected_logps"),
    Equation("4", "odds = P / (1 - P)", "reference.one_minus_exp", _eq4, "odds k: k (1 - P) = P; P = 0.8 is 4 times"),
    Equation("5", "OR = odds(y_w) / odds(y_l)", "reference.log_odds_ratio", _eq5, "log OR is a difference of log odds"),
    Equation("6", "L_ORPO = L_SFT + lambda L_OR", "orpo.orpo_loss", _eq6, "lambda 0, 0.1, 1; and reference.orpo"),
    Equation("7", "L_OR = -log sigma(log OR)", "orpo.odds_ratio_loss", _eq7, "minus TRL's term, and above 0"),
    Equation(
        "8",
        "grad L_OR = delta(d) h(d)",
        "reference.odds_ratio_grad",
        _eq8,
        "autograd gives -delta h: as printed it is the gradient of log sigma, the ascent direction",
    ),
    Equation("9", "delta = 1 / (1 + OR)", "reference.odds_ratio_grad", _eq9, "0 where the chosen odds dominate, 1 where the rejected do, 1/2 at equal odds"),  # noqa: E501
    Equation("10", "h = grad log P_w / (1 - P_w) - grad log P_l / (1 - P_l)", "reference.odds_ratio_grad", _eq10, "its factor 1 / (1 - P_w) grows with the likelihood"),  # noqa: E501
    Equation("11", "-log sigma(r_w - r_l)", "benchmarks.paper.reward.preference_loss", _eq11, "with log odds as rewards it is Eq. 7"),  # noqa: E501
    Equation("16", "PR = P(y_w) / P(y_l)", "benchmarks.paper.methods.probability_ratio_loss", _eq16, "log OR = log PR + log (1 - P_l) / (1 - P_w), same sign, never nearer 0"),  # noqa: E501
)  # fmt: skip


def run() -> list[tuple[Equation, bool]]:
    """Every equation, and whether its check holds to 1e-9."""
    return [(equation, equation.check() <= LIMIT) for equation in EQUATIONS]


def table(results: list[tuple[Equation, bool]]) -> str:
    """The results as Markdown."""
    rows = [[e.name, e.equation, f"`{e.function}`", e.says, "yes" if ok else "NO"] for e, ok in results]
    return tables.table(["Eq.", "equation", "implemented by", "checked in float64", "ok"], rows)


def main() -> None:
    results = run()
    print(table(results))
    failed = [equation.name for equation, ok in results if not ok]
    if failed:
        sys.exit(f"{len(failed)} of {len(results)} equations fail: {', '.join(failed)}")


if __name__ == "__main__":
    main()
