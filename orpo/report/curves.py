"""Curves of a training run, from the trainer's log history: a picture and the same numbers as CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

# Okabe and Ito's palette, which readers with any colour vision can tell apart; the pale yellow is left out.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# Up to so many points are marked: a line alone looks as if everything between had been measured.
MARKED = 30
# So few points show no trend: no line joins them, and the axis is not stretched until they fill it.
NO_TREND = 2

LogHistory = Sequence[Mapping[str, object]]

# (title, y axis, [(metric, line style, legend suffix, sign)]) of each panel. The log holds mean log sigma(r) <= 0 under
# "log_odds_ratio"; the loss term is its negative.
_PANELS = (
    (
        "Log-probability of the answers",
        "mean log-probability per token (nats)",
        [("logps/chosen", "-", "chosen", 1), ("logps/rejected", "--", "rejected", 1)],
    ),
    ("Log odds ratio, chosen over rejected", "log odds ratio r (nats)", [("log_odds_chosen", "-", "", 1)]),
    ("Loss term 1: next-token loss on chosen", "NLL (nats per token)", [("nll_loss", "-", "", 1)]),
    ("Loss term 2: odds ratio, before beta", "-log sigmoid(r) (nats)", [("log_odds_ratio", "-", "", -1)]),
)


def curve(log_history: LogHistory, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, in order; ``eval_`` belongs to the name.

    Where a step was logged twice (a last evaluation after a periodic one) the later value stands. Values that are not
    numbers are left out, NaN and infinities are kept.
    """
    points = {}
    for entry in log_history:
        value = entry.get(metric)
        if isinstance(value, (int, float)) and "step" in entry:
            points[int(entry["step"])] = float(value)
    return list(points), list(points.values())


def plot_curves(log_histories: Mapping[str, LogHistory], path: str | Path, title: str | None = None) -> Path:
    """Draw chosen and rejected log-probabilities, the log odds ratio and both loss terms of one or more runs.

    Held-out values (``eval_*``) are drawn strong with a mark at each evaluation, the training batches' values thin
    behind them; a run without evaluation shows its training curve strong.

    Args:
        log_histories: name of the run -> ``trainer.state.log_history``.
        path: where the picture goes; its suffix chooses the format (png, pdf, svg).
        title: a line above the panels.

    Returns:
        `path`.

    Raises:
        ValueError: no run holds any of the metrics.
    """
    names = [name for *_, lines in _PANELS for name, *_ in lines]
    if not any(
        curve(h, prefix + name)[0] for h in log_histories.values() for name in names for prefix in ("", "eval_")
    ):
        raise ValueError(
            f"log_histories has {len(log_histories)} run(s) and no value of any of {names}: nothing to draw "
            "(logging_steps may be larger than the number of steps)"
        )
    # matplotlib takes a second to import and pyplot would ask for a display: neither is wanted by `import orpo`.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # ORPO first, so that it has one colour whatever it is drawn beside.
    order = sorted(log_histories, key=lambda run: not run.startswith("ORPO"))
    colours = {run: COLOURS[i % len(COLOURS)] for i, run in enumerate(order)}
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    held_out = False
    for axes, (panel_title, label, lines) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        for run, history in log_histories.items():
            for metric, style, suffix, sign in lines:
                held_out |= _draw(axes, history, metric, style, sign, colours[run], f"{run} {suffix}".strip())
        _keep_few_points_in_proportion(axes)
        axes.set_title(panel_title, fontsize=11, loc="left")
        axes.set_xlabel("optimizer step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel(label)
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9, handlelength=3.2)
    note = "strong: held-out pairs; thin: training batches" if held_out else "training batches"
    figure.suptitle(f"{title}\n{note}" if title else note, fontsize=12 if title else 10)
    figure.savefig(path, dpi=130)
    return Path(path)


def _draw(axes, history: LogHistory, metric: str, style: str, sign: int, colour: str, label: str) -> bool:
    """One metric of one run; True if it has held-out values."""
    train_steps, train_values = curve(history, metric)
    eval_steps, eval_values = curve(history, f"eval_{metric}")
    held_out = len(eval_steps) > 0
    if train_steps:
        strong = {} if held_out else {"label": label}
        width, alpha = (0.9, 0.35) if held_out else (1.8, 1.0)
        look = {"color": colour, "linewidth": width, "alpha": alpha, **_style(style, len(train_steps), 3), **strong}
        axes.plot(train_steps, [sign * v for v in train_values], **look)
    if held_out:
        look = {"color": colour, "linewidth": 1.9, **_style(style, len(eval_steps), 4), "label": label}
        axes.plot(eval_steps, [sign * v for v in eval_values], **look)
    return held_out


def _style(style: str, points: int, size: int) -> dict[str, object]:
    """The style of a line, "-" or "--", through so many points; marks tell lines apart in grey print."""
    marker = ("o" if style == "-" else "s") if points <= MARKED else ""
    return {"linestyle": "" if points <= NO_TREND else style, "marker": marker, "markersize": size}


def _keep_few_points_in_proportion(axes) -> None:
    """Lets the axis span at least a tenth of its values where no curve has a trend."""
    if not axes.lines or any(len(line.get_xdata()) > NO_TREND for line in axes.lines):
        return
    low, high = axes.dataLim.intervaly
    room = max(0.1 * max(abs(low), abs(high)), 0.01) - (high - low)
    if room > 0:
        axes.set_ylim(low - room / 2 - 0.05 * (high - low), high + room / 2 + 0.05 * (high - low))


def write_curves_csv(log_histories: Mapping[str, LogHistory], path: str | Path) -> Path:
    """Write every logged number as one table: a line for each run, step and split, a column for each metric.

    The columns are ``run, step, split`` (``train`` or ``eval``), then the metrics' names without ``eval_`` in
    alphabetical order; a metric that was not logged there is an empty field.

    Returns:
        `path`.
    """
    table: dict[tuple[str, int, str], dict[str, float]] = {}
    for run, history in log_histories.items():
        for entry in history:
            for name, value in entry.items():
                if name == "step" or not isinstance(value, (int, float)):
                    continue
                split, metric = ("eval", name.removeprefix("eval_")) if name.startswith("eval_") else ("train", name)
                if "step" in entry:
                    table.setdefault((run, int(entry["step"]), split), {})[metric] = value
    # An evaluation's entry also holds the epoch, which would make a training line with nothing else in it.
    table = {key: row for key, row in table.items() if row.keys() - {"epoch"}}
    columns = sorted({metric for row in table.values() for metric in row})
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "step", "split", *columns])
        for (run, step, split), row in table.items():
            writer.writerow([run, step, split, *(row.get(column, "") for column in columns)])
    return Path(path)
