"""What each logged number is, and which way it should go: for the report of a run, and for docs/metrics.md."""

from __future__ import annotations

# (names, what it is, which way it should go); code is in backticks.
METRICS = (
    (
        ("loss",),
        "`nll_weight * nll_loss - beta * log_odds_ratio` (Eq. 5), and a router's loss where the model has one",
        "down",
    ),
    (("nll_loss",), "mean negative log-likelihood of the chosen sequences, nats per token", "down, then level"),
    (
        ("log_odds_ratio",),
        "mean of `log sigmoid(r)` (Eq. 4); -0.693 where the model prefers neither",
        "up towards 0",
    ),
    (("log_odds_chosen",), "mean of `r`", "up, above 0"),
    (("rewards/accuracies",), "share of pairs with `a_w > a_l`", "up from about 0.5"),
    (("rewards/margins",), "mean of `beta * (a_w - a_l)`", "up, above 0"),
    (("rewards/chosen", "rewards/rejected"), "means of `beta * a_w` and `beta * a_l`", "apart"),
    (("logps/chosen",), "mean of `a_w`", "up, or level"),
    (("logps/rejected",), "mean of `a_l`", "down, or up less than `logps/chosen`"),
    (
        ("logits/chosen", "logits/rejected"),
        "mean logit over the vocabulary and the scored rows; absent with a softcap",
        "says little",
    ),
)
SYMBOLS = (
    "`a_w` and `a_l` are the mean log-probabilities per token of the chosen and the rejected answer, in nats; "
    "`odds(a) = exp(a) / (1 - exp(a))`, and `r = log odds(a_w) - log odds(a_l)`."
)


def explained(metric: str) -> tuple[str, str]:
    """What `metric` is and which way it should go; ("", "") for a metric that is not ours.

    Args:
        metric: its name without ``eval_``; a data set's name may come first: ``pairs_rewards/margins``.
    """
    found = [
        (len(name), what, goes)
        for names, what, goes in METRICS
        for name in names
        if metric == name or metric.endswith(f"_{name}")
    ]
    # The longest name that fits: nll_loss also ends with loss.
    return max(found)[1:] if found else ("", "")
